"""The first table of a suite's report: a row an attention, with the figures that stand for its parts."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from attn_plugins.benchmark.compare.cost_table import figures
from attn_plugins.benchmark.compare.report import PASSES, SCOPES, STAGES, CompareResults
from attn_plugins.benchmark.results.tables import Table, brief_number

COSTS = {
    "cache": "share of {base}'s bytes",
    "decode": "times as fast as {base}",
    "step": "times as fast as {base}",
}
"""What of the costs stands in the table, and as what."""
NAMES = {"cache": "cache", "decode": "a token", "step": "a training step"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure of a part."""

    heading: str
    note: str
    show: Callable[[CompareResults, str, str], str]
    """(results of the part, model, attention) -> what stands in the cell, empty where it was not asked for."""


def summary_table(found: list[tuple[str, CompareResults]]) -> Table:
    """One row an attention, of each model, with each part's figure at the last stage that it has.

    Args:
        found: name of each part and its results; a name comes again where models differ in their attentions.
    """
    told = [(its, column) for part, its in found for column in _columns(part, its)]
    parts = [part for part, _ in found]
    told.sort(key=lambda one: one[1].heading not in parts)  # quality first, costs after it
    columns: dict[str, list[tuple[CompareResults, Column]]] = {}
    for its, column in told:
        columns.setdefault(column.heading, []).append((its, column))
    models = list(dict.fromkeys(model for _, its in found for model in its.config.models))
    attentions = list(dict.fromkeys(label for _, its in found for label in its.config.attentions))
    several = len(models) > 1
    header = [*(["model"] if several else []), "attention", *columns]
    notes = "; ".join(f"{heading}: {column.note}" for heading, ((_, column), *_) in columns.items())
    table = Table("Summary", f"Each part at the last stage that it has. {notes}.", header)
    for model in models:
        for attention in attentions:
            row = [_shown(asked, model, attention) for asked in columns.values()]
            if any(row):
                table.rows.append([*([model] if several else []), attention, *row])
    return table


def _shown(asked: list[tuple[CompareResults, Column]], model: str, attention: str) -> str:
    """A cell of a column, of the first part that has it: costs are a column of all parts that ask for them."""
    for its, column in asked:
        if model in its.config.models and attention in its.config.attentions:
            shown = column.show(its, model, attention)
            if shown:
                return shown
    return ""


def _columns(part: str, its: CompareResults) -> list[Column]:
    config, found = its.config, []
    if any(cell.measure in STAGES for cell in its.cells):
        task = config.task
        what = task.metric if task.metric == task.name else f"{task.metric} of {task.name}"
        note = f"{what}, {task.better} is better"
        found.append(Column(heading=part, note=note, show=_quality))
    elif config.speed is not None:
        scope, length, which = _place(its)
        note = f"times as fast as {config.baseline}, {SCOPES[scope]}, {PASSES[which]}, {length} tokens"
        found.append(Column(heading=f"{SCOPES[scope]} at {length}", note=note, show=_speed))
    if config.cost is not None:
        length = max(config.cost.lengths)
        for what in (one for one in COSTS if one in config.cost.what):
            note = COSTS[what].format(base=config.baseline)
            found.append(Column(heading=f"{NAMES[what]} at {length}", note=note, show=_cost(what, length)))
    return found


def _quality(its: CompareResults, model: str, attention: str) -> str:
    failed = ""
    for stage in reversed(STAGES):
        records = its.of(model, attention, stage)
        values = [record["result"]["value"] for record in records if record["status"] == "ok"]
        if values:
            return brief_number(statistics.mean(values))
        failed = failed or (records[0]["status"] if records else "")
    return failed


def _place(its: CompareResults) -> tuple[str, int, str]:
    assert its.config.speed is not None
    scope, lengths = next(iter(its.config.speed.lengths.items()))
    return scope, max(lengths), its.config.speed.passes_of(scope)[-1]


def _speed(its: CompareResults, model: str, attention: str) -> str:
    ratio = its.pass_value(model, attention, "speed", _place(its), "times_as_fast")
    return "" if ratio is None else f"{ratio:.2f}x"


def _cost(what: str, length: int) -> Callable[[CompareResults, str, str], str]:
    def show(its: CompareResults, model: str, attention: str) -> str:
        own = figures(its, model, attention, what, length)
        if own is None:
            return ""
        if what != "cache":
            return f"{own['times_as_fast']:.2f}x"
        base = figures(its, model, its.config.baseline, what, length)
        return "" if base is None else f"{own['bytes'] / base['bytes']:.3f}"

    return show
