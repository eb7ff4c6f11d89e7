"""report.html: groups of runs as one file, with styles, script, data and plotly.js, which is 5 MB of it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.report import STAGES
from attn_plugins.benchmark.contenders import LEFT_OUT
from attn_plugins.benchmark.html.board import board, entries
from attn_plugins.benchmark.html.details import cell_details, hardware_words, rules_text
from attn_plugins.benchmark.html.figures import figures_of
from attn_plugins.benchmark.html.groups import Group, groups_of
from attn_plugins.benchmark.html.runs import PLAN, Run, read_planned, told_apart, write_plan
from attn_plugins.benchmark.html.summary import summary_of
from attn_plugins.benchmark.results.store import Results
from attn_plugins.config.extras import need
from attn_plugins.config.versions import spelled, spelled_own, versions

TEMPLATES = Path(__file__).parent / "templates"

SECTIONS = {
    "cost": "Quality against cost",
    "curves": "By length and by distance",
    "maps": "What was chosen",
    "training": "Training",
}
"""Sections of figures, by the name that figures have for theirs."""


def write_page(runs: list[Run], path: Path) -> Path:
    """Write the page of these runs.

    Returns:
        ``path``.

    Raises:
        ValueError: plotly or jinja2 is not installed.
    """
    get_plotlyjs = need("plotly.offline", "compare").get_plotlyjs
    jinja2 = need("jinja2", "compare")
    markup = need("markupsafe", "compare").Markup
    loader = jinja2.FileSystemLoader(TEMPLATES)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "page.html"
    )
    css, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    shown = context(runs)
    data = jinja2.utils.htmlsafe_json_dumps(_finite(shown.pop("data")), dumps=json.dumps, allow_nan=False)
    text = page.render(**shown, data=data, css=markup(css), script=markup(script), plotly=markup(get_plotlyjs()))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def write_run_page(parts: Sequence[tuple[str | None, CompareConfig]], results: Results) -> Path:
    """Write report.html beside the results of one run, with its plan, for pages to come.

    Args:
        parts: names of the parts of a suite, or None, with their comparisons.

    Raises:
        ValueError: plotly or jinja2 is not installed.
    """
    folder = results.path.parent
    write_plan(folder, parts)
    return write_page([read_planned(folder.resolve().name, results, folder / PLAN)], folder / "report.html")


def context(runs: list[Run]) -> dict[str, Any]:
    """What the template shows."""
    runs = told_apart(runs)
    groups = [group for run in runs for group in groups_of(run, len(runs) > 1)]
    drawn = [figures_of(group) for group in groups]
    rows = entries(groups)
    shown = board(groups, rows)
    sections = [
        (name, title) for name, title in SECTIONS.items() if any(f["section"] == name for fs in drawn for f in fs)
    ]
    cells = {key: cell for group in groups for key, cell in cell_details(group).items()}
    return {
        "title": _title(groups),
        "version": versions()["attn_plugins"],
        "facts": _facts(runs, groups),
        "sections": sections,
        "summaries": [{**summary_of(group), "metric": group.metric, "baseline": group.baseline} for group in groups],
        **shown,
        "groups": [group.label for group in groups],
        "measured": _measured(runs),
        "attentions": [{"label": group.label, "rules": rules_text(group)} for group in groups],
        "data": {
            "columns": shown["columns"],
            "rows": [{name: row[name] for name in ("title", "facts", "cells")} for row in shown["details"]],
            "cells": cells,
            "groups": [
                {
                    "label": group.label,
                    "attentions": _numbered(group),
                    "stages": [stage for stage in STAGES.values() if any(row.stage == stage for row in group.measured)],
                    "figures": figures,
                }
                for group, figures in zip(groups, drawn, strict=True)
            ],
        },
    }


def _numbered(group: Group) -> list[tuple[str, int]]:
    """Attentions with the number of their colour and marker; the baseline's is -1."""
    others = [name for name in group.attentions if name != group.baseline]
    drawn = {row.attention for row in group.measured}.union(*group.costs.values())
    return [(name, others.index(name) if name in others else -1) for name in group.attentions if name in drawn]


def _title(groups: list[Group]) -> str:
    models = list(dict.fromkeys(group.model for group in groups))
    return (
        f"Attentions compared: {', '.join(models)}"
        if len(models) < 4
        else f"Attentions compared on {len(models)} models"
    )


def _facts(runs: list[Run], groups: list[Group]) -> list[str]:
    # a cell of several parts is one
    records = [record for run in runs for record in {one["key"]: one for one in run.records}.values()]
    missing = sum(len({one["key"] for one in run.planned}) for run in runs)
    states = [record["status"] for record in records]
    seeds = len({record["seed"] for record in records})
    attentions = len({name for group in groups for name in group.attentions})
    dates = sorted(record["finished"][:10] for record in records if "finished" in record)
    devices = dict.fromkeys(record.get("versions", {}).get("device", "") for record in records)
    facts = [
        f"{states.count('ok')} of {len(records) + missing} cells measured",
        *(
            f"{number} {words}"
            for words, number in (
                ("failed", states.count("error")),
                ("left out", states.count(LEFT_OUT)),
                ("not run", missing),
            )
            if number
        ),
        _counted(attentions, "attention"),
        *([_counted(seeds, "seed")] if seeds else []),
        *([dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"] if dates else []),
        *(device for device in devices if device),
    ]
    return facts


def _measured(runs: list[Run]) -> list[str]:
    lines = []
    for run in runs:
        name = f"{run.label}: " if len(runs) > 1 else ""
        made: dict[str, int] = {}
        for record in {one["key"]: one for one in run.records}.values():
            told = spelled(record["versions"]) if "versions" in record else "versions that were not recorded"
            made[told] = made.get(told, 0) + 1
        lines += [f"{name}{_counted(number, 'cell')} with {words}." for words, number in made.items()]
        seconds = sum({one["key"]: one.get("seconds", 0) for one in run.records}.values())
        lines.append(f"{name}{seconds / 60:.1f} minutes for all cells.")
        machines = {repr(sorted(its.items())): its for record in run.records if (its := record.get("hardware"))}
        lines += [f"{name}Machine: {hardware_words(its)}." for its in machines.values()]
    return [*lines, f"This page was made by {spelled_own(versions())}."]


def _finite(tree: Any) -> Any:
    """The same with null for numbers that JSON has no word for."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
