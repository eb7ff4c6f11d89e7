"""The runs that a page is made of: the records of a results.jsonl, and what the run had set out to measure."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.results.store import Results
from attn_plugins.config.yaml import read_json
from attn_plugins.training.evaluate import write_json

PLAN = "plan.json"
"""Beside results.jsonl: all cells of a run, also those that have not run yet, and what they are held against."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one results.jsonl holds, or a part of it that a plan names."""

    label: str
    records: list[dict[str, Any]]
    planned: list[dict[str, Any]]
    """Labels, keys and settings of the cells that have neither a result nor an error."""
    against: dict[str | None, dict[str, Any]] = field(default_factory=dict)
    """Part of a suite, or None -> labels of its ``baseline`` and its ``bar``."""


def write_plan(folder: Path, parts: Sequence[tuple[str | None, CompareConfig]]) -> None:
    """Write down what a run will measure, so that a page can say what is missing wherever the run ends.

    Args:
        parts: names of the parts of a suite, or None, with their comparisons.
    """
    told = [
        {"key": cell.key, **cell.labels, "settings": cell.settings} for part, own in parts for cell in cells(own, part)
    ]
    against = [{"part": part, "baseline": config.baseline, "bar": config.bar} for part, config in parts]
    write_json(folder / PLAN, {"against": against, "cells": told})


def read_run(given: str) -> Run:
    """A run from ``DIR``, ``LABEL=DIR``, or a file of results in place of the folder.

    Raises:
        ValueError: there is no such folder, or no result of a comparison in it.
    """
    label, _, place = ("", "", given) if Path(given).expanduser().exists() else given.rpartition("=")
    path = Path(place).expanduser()
    if path.is_dir():
        path = path / "results.jsonl"
    if not path.is_file():
        raise ValueError(f"{given}: no {path}; allowed: the output_dir of a comparison, or its results.jsonl")
    results = Results(path)
    run = read_planned(label or _named(path), results, path.parent / PLAN)
    if not run.records and not run.planned:
        raise ValueError(f"{path} holds no result of a comparison; allowed: what `attn-plugins compare` wrote")
    return run


def read_planned(label: str, results: Results, plan: Path) -> Run:
    """The run of these results: cells that its plan names, where there is one, or all of a comparison that it holds."""
    compared = {key: record for key, record in results.records.items() if {"model", "measure"} <= set(record)}
    if not plan.is_file():
        return Run(label=label, records=list(compared.values()), planned=[])
    told = read_json(plan)
    try:
        planned = [(cell["key"], {name: its for name, its in cell.items() if name != "key"}) for cell in told["cells"]]
        against = {one["part"]: one for one in told["against"]}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{plan} is not what a comparison wrote; repair it, or move the file away") from None
    return Run(  # a cell of several parts has one record, with the labels of the first
        label=label,
        records=[{**compared[key], **cell} for key, cell in planned if key in compared],
        planned=[{"key": key, **cell} for key, cell in planned if key not in compared],
        against=against,
    )


def told_apart(runs: list[Run]) -> list[Run]:
    """The same runs, with a number after labels that are taken."""
    seen: dict[str, int] = {}
    found = []
    for run in runs:
        seen[run.label] = number = seen.get(run.label, 0) + 1
        found.append(run if number == 1 else dataclasses.replace(run, label=f"{run.label} {number}"))
    return found


def _named(path: Path) -> str:
    return path.resolve().parent.name if path.name == "results.jsonl" else path.stem
