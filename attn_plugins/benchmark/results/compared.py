"""What changed between two runs: figure by figure, beside the noise that is known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attn_plugins.benchmark.results.schema import LABELS, PLACE
from attn_plugins.benchmark.results.statistics import difference, spelled
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import Table, brief_number
from attn_plugins.tasks import get_task, list_tasks
from attn_plugins.training.resume import differences

Record = dict[str, Any]

COUNTED = ("bytes", "peak_bytes", "launches", "least_seconds")
"""Figures of cost without noise."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a cell."""

    value: float
    lowest: float | None = None
    highest: float | None = None
    """Of the rounds in which it was timed; None for what was not timed."""
    counted: bool = False
    """Without noise."""


@dataclass
class Run:
    """The results of a run, by cells as people name them."""

    results: Results
    cells: dict[str, dict[Any, Record]] = field(default_factory=dict)
    """Name of the cell -> seed -> its record; where settings have changed those of the last ones alone."""

    def __post_init__(self) -> None:
        for record in sorted(self.results.records.values(), key=lambda record: str(record.get("finished", ""))):
            seeds = self.cells.setdefault(name_of(record), {})
            if any(other.get("settings") != record.get("settings") for other in seeds.values()):
                seeds.clear()
            seeds[record.get("seed")] = record


def name_of(record: Record) -> str:
    """A record's cell without its seed: model · attention · measure."""
    settings = record.get("settings", {})
    words = [record[name] for name in LABELS if name in record] + [settings[name] for name in PLACE if name in settings]
    return " · ".join(map(str, words)) or record["key"]


def figures_of(record: Record) -> dict[str, Figure]:
    """Name -> figure, of what a cell's tables are made of; nothing of one that failed."""
    result = record.get("result", {})
    if "value" in result:
        found = {result["metric"]: Figure(value=result["value"])}
        for task, figures in result.get("others", {}).items():
            metric = get_task(task).metric if task in list_tasks() else None
            if metric in figures:
                found[f"{task}: {metric}"] = Figure(value=figures[metric])
        return found
    passes = result.get("passes", {"": result})
    return {
        f"{which} {name}".strip(): _timed(figures, name)
        for which, figures in passes.items()
        for name in ("times_as_fast", *COUNTED)
        if name in figures
    }


def _timed(figures: Mapping[str, Any], name: str) -> Figure:
    rounds = (figures.get("lowest"), figures.get("highest")) if name == "times_as_fast" else (None, None)
    return Figure(value=figures[name], lowest=rounds[0], highest=rounds[1], counted=name in COUNTED)


def shown_figures(record: Record) -> str:
    """A record's figures in one line, or why it has none."""
    if "error" in record:
        return f"{record['status']}: {record['error']}"
    return ", ".join(f"{name} {brief_number(one.value)}" for name, one in figures_of(record).items())


def show_table(results: Results) -> Table:
    """A row for each record, in the order in which they were measured."""
    stale = set(results.stale(results.records))
    note = f"{len(results.records)} cells of {results.path}"
    note += f"; {len(stale)} are stale: of other versions than those at work now" if stale else ""
    table = Table("Cells", f"{note}.", ["cell", "seed", "figures", "seconds", "finished"], aside=("finished",))
    for key, record in results.records.items():
        seconds = "" if "seconds" not in record else f"{record['seconds']:.0f}"
        shown = shown_figures(record) + (" (stale)" if key in stale else "")
        table.rows.append([name_of(record), str(record.get("seed", "")), shown, seconds, record.get("finished", "")])
    return table


def diff_tables(one: Results, other: Results) -> list[Table]:
    """What changed from ``one`` to ``other``, what did not, and which cells one of them alone has."""
    first, second = Run(one), Run(other)
    both = [name for name in first.cells if name in second.cells]
    changed = Table(
        "Changed",
        "B minus A ± standard error over the seeds that both have, by a paired t test (of other seeds: Welch's), "
        "two-sided. Of what was timed: whether the ranges of the rounds lie apart. Bytes are counted, without noise.",
        ["cell", "figure", "A", "B", "B - A", "what else differs"],
        aside=("what else differs",),
    )
    same = 0
    for name in both:
        rows = _rows(name, first.cells[name], second.cells[name])
        same += not rows
        changed.rows += rows
    changed.note += f" {same} of {len(both)} cells that both have are the same." if both else " They share no cell."
    alone = Table("In one of them alone", "These have nothing to be compared with.", ["cell", "in", "figures"])
    for run, others, place in ((first, second, "A"), (second, first, "B")):
        for name, records in run.cells.items():
            if name not in others.cells:
                alone.rows.append([name, place, "; ".join(map(shown_figures, records.values()))])
    return [changed, *([alone] if alone.rows else [])]


def _rows(name: str, one: dict[Any, Record], other: dict[Any, Record]) -> list[list[str]]:
    """The figures of a cell that changed; a row for an outcome that did."""
    outcomes = [next((shown_figures(its) for its in run.values() if "error" in its), "ok") for run in (one, other)]
    also = _also(one, other)
    if outcomes[0] != outcomes[1]:
        return [[name, "outcome", *outcomes, "", also]]
    found = [{seed: figures_of(record) for seed, record in run.items()} for run in (one, other)]
    names = dict.fromkeys(figure for run in found for figures in run.values() for figure in figures)
    rows = []
    for figure in names:
        a, b = ({seed: its[figure] for seed, its in run.items() if figure in its} for run in found)
        if not a or not b:
            continue
        values = [{seed: its.value for seed, its in side.items()} for side in (a, b)]
        if values[0] != values[1]:
            shown = [spelled(list(side.values())) for side in values]
            rows.append([name, figure, *shown, _told(a, b, values), also])
    return rows


def _told(a: dict[Any, Figure], b: dict[Any, Figure], values: list[dict[Any, float]]) -> str:
    """How far b is above a, and whether by noise."""
    one, other = next(iter(a.values())), next(iter(b.values()))
    if None not in (one.lowest, one.highest, other.lowest, other.highest):
        apart = one.highest < other.lowest or other.highest < one.lowest  # type: ignore[operator]
        return f"{other.value - one.value:+.2f} ({'beyond' if apart else 'within'} the rounds' spread)"
    if one.counted and one.value:
        return f"{(other.value / one.value - 1) * 100:+.1f} %"
    return str(difference(values[1], values[0]))


def _also(one: dict[Any, Record], other: dict[Any, Record]) -> str:
    """Which settings, versions and contents differ between the runs of a cell."""
    a, b = (next(iter(run.values())) for run in (one, other))
    shared = next((seed for seed in one if seed in other), None)
    if shared is not None:
        a, b = one[shared], other[shared]
    found = []
    for what, many in (("settings", "settings"), ("versions", "versions"), ("hashes", "contents of")):
        names = differences(a.get(what, {}), b.get(what, {})) if a.get(what) and b.get(what) else []
        if names:
            found.append(f"{many} {', '.join(names[:4])}{' and more' if len(names) > 4 else ''}")
    return "; ".join(found)
