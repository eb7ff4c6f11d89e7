"""Records as a page asks for them: groups whose rows can be held against each other, and their figures over seeds.

A group is one model in one comparison of one run. Its rows are attentions at a stage; all of a row's seeds are one row.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attn_plugins.benchmark.compare.report import STAGES
from attn_plugins.benchmark.contenders import CONTENDER, LEFT_OUT
from attn_plugins.benchmark.html.runs import Run
from attn_plugins.benchmark.results.statistics import summary
from attn_plugins.benchmark.results.tables import brief_number
from attn_plugins.core.catalogue import declared

Place = tuple[str, int, str]
"""Where a cost was measured: (scope, length, pass)."""


@dataclass(frozen=True)
class Cost:
    """What rows are compared by beside their figure."""

    name: str
    kind: str
    """Measure of its cells, or what they are of, where that is "cost"."""
    ratio: bool = False
    """Times as fast as the baseline; else bytes."""


TIME, TOKEN, STEP = (
    Cost("time", "speed", True),
    Cost("time of a token", "decode", True),
    Cost("time of a step", "step", True),
)
MEMORY, CACHE = Cost("peak memory", "memory"), Cost("cache", "cache")
COSTS = (TIME, TOKEN, STEP, MEMORY, CACHE)

Costs = dict[str, dict[str, dict[Place, dict[str, Any]]]]
"""Kind of cost -> attention -> place -> what was measured there."""

OWN = "own"
"""Family of a model's own attention."""

COST_ALONE, COSTS_MISSING = "cost alone", "costs"
"""Stages of a row whose quality was not measured, and of one of the cells of its costs that have no result."""


@dataclass(frozen=True)
class Figure:
    """Mean over seeds, with its standard error where there are several."""

    values: dict[Any, float]
    """Seed -> what was measured."""

    @property
    def mean(self) -> float:
        return summary(list(self.values.values())).mean

    @property
    def error(self) -> float | None:
        """Standard error of the mean, or None of a single seed."""
        return summary(list(self.values.values())).error

    @property
    def finite(self) -> bool:
        return math.isfinite(self.mean)

    def __str__(self) -> str:
        error = self.error
        return brief_number(self.mean) + (f" ± {brief_number(error)}" if error else "")


@dataclass(kw_only=True)
class Row:
    """An attention of a model at one stage, or the cells of its costs that have no result."""

    attention: str
    stage: str
    family: str
    records: list[dict[str, Any]]
    """Of its seeds; cells that have not run stand in ``missing``."""
    missing: list[dict[str, Any]]

    @functools.cached_property
    def results(self) -> dict[Any, dict[str, Any]]:
        """Seed -> result of the cells that succeeded."""
        return {one["seed"]: one["result"] for one in self.records if one["status"] == "ok"}

    @property
    def figure(self) -> Figure | None:
        values = {seed: result["value"] for seed, result in self.results.items() if "value" in result}
        return Figure(values) if values else None

    @property
    def status(self) -> str:
        """ok, failed, left out, or not run; a row with a figure is ok, however many of its seeds are not."""
        states = {one["status"] for one in self.records}
        if self.figure is not None or (self.stage == COST_ALONE and states == {"ok"} and not self.missing):
            return "ok"
        return "failed" if "error" in states else LEFT_OUT if LEFT_OUT in states else "not run"

    @property
    def note(self) -> str:
        """Why a row has no figure, or how many of its seeds have none; empty where all have."""
        if self.status in ("failed", LEFT_OUT):
            return next(one["error"] for one in self.records if one["status"] != "ok")
        if self.status == "not run":
            return "not run yet"
        lacking = [f"{len(self.missing)} not run"] if self.missing else []
        failed = sum(one["status"] != "ok" for one in self.records)
        lacking += [f"{failed} failed"] if failed else []
        return f"of {len(self.records) + len(self.missing)} seeds, {', '.join(lacking)}" if lacking else ""

    def first(self) -> dict[str, Any]:
        """Result of the first seed that succeeded, or nothing."""
        return next(iter(self.results.values()), {})

    @property
    def others(self) -> dict[str, Figure]:
        """Figures of the tasks beside the first, by the names of their columns."""
        found: dict[str, dict[Any, float]] = {}
        for seed, result in self.results.items():
            for task, figures in result.get("others", {}).items():
                for name, value in _columns(task, figures):
                    found.setdefault(name, {})[seed] = value
        return {name: Figure(values) for name, values in found.items()}


