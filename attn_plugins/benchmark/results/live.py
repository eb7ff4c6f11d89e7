"""The cells of a run as a table on a terminal while they are measured: what is there, under way, and what failed."""

import io
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from attn_plugins.benchmark.results.cells import Cell
from attn_plugins.benchmark.results.chosen import estimate
from attn_plugins.benchmark.results.store import Results

TICK = 0.5
"""Seconds between two pictures of the table."""


class LiveTable:
    """A table below whatever else is printed, gone when the run ends. Progress bars are a line in it.

    While a cell is timed nothing is drawn: that would take time from what is measured.

        with LiveTable(cells, results) as table:
            table.started(cell)
            table.ended(cell, "perplexity 12.3", failed=False)
    """

    def __init__(self, cells: Sequence[Cell], results: Results, console: Console | None = None):
        self._console = console or Console()
        self._cells = list(cells)
        self._results = results
        self._passed = {cell.key for cell in cells if results.done(cell.key)}
        self._said: dict[str, tuple[str, bool, float]] = {}
        """Key -> what is said of a cell that ended here, whether it failed, how many seconds it took."""
        self._current: Cell | None = None
        self._since = time.monotonic()
        self._still = False
        self._bars = _Bars(self._console)
        self._live = Live(
            console=self._console,
            get_renderable=self._picture,
            auto_refresh=False,
            transient=True,
            redirect_stderr=False,
        )
        self._over = threading.Event()
        self._ticks = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "LiveTable":
        self._live.start()
        self._stderr, sys.stderr = sys.stderr, self._bars
        self._ticks.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._ticks.join()
        sys.stderr = self._stderr
        self._live.stop()

    def started(self, cell: Cell, *, timed: bool) -> None:
        """A cell is under way; ``timed``: and must not be disturbed."""
        self._current, self._since, self._bars.last = cell, time.monotonic(), ""
        self._live.refresh()
        self._still = timed

    def ended(self, cell: Cell, text: str, *, failed: bool) -> None:
        """A cell has ended, with its figures or why it failed."""
        self._still, self._current = False, None
        self._said[cell.key] = text, failed, time.monotonic() - self._since
        self._live.refresh()

    def say(self, line: str) -> None:
        """A line above the table."""
        self._console.print(Text(line))

    def _tick(self) -> None:
        while not self._over.wait(TICK):
            if not self._still:
                self._live.refresh()

    def _picture(self) -> Group:
        failed = [cell for cell in self._cells if self._said.get(cell.key, ("", False, 0))[1]]
        ended = [cell for cell in self._cells if cell.key in self._said and cell not in failed]
        room = max(3, self._console.height - 10 - 2 * len(failed[-5:]))
        table = Table(title=self._headline(len(failed)), title_justify="left")
        table.add_column("cell", no_wrap=True, max_width=self._console.width // 2)
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("figures")
        for cell in ended[-room:]:
            text, _, seconds = self._said[cell.key]
            table.add_row(Text(str(cell)), _clock(seconds), Text(text))
        for cell in failed[-5:]:
            text, _, seconds = self._said[cell.key]
            table.add_row(Text(str(cell), style="red"), _clock(seconds), Text(text, style="red"))
        if self._current is not None:
            about = estimate(self._current, self._results)
            shown = f"about {_clock(about)} in all" if about is not None else "under way"
            elapsed = _clock(time.monotonic() - self._since)
            table.add_row(Text(str(self._current), style="bold"), elapsed, Text(shown, style="dim"))
        return Group(table, Text(self._bars.last, style="dim", no_wrap=True, overflow="ellipsis"))

    def _headline(self, failed: int) -> str:
        there = self._passed | set(self._said)
        left = [cell for cell in self._cells if cell.key not in there]
        found = [about for about in (estimate(cell, self._results) for cell in left) if about is not None]
        words = [f"{len(self._cells) - len(left)} of {len(self._cells)} cells"]
        words += [f"{failed} failed"] if failed else []
        if found:
            words.append(f"{'about' if len(found) == len(left) else 'at least'} {_clock(sum(found))} left")
        return ", ".join(words)


class _Bars(io.TextIOBase):
    """Standard error while the table is there: whole lines go above it, and of a bar the last state is kept."""

    def __init__(self, console: Console):
        self.last = ""
        self._console = console
        self._rest = ""

    encoding = "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            whole = _last_state(line)
            if whole:
                self._console.print(Text(whole))
        self._rest = self._rest.rpartition("\r")[2] if self._rest.count("\r") > 1 else self._rest
        self.last = _last_state(self._rest) or self.last
        return len(text)


def _last_state(line: str) -> str:
    """What a terminal would show of a line that was written over."""
    shown = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rstrip("\r").rpartition("\r")[2]
    return shown.rstrip()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
