"""Which cells of a benchmark are run here: by their labels, or a share of them; and how long they may take."""

import fnmatch
import re
import statistics
from collections.abc import Sequence

from attn_plugins.benchmark.results.cells import C, Cell
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import Table
from attn_plugins.core.options import did_you_mean


def chosen(cells: Sequence[C], patterns: Sequence[str] = (), shard: str | None = None) -> list[C]:
    """The cells that match, each once, in their order, and of these the share of a machine.

    Args:
        patterns: ``label=pattern`` with * and ?, such as ``attention=local*``. Those of one label are alternatives;
            a cell has to match for every label that is named.
        shard: ``k/n``, the k-th of n shares. Each has as many cells of a measure as the others, to within one; which it
            has depends on the keys of the cells alone, so that machines with the same settings have each cell once.

    Raises:
        ValueError: a pattern is none, or matches nothing; a shard is none.
    """
    wanted: dict[str, list[str]] = {}
    for text in patterns:
        label, equals, pattern = text.partition("=")
        known = list(dict.fromkeys(name for cell in cells for name in cell.labels))
        if not equals or label not in known:
            raise ValueError(
                f"--cells {text!r}{did_you_mean(label, known)}; allowed: LABEL=PATTERN of {', '.join(known)}"
            )
        there = dict.fromkeys(str(cell.labels[label]) for cell in cells if label in cell.labels)
        if not any(fnmatch.fnmatchcase(value, pattern) for value in there):
            raise ValueError(f"--cells {text!r} matches nothing; {label} is one of: {', '.join(there)}")
        wanted.setdefault(label, []).append(pattern)
    found = [cell for cell in cells if all(_matches(cell, *one) for one in wanted.items())]
    if not found:
        raise ValueError(f"no cell matches --cells {' --cells '.join(patterns)} at once")
    once: dict[str, C] = {}
    for cell in found:
        once.setdefault(cell.key, cell)
    return list(once.values()) if shard is None else _share(list(once.values()), shard)


def _matches(cell: Cell, label: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(str(cell.labels.get(label)), pattern) for pattern in patterns)


def _share(cells: list[C], shard: str) -> list[C]:
    given = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, of = map(int, given.groups()) if given else (0, 0)
    if not 1 <= number <= of:
        raise ValueError(f"--shard {shard!r}; allowed: k/n with k from 1 to n, such as 1/4")
    in_order = sorted({(str(cell.labels.get("measure")), cell.key) for cell in cells})
    own = {key for place, (_, key) in enumerate(in_order) if place % of == number - 1}
    return [cell for cell in cells if cell.key in own]


def planned(cells: Sequence[Cell], results: Results, *, fresh: bool, retry: bool) -> Table:
    """A row for each cell: whether it is there already, and about how long it will take.

    The time is that of cells that ran before, into the same file: with the same measure and attention, or else with the
    same measure.
    """
    table = Table("Cells", "", ["state", "cell", "about, seconds"])
    total, unknown, to_run = 0.0, 0, 0
    for cell in cells:
        state = state_of(cell, results, fresh=fresh, retry=retry)
        about = estimate(cell, results) if state not in ("done", "failed") else 0.0
        to_run += state not in ("done", "failed")
        total, unknown = total + (about or 0.0), unknown + (about is None)
        table.rows.append([state, str(cell), "" if about == 0 else "unknown" if about is None else f"{about:.0f}"])
    table.note = f"{to_run} of {len(cells)} cells are to be run"
    if to_run:
        known = (
            f"about {total / 60:.1f} minutes, by cells that ran before" if to_run > unknown else "nobody knows how long"
        )
        more = f", and {unknown} of which none has run" if 0 < unknown < to_run else ""
        table.note += f": {known}{more}"
    table.note += "."
    return table


def state_of(cell: Cell, results: Results, *, fresh: bool = False, retry: bool = True) -> str:
    """done, failed (and left so), again (it failed, is of other versions, or all is measured anew), or to do."""
    if cell.key not in results.records:
        return "to do"
    if fresh:
        return "again"
    if results.done(cell.key):
        return "done"
    return "failed" if results.failed(cell.key) and not retry else "again"


def estimate(cell: Cell, results: Results) -> float | None:
    """Seconds that a cell may take; None where none of its measure has run."""
    labels = cell.labels
    same = [one for one in results.records.values() if "seconds" in one and one["status"] == "ok"]
    same = [one for one in same if one.get("measure") == labels.get("measure")]
    closer = [one for one in same if one.get("attention") == labels.get("attention")]
    found = [one["seconds"] for one in closer or same]
    return statistics.mean(found) if found else None
