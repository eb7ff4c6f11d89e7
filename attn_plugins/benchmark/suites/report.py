"""What a suite found: one report with a summary and a section a part. Everything comes from results.jsonl."""

import operator
from pathlib import Path

from attn_plugins.benchmark.compare.report import CompareResults, draw, facts, tables
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import Table
from attn_plugins.benchmark.suites.config import Suite
from attn_plugins.benchmark.suites.summary import summary_table

_recalls = operator.attrgetter("recalls")


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
    recalling = {model for _, config in suite.parts for model in config.models if any(map(_recalls, config.tasks))}
    for _, its in found:
        its.recall_elsewhere = set(its.config.models) <= recalling
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
            table.title += f", {next(iter(its.config.models))}" if several else ""
            lines += [table.markdown(3), ""]
            table.title = f"{part}: {table.title}"
            shown.append(table)
        lines += [f"![{plot.stem.replace('_', ' ')}]({plot.name})\n" for plot in drawn]
        lines += ["<details><summary>Settings</summary>", "", *facts(its), "", "</details>", ""]
        last = part
    report = out / "report.md"
    report.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return shown, [report, *plots]