@dataclass(kw_only=True)
class Group:
    """One model in one comparison of one run."""

    run: str
    part: str | None
    model: str
    rows: list[Row]
    costs: Costs
    lent: Costs
    """Costs of the same model and attentions in other parts of the run, for kinds that this part has none of."""
    cost_records: list[dict[str, Any]]
    baseline: str | None
    bar: str | None
    rules: dict[str, Any]
    attentions: list[str]
    """The baseline first."""

    @property
    def label(self) -> str:
        return " · ".join(
            dict.fromkeys([*([self.run] if self.run else []), *([self.part] if self.part else []), self.model])
        )

    @property
    def measured(self) -> list[Row]:
        """The rows that have a figure."""
        return [row for row in self.rows if row.figure is not None]

    @property
    def ranked(self) -> list[Row]:
        """Rows with a finite figure, the best first."""
        found = [(row.figure.mean, row) for row in self.rows if row.figure is not None and row.figure.finite]
        return [row for _, row in sorted(found, key=lambda one: one[0] if self.lower else -one[0])]

    @property
    def metric(self) -> str | None:
        return next((row.first()["metric"] for row in self.measured), None)

    @property
    def lower(self) -> bool:
        """Whether lower figures are better."""
        return any(row.first()["better"] == "lower" for row in self.measured)

    def base(self, row: Row) -> Row | None:
        """The baseline at the same stage, or else as it is without training."""
        found = {one.stage: one for one in self.measured if one.attention == self.baseline}
        return found.get(row.stage, found.get(STAGES["evaluate"]))

    def place(self, cost: Cost) -> Place | None:
        """Where rows are compared by cost: the whole model if measured, the greatest length, forward if measured."""
        places = {place for by_place in self._found(cost).values() for place in by_place}
        return max(places, key=lambda p: (p[0] == "model", p[1], p[2] == "forward"), default=None)

    def _found(self, cost: Cost) -> dict[str, dict[Place, dict[str, Any]]]:
        return self.costs.get(cost.kind) or self.lent.get(cost.kind, {})

    def at(self, attention: str | None, cost: Cost) -> dict[str, Any] | None:
        """What was measured of an attention at the place where rows are compared."""
        place = self.place(cost)
        return None if place is None or attention is None else self._found(cost).get(attention, {}).get(place)

    def cost(self, attention: str | None, cost: Cost) -> float | None:
        """The same as a figure that is better if lower: a multiple of the baseline's time, or bytes."""
        found = self.at(attention, cost)
        if found is None:
            return None
        return 1 / found["times_as_fast"] if cost.ratio else found["bytes"]


def groups_of(run: Run, named: bool) -> list[Group]:
    """The groups of a run, in the order in which its cells stand.

    Args:
        named: whether labels name the run, since a page tells of several.
    """
    found: dict[tuple[str | None, str], list[dict[str, Any]]] = {}
    for cell in [*run.records, *({**cell, "status": None} for cell in run.planned)]:
        found.setdefault((cell.get("part"), cell["model"]), []).append(cell)
    groups = [
        _group(run.label if named else "", part, model, cells, run.against.get(part, {}))
        for (part, model), cells in found.items()
    ]
    for group in groups:
        for other in groups:
            if (other.model, other.baseline) == (group.model, group.baseline) and other is not group:
                for kind, its in other.costs.items():
                    of_both = {
                        name: places for name, places in its.items() if other.rules[name] == group.rules.get(name)
                    }
                    group.lent.setdefault(kind, of_both)
    return groups


