"""The leaderboard: a line a row of each group, with what it sorts and filters by."""

from dataclasses import dataclass
from typing import Any

from attn_plugins.benchmark.compare.report import STAGES
from attn_plugins.benchmark.html.details import row_facts
from attn_plugins.benchmark.html.figures import place_words, sentence
from attn_plugins.benchmark.html.groups import CACHE, MEMORY, STEP, TIME, TOKEN, Cost, Group, Row
from attn_plugins.benchmark.html.noise import beside, share
from attn_plugins.benchmark.results.tables import brief_number, duration

MOST_OTHERS = 6
"""So many tasks beside the first have columns; all of them stand in a row's details."""

COLUMNS = {
    CACHE: "cache, MiB",
    TIME: "times as fast",
    TOKEN: "a token, times as fast",
    STEP: "a step, times as fast",
    MEMORY: "memory, MiB",
}
"""Costs in the order of their columns."""

NOTE = (
    "± is the standard error over seeds. Beside: the change of the figure at the same stage, + is better; ≈ is within "
    "the noise (paired t test over seeds, p above 0.05), ~ where seeds tell no noise. "
)


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard."""

    group: Group
    row: Row


def entries(groups: list[Group]) -> list[Entry]:
    return [Entry(group, row) for group in groups for row in group.rows]


def board(groups: list[Group], rows: list[Entry]) -> dict[str, Any]:
    """Columns, lines, filters and the note below, and ``details`` of each line."""
    wide = _Board(groups)
    best = {id(row) for group in groups for row in _best(group)}
    return {
        "columns": wide.columns,
        "rows": [
            {
                "status": one.row.status.replace(" ", "-"),
                "by": wide.by(one),
                "cells": wide.cells(one, id(one.row) in best),
            }
            for one in rows
        ],
        "filters": wide.filters(rows),
        "note": NOTE + wide.places(),
        "details": [
            {
                "title": f"{one.row.attention}, {one.row.stage}",
                "facts": row_facts(one.group, one.row),
                "cells": [record["key"] for record in (*one.row.records, *one.row.missing)]
                + [
                    record["key"]
                    for record in one.group.cost_records
                    if record["attention"] == one.row.attention and record not in one.row.records
                ],
            }
            for one in rows
        ],
    }


class _Board:
    """Which columns there are depends on what any row has."""

    def __init__(self, groups: list[Group]):
        self.groups = groups
        rows = [row for group in groups for row in group.rows]
        bases = {group.baseline for group in groups}
        self.base = bases.pop() if len(bases) == 1 else "baseline"
        self.several = {
            "model": len({group.model for group in groups}) > 1,
            "part": any(group.part for group in groups),
            "run": len({group.run for group in groups}) > 1,
        }
        self.metrics = list(dict.fromkeys(group.metric for group in groups if group.metric))
        others = list(dict.fromkeys(name for row in rows for name in row.others))
        self.others = others if len(others) <= MOST_OTHERS else []
        self.costs = [cost for cost in COLUMNS if any(group.at(n, cost) for group in groups for n in group.attentions)]
        self.trained = any("train" in result for row in rows for result in row.results.values())

    @property
    def columns(self) -> list[dict[str, Any]]:
        def column(name: str, number: bool = False, first: int = 1, title: str = "") -> dict[str, Any]:
            return {"name": name, "number": number, "first": first, "title": title}

        lower = all(group.lower for group in self.groups if group.metric)
        found = [column("Attention"), column("Stage")]
        found += [column(name.capitalize()) for name, there in self.several.items() if there]
        found.append(column("Family"))
        if self.metrics:
            one = self.metrics[0] if len(self.metrics) == 1 else "figure"
            found.append(column(one, True, 1 if lower else -1, "lower is better" if lower else "mean over seeds"))
            found.append(column(f"beside {self.base}", True, -1, "change of the figure; + is better"))
        found += [column(name, True, -1) for name in self.others]
        found += [column(COLUMNS[cost], True, -1 if cost.ratio else 1) for cost in self.costs]
        return found + ([column("training", True)] if self.trained else [])

    def by(self, one: Entry) -> dict[str, str]:
        """What a line is filtered by."""
        group, row = one.group, one.row
        return {
            "model": group.model,
            "part": group.part or "",
            "run": group.run,
            "stage": row.stage,
            "family": row.family,
            "state": row.status,
        }

    def filters(self, rows: list[Entry]) -> list[tuple[str, str, list[str]]]:
        found = []
        for name in ("model", "part", "run", "stage", "family", "state"):
            values = list(dict.fromkeys(self.by(one)[name] for one in rows))
            if name == "family":
                values = sorted({its for value in values for its in value.split(" + ")})
            if len(values) > 1:
                found.append((name, name.capitalize(), [value for value in values if value]))
        return found

    def cells(self, one: Entry, best: bool) -> list[dict[str, Any]]:
        group, row = one.group, one.row
        found = [_cell(row.attention, row.attention), _cell(row.stage, f"{_order(row.stage)} {row.stage}", "name")]
        names = {"model": group.model, "part": group.part or "", "run": group.run}
        found += [_cell(names[name], names[name], "name") for name, there in self.several.items() if there]
        found.append(_cell(row.family, row.family, "faint"))
        if self.metrics:
            found += self._quality(group, row, best)
        others = row.others
        found += [_number(others[name].mean, str(others[name])) if name in others else _none() for name in self.others]
        found += [_cost(group, row, cost) for cost in self.costs]
        if self.trained:
            seconds = [its for result in row.results.values() if (its := result.get("train", {}).get("seconds"))]
            mean = sum(seconds) / len(seconds) if seconds else None
            found.append(_none() if mean is None else _number(mean, duration(mean)))
        return found

    def _quality(self, group: Group, row: Row, best: bool) -> list[dict[str, Any]]:
        figure = row.figure
        if figure is None:
            if row.status == "ok":
                return [_none(), _none()]
            state = "failed" if row.status == "failed" else "missing"
            why = "" if row.status == "not run" else row.note
            return [_cell(row.status, "", f"n why {state}", why if len(why) < 160 else f"{why[:160]}…"), _none()]
        small = [] if len(self.metrics) == 1 else [str(group.metric) + (" ↓" if group.lower else " ↑")]
        small += [row.note] if row.note else []
        own = _number(figure.mean, str(figure), ", ".join(small) or None)
        own["classes"] += " best" if best else ""
        base = group.base(row)
        if base is None or base.figure is None or row.attention == group.baseline:
            return [own, _none()]
        gap = beside(row, base, group.lower)
        if gap is None:
            return [own, _none()]
        shown = _number(gap.change, str(gap))
        shown["classes"] += {"better": " good", "worse": " bad"}.get(gap.verdict, "")
        return [own, shown]

    def places(self) -> str:
        """Where costs were measured."""
        told = []
        for cost in self.costs:
            places = list(dict.fromkeys(p for group in self.groups if (p := group.place(cost)) is not None))
            shown = "; ".join(place_words(place) for place in places[:3])
            others = " and others, by model" if len(places) > 3 else ""
            name = {TIME: "Times as fast: ", MEMORY: "Memory: "}.get(cost, "")
            told.append(sentence(f"{name}{shown}{others}"))
        return " ".join(told)


def _best(group: Group) -> list[Row]:
    """The row with the best figure of each stage that has several."""
    stages = [row.stage for row in group.ranked]
    best = {row.stage: row for row in reversed(group.ranked)}
    return [row for stage, row in best.items() if stages.count(stage) > 1]


def _order(stage: str) -> int:
    stages = list(STAGES.values())
    return stages.index(stage) if stage in stages else len(stages)


def _cell(text: str, value: str, classes: str = "", small: str | None = None) -> dict[str, Any]:
    return {"text": text, "value": value, "classes": classes, "small": small, "title": ""}


def _number(value: float, text: str, small: str | None = None) -> dict[str, Any]:
    return _cell(text, repr(float(value)), "n", small)


def _none() -> dict[str, Any]:
    return _cell("", "", "n")


def _cost(group: Group, row: Row, cost: Cost) -> dict[str, Any]:
    its, base = group.at(row.attention, cost), group.at(group.baseline, cost)
    if its is None:
        return _none()
    if cost.ratio:
        rounds = f"rounds: {its['lowest']:.2f} to {its['highest']:.2f}"
        return _number(its["times_as_fast"], f"{its['times_as_fast']:.2f}\u00d7") | {"title": rounds}
    of_base = share(its["bytes"] / base["bytes"]) if base else None
    return _number(its["bytes"], brief_number(its["bytes"] / 2**20), of_base)
