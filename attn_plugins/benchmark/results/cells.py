"""Run a benchmark cell by cell: what has a result of these versions is passed over, so that a killed run goes on.

A cell is what is measured at a time. It has ``settings``, all that its result depends on; a ``key``, their hash; and
``labels``, which people read and no key depends on. Cells of a group share rounds of timing.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol, TypeVar

from attn_plugins.benchmark.results.shares import Shares
from attn_plugins.benchmark.results.store import Results
from attn_plugins.config.versions import hardware, versions


class Cell(Protocol):
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def key(self) -> str: ...
    @property
    def labels(self) -> dict[str, Any]: ...


C = TypeVar("C", bound=Cell)


class Watch(Protocol):
    """What is told of cells as they are run."""

    def started(self, cell: Any, *, timed: bool) -> None: ...
    def ended(self, cell: Any, text: str, *, failed: bool) -> None: ...


@dataclass(frozen=True)
class Lines:
    """A line of progress at a time, for a terminal or a log."""

    say: Callable[[str], None]
    numbered: dict[str, str]
    """Key of each cell -> its number and name."""
    announce: bool
    """Name a cell before it is measured, where that takes minutes."""

    def started(self, cell: Cell, *, timed: bool) -> None:
        if self.announce:
            self.say(self.numbered[cell.key])

    def ended(self, cell: Cell, text: str, *, failed: bool) -> None:
        self.say(f"      {text}" if self.announce else f"{self.numbered[cell.key]}: {text}")


def run_cells(
    groups: Iterable[list[C]],
    results: Results,
    measure: Callable[[list[C]], Iterator[tuple[C, dict[str, Any] | str]]],
    note: Callable[[C, dict[str, Any]], str],
    *,
    fresh: bool,
    say: Callable[[str], None],
    announce: bool = False,
    only: Collection[str] | None = None,
    retry: bool = True,
    timed: Callable[[C], bool] = lambda cell: True,
    shares: Shares | None = None,
    watch: Watch | None = None,
    hashed: Callable[[C], dict[str, str]] | None = None,
) -> None:
    """Measure the cells that have no result of these versions yet, and append each outcome as it is there.

    Args:
        measure: cells of a group -> each with its outcome: ``{"status": "ok", "result": ...}``, or "error" with why; or
            the reason why the cell is left out, of which nothing is recorded.
        note: (cell, result) -> what is said of it in a line of progress.
        fresh: measure all cells, whatever has been written before.
        say: gets a line of progress at a time.
        announce: name a cell in a line before it is measured.
        only: keys of the cells that are run here; None for all.
        retry: run cells again that failed with these versions.
        timed: whether other work beside a cell would change its result.
        shares: processes that share the groups out; the first runs what is timed, once the others have ended.
        watch: is told of cells instead of ``say``.
        hashed: cell -> hashes of what stands behind the names in its settings.

    Raises:
        ValueError: another run is measuring into the same file.
    """
    groups = [[cell for cell in group if only is None or cell.key in only] for group in groups]
    cells = [cell for group in groups for cell in group]
    numbered = {cell.key: f"[{number}/{len(cells)}] {cell}" for number, cell in enumerate(cells, 1)}
    if shares is not None:
        announce, numbered = False, {key: f"process {shares.rank + 1}: {name}" for key, name in numbered.items()}
    watch = watch or Lines(say, numbered, announce)
    with results.lock() if shares is None or shares.first else contextlib.nullcontext():
        for line in (
            []
            if fresh or (shares is not None and not shares.first)
            else results.resume_summary([cell.key for cell in cells], retry=retry)
        ):
            say(line)
        for group in _in_turn(groups, timed, shares, results):
            todo = [cell for cell in group if fresh or not results.done(cell.key)]
            todo = [cell for cell in todo if fresh or retry or not results.failed(cell.key)]
            for cell in todo:
                watch.started(cell, timed=timed(cell))
            for cell, outcome in measure(todo) if todo else ():
                failed = not isinstance(outcome, str) and outcome["status"] == "error"
                if isinstance(outcome, str):
                    text = outcome
                else:
                    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
                    record = {"key": cell.key, **cell.labels, **outcome, "finished": finished}
                    record |= {"settings": cell.settings, "versions": versions(), "hardware": hardware()}
                    results.add(record if hashed is None else {**record, "hashes": hashed(cell)})
                    text = note(cell, outcome["result"]) if outcome["status"] == "ok" else outcome["error"]
                    text += f" ({outcome['seconds']:.0f} s)" if "seconds" in outcome else ""
                watch.ended(cell, text, failed=failed)


def _in_turn(
    groups: list[list[C]], timed: Callable[[C], bool], shares: Shares | None, results: Results
) -> Iterator[list[C]]:
    """The groups that this process is to run; all where it is alone."""
    groups = [group for group in groups if group]
    if shares is None:
        yield from groups
        return
    yield from (group for group in groups if not timed(group[0]) and shares.take(group[0].key))
    if shares.remains():
        results.reread()
        yield from (group for group in groups if timed(group[0]))


def described(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