def _group(run: str, part: str | None, model: str, cells: list[dict[str, Any]], against: dict[str, Any]) -> Group:
    baseline = against.get("baseline") or _baseline(cells)
    names = list(dict.fromkeys([*([baseline] if baseline else []), *(cell["attention"] for cell in cells)]))
    names = [name for name in names if any(cell["attention"] == name for cell in cells)]
    costs: Costs = {}
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    cost_cells = []
    for cell in cells:
        settings = cell["settings"]
        if cell["measure"] not in ("speed", "memory", "cost"):
            rows.setdefault((cell["attention"], STAGES.get(cell["measure"], cell["measure"])), []).append(cell)
            continue
        cost_cells.append(cell)
        kind = settings.get("what", cell["measure"])
        if cell["status"] != "ok":
            rows.setdefault((cell["attention"], COSTS_MISSING), []).append(cell)
            continue
        passes = cell["result"].get("passes", {kind: cell["result"]})
        for which, figures in passes.items():
            place = (settings.get("scope", "model"), settings["length"], which)
            costs.setdefault(kind, {}).setdefault(cell["attention"], {})[place] = figures
    for name in names:
        if not any(attention == name for attention, _ in rows):
            rows[name, COST_ALONE] = [cell for cell in cost_cells if cell["attention"] == name]
    order = [*STAGES.values(), COST_ALONE, COSTS_MISSING]
    keys = sorted(rows, key=lambda key: (names.index(key[0]), order.index(key[1]) if key[1] in order else 9))
    return Group(
        run=run,
        part=part,
        model=model,
        rows=[_row(attention, stage, rows[attention, stage]) for attention, stage in keys],
        costs=costs,
        lent={},
        cost_records=[cell for cell in cost_cells if cell["status"] is not None],
        baseline=baseline,
        bar=against.get("bar"),
        rules={cell["attention"]: cell["settings"].get("rules") for cell in reversed(cells)},
        attentions=names,
    )


def _row(attention: str, stage: str, cells: list[dict[str, Any]]) -> Row:
    done = [cell for cell in cells if cell["status"] is not None]
    missing = [cell for cell in cells if cell["status"] is None]
    rules = cells[0]["settings"].get("rules")
    return Row(attention=attention, stage=stage, family=family(rules), records=done, missing=missing)


def _baseline(cells: list[dict[str, Any]]) -> str | None:
    """Label of what speed was compared with, or else of the model's own attention."""
    rules = {cell["attention"]: cell["settings"].get("rules") for cell in cells}
    for cell in cells:
        if "baseline" in cell["settings"]:
            base = cell["settings"]["baseline"]
            return next((name for name, own in rules.items() if own == base), None)
    return next((name for name, own in rules.items() if own is None), None)


@functools.cache
def _families() -> dict[str, str]:
    return {one["name"]: one["family"] for one in declared(("family",))}


def family(rules: Any) -> str:
    """Families of the attentions that rules name; those of a choice are of what is not chosen."""
    if isinstance(rules, dict) and "choose" in rules:
        rules = rules["choose"]["attention"]
    if isinstance(rules, dict) and CONTENDER in rules:
        return "other libraries"
    if isinstance(rules, dict):
        rules = [rules]
    if not isinstance(rules, list):
        return OWN if rules is None else str(rules)
    names = [str(rule.get("type")) for rule in rules if isinstance(rule, dict)]
    return " + ".join(dict.fromkeys(_families().get(name, name).replace("_", " ") for name in names)) or OWN


def _columns(task: str, figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    parts = figures.get("by_part") or {}
    metric = metric_of(task)
    for name, its in parts.items() if len(parts) > 1 else [(task, figures)]:
        value = its.get(metric) if metric else next((v for v in its.values() if isinstance(v, float)), None)
        if isinstance(value, (int, float)):
            yield name, value


@functools.cache
def metric_of(task: str) -> str | None:
    """The figure that stands for a task, or None of one that is not installed."""
    from attn_plugins.tasks import get_task

    try:
        return get_task(task).metric
    except ValueError:
        return None
