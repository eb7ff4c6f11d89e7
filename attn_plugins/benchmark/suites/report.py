"""What a suite found: one report with a summary and a section a part. Everything comes from results.jsonl."""

import statistics
from pathlib import Path

from attn_plugins.benchmark.compare.report import STAGES, CompareResults, draw, facts, tables
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import Table, brief_number
from attn_plugins.benchmark.suites.config import Suite


def write_suite_report(suite: Suite, results: Results) -> tuple[list[Table], list[Path]]:
    """The summary and each part's tables, and report.md and the plots beside results.jsonl.

    Returns:
        (the tables, the files that were written)

    Raises:
        ValueError: matplotlib is not installed.
    """
    out = results.path.parent
    out.mkdir(parents=True, exist_ok=True)
    found = [(part, CompareResults(config, results)) for part, config in suite.parts]
    summary = summary_table(found)
    shown = [summary]
    lines = [f"# Suite {suite.name}", "", suite.description.strip(), "", summary.markdown(), ""]
    if suite.left_out:
        note = "Parts that are not for a model, and rows of a preset that its sizes do not allow."
        left = Table("Left out", note, ["part", "model", "why"])
        left.rows = [list(row) for row in suite.left_out]
        shown.append(left)
        lines += [left.markdown(), ""]
    plots: list[Path] = []
    last = None
    for part, its in found:
        several = sum(name == part for name, _ in found) > 1
        drawn = draw(its, out, part)
        plots += drawn
        lines += [] if part == last else [f"## {part}", ""]
        for table in tables(its):
            lines += [table.markdown(3), ""]
            table.title = f"{part}: {table.title}" + (f", {next(iter(its.config.models))}" if several else "")
            shown.append(table)
        lines += [f"![{plot.stem.replace('_', ' ')}]({plot.name})\n" for plot in drawn]
        lines += ["<details><summary>Settings</summary>", "", *facts(its), "", "</details>", ""]
        last = part
    report = out / "report.md"
    report.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return shown, [report, *plots]


def summary_table(found: list[tuple[str, CompareResults]]) -> Table:
    """One row an attention, of each model, with each part's figure at the last stage that it has."""
    parts = list(dict.fromkeys(part for part, _ in found))
    heads = {part: _heading(its) for part, its in reversed(found)}
    models = list(dict.fromkeys(model for _, its in found for model in its.config.models))
    attentions = list(dict.fromkeys(label for _, its in found for label in its.config.attentions))
    notes = [f"{part}: {heads[part][1]}" for part in parts]
    header = [*(["model"] if len(models) > 1 else []), "attention", *(f"{part}, {heads[part][0]}" for part in parts)]
    table = Table("Summary", f"{'; '.join(notes)}. Each at the last stage that the part has.", header)
    for model in models:
        for attention in attentions:
            row = [_figure(found, part, model, attention) for part in parts]
            if any(row):
                table.rows.append([*([model] if len(models) > 1 else []), attention, *row])
    return table


def _heading(its: CompareResults) -> tuple[str, str]:
    """(name of a part's figure, what it means)."""
    if any(cell.measure in STAGES for cell in its.cells):
        task = its.config.task
        return task.metric, f"{task.name}, {task.better} is better"
    if its.config.speed is not None:
        return "times as fast", f"as {its.config.baseline}, {_place(its)}"
    return "", "no figure of its own"


def _place(its: CompareResults) -> str:
    assert its.config.speed is not None
    scope, lengths = next(iter(its.config.speed.lengths.items()))
    return f"{scope}, {its.config.speed.passes_of(scope)[-1].replace('_', ' + ')}, {max(lengths)} tokens"


def _figure(found: list[tuple[str, CompareResults]], part: str, model: str, attention: str) -> str:
    for name, its in found:
        if name != part or model not in its.config.models or attention not in its.config.attentions:
            continue
        if its.config.speed is not None and not any(cell.measure in STAGES for cell in its.cells):
            scope, lengths = next(iter(its.config.speed.lengths.items()))
            place = (scope, max(lengths), its.config.speed.passes_of(scope)[-1])
            ratio = its.pass_value(model, attention, "speed", place, "times_as_fast")
            return "" if ratio is None else f"{ratio:.2f}x"
        for stage in reversed(STAGES):
            records = its.of(model, attention, stage)
            values = [record["result"]["value"] for record in records if record["status"] == "ok"]
            if values:
                return brief_number(statistics.mean(values))
            if records:
                return "error"
    return ""
