"""Run a benchmark cell by cell: what has a result of these versions is passed over, so that a killed run goes on.

A cell is what is measured at a time. It has ``settings``, all that its result depends on; a ``key``, their hash; and
``labels``, which people read and no key depends on. Cells of a group share rounds of timing.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime, timezone
from typing import Any, Protocol, TypeVar

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
    hashed: Callable[[C], dict[str, str]] | None = None,
) -> None:
    """Measure the cells that have no result of these versions yet, and append each outcome as it is there.

    Args:
        measure: cells of a group -> each with its outcome: ``{"status": "ok", "result": ...}``, or "error" with why; or
            the reason why the cell is left out, of which nothing is recorded.
        note: (cell, result) -> what is said of it in a line of progress.
        fresh: measure all cells, whatever has been written before.
        say: gets a line of progress at a time.
        announce: name a cell before it is measured, where that takes minutes.
        only: keys of the cells that are run here; None for all.
        retry: run cells again that failed with these versions.
        hashed: cell -> hashes of what stands behind the names in its settings.

    Raises:
        ValueError: another run is measuring into the same file.
    """
    groups = [[cell for cell in group if only is None or cell.key in only] for group in groups]
    cells = [cell for group in groups for cell in group]
    numbered = {cell.key: f"[{number}/{len(cells)}] {cell}" for number, cell in enumerate(cells, 1)}
    with results.lock():
        for line in [] if fresh else results.resume_summary([cell.key for cell in cells], retry=retry):
            say(line)
        for group in groups:
            todo = [cell for cell in group if fresh or not results.done(cell.key)]
            todo = [cell for cell in todo if fresh or retry or not results.failed(cell.key)]
            if announce:
                for cell in todo:
                    say(numbered[cell.key])
            for cell, outcome in measure(todo) if todo else ():
                if isinstance(outcome, str):
                    text = outcome
                else:
                    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
                    record = {"key": cell.key, **cell.labels, **outcome, "finished": finished}
                    record |= {"settings": cell.settings, "versions": versions(), "hardware": hardware()}
                    results.add(record if hashed is None else {**record, "hashes": hashed(cell)})
                    text = note(cell, outcome["result"]) if outcome["status"] == "ok" else outcome["error"]
                    text += f" ({outcome['seconds']:.0f} s)" if "seconds" in outcome else ""
                say(f"      {text}" if announce else f"{numbered[cell.key]}: {text}")


def described(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
