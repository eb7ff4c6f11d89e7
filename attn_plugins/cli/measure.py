"""Verbs that measure attentions beside each other: compare, bench."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_plugins.cli.app import ConfigFile, OutputDir, Settings, app, one_line_errors, settings, show, spread_out
from attn_plugins.cli.stop import stoppable
from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.config.yaml import override, parse_yaml
from attn_plugins.core.options import build, check_keys


@app.command()
def compare(
    config: ConfigFile = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="Several comparisons in one: a name such as quick, or a YAML file of a suite."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Instead of the file's models: a folder, a name, or label=one. Repeatable."),
    ] = None,
    attn: Annotated[
        list[str] | None,
        typer.Option("--attn", "-a", help="Instead of the file's attentions: a name or YAML. Repeatable."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Attentions of the same bytes: equal_budget, or a YAML file of a preset."),
    ] = None,
    output_dir: OutputDir = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run cells again that have a result already.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--cells", metavar="LABEL=PATTERN", help="Run these alone: attention=local*, seed=0. Repeatable."),
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="K/N", help="Run the K-th of N shares: docs/results.md.")
    ] = None,
    no_retry: Annotated[bool, typer.Option("--no-retry", help="Leave cells that failed; else they run again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells, and about how long they take; run nothing.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Make the report of what has been measured; run nothing.")
    ] = False,
    assignments: Settings = None,
) -> None:
    """Compare attentions: quality untrained and fine-tuned, speed, memory. A stopped run goes on where it was.

    With --suite: several such comparisons with one report. Over several processes, each runs cells of its own. Exit
    status 1 if a cell failed.
    """
    _large_pages()
    from attn_plugins.benchmark.results.shares import shares
    from attn_plugins.benchmark.suites.config import Suite, attention_flags, labelled

    with one_line_errors():
        from attn_plugins.benchmark.compare.run import all_cells, prepare_compare, run_compare
        from attn_plugins.benchmark.results.chosen import chosen, planned

        spread_out()
        processes = shares()
        first = processes is None or processes.first
        if processes is not None and fresh:
            raise ValueError("--fresh takes away what other processes use; allowed: in one process")
        if (dry_run or report) and not first:
            return
        with contextlib.nullcontext() if processes is None or dry_run or report else processes.start():
            models = labelled(model) if model else None
            attentions = attention_flags(attn) if attn else None
            asked = _asked(config, suite, models, attentions, preset, output_dir, assignments)
            parts = asked.parts if isinstance(asked, Suite) else asked
            results = prepare_compare(*(own for _, own in parts) if isinstance(parts, list) else (parts,))
            here = chosen(all_cells(parts), only or (), shard)
            if report and not dry_run and not results.records:
                raise ValueError(f"--report of {results.path}, which has no results; allowed: a folder that has some")
            running = results.lock() if first and not dry_run else contextlib.nullcontext()
        if dry_run:
            show([planned(here, results, fresh=fresh, retry=not no_retry)], [])
            return
    from attn_plugins.benchmark.compare.report import write_report
    from attn_plugins.benchmark.html.page import write_run_page
    from attn_plugins.benchmark.html.runs import write_plan
    from attn_plugins.benchmark.results.live import LiveTable
    from attn_plugins.benchmark.suites.report import write_suite_report

    named = [*parts] if isinstance(parts, list) else [(None, parts)]
    with running:
        if first:
            write_plan(results.path.parent, named)
        keys = [] if report else [cell.key for cell in here]
        how: dict[str, Any] = {"fresh": fresh, "only": keys, "retry": not no_retry}
        with stoppable(asked.output_dir, again=(), kept=f"cells that have ended are in {results.path}"):
            if sys.stdout.isatty() and processes is None and keys:
                with LiveTable(here, results) as table:
                    run_compare(parts, results, **how, say=table.say, watch=table)
            else:
                run_compare(parts, results, **how, shares=None if report else processes)
        if not first:
            return
        tables, files = write_suite_report(asked, results) if isinstance(asked, Suite) else write_report(asked, results)
        page = write_run_page(named, results)
    show(tables, [results.path, *files, page])
    failed = [table for table in tables if "error" in table.header]
    if failed:
        print("error: some cells failed; see the table of errors", file=sys.stderr)
        raise typer.Exit(1)


def _asked(
    config: Path | None,
    suite: str | None,
    models: dict[str, str] | None,
    attentions: dict[str, Any] | None,
    preset: str | None,
    output_dir: str | None,
    assignments: list[str] | None,
) -> Any:
    """The suite, or the comparison alone, that the flags of `compare` ask for."""
    from attn_plugins.benchmark.compare.config import CompareConfig
    from attn_plugins.benchmark.suites.config import read_suite, suite_tree, with_attentions

    if suite is not None:
        if config is not None:
            raise ValueError("--suite and --config are both given; allowed: one of them")
        given = [] if output_dir is None else [f"output_dir={json.dumps(output_dir)}"]
        whole = suite_tree(suite)
        tree = override(whole, [*given, *(assignments or [])])
        if isinstance(tree["parts"], dict):  # a part that --set misspells would be one more
            check_keys(tree["parts"], whole["parts"], f"parts of suite {whole['name']}")
        return read_suite(tree, models, attentions, preset)
    tree = settings(config, {"output_dir": output_dir}, None)
    if models is not None:
        tree["models"] = models
    if preset is not None:  # whose rows are another model's for another model
        name = "comparison" if config is None else config.stem
        tree = override(tree, assignments or [])
        whole = {"name": name, "parts": {name: tree}, "output_dir": tree.get("output_dir") or f"runs/{name}"}
        return read_suite(whole, models, attentions, preset)
    if attentions is not None:
        tree = with_attentions(tree, attentions)
    return build(CompareConfig, override(tree, assignments or []))


@app.command()
def bench(
    config: ConfigFile = None,
    attn: Annotated[
        list[str] | None,
        typer.Option("--attn", "-a", help="A name, or YAML such as '{type: local, window_size: 64}'. Repeatable."),
    ] = None,
    output_dir: OutputDir = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, or another that torch knows.")] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Generation instead: time of a token, size of the cache, by context.")
    ] = False,
    launches: Annotated[
        bool, typer.Option("--launches", help="Counts instead: operations and syncs of a layer, by length; no clock.")
    ] = False,
    roofline: Annotated[
        str | None,
        typer.Option("--roofline", metavar="GPU", help="Paper instead: least time on a100, h100, h200, b200, or all."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="With --roofline or --decode: whose heads, or what generates.")
    ] = None,
    length: Annotated[list[int] | None, typer.Option("--length", help="Tokens of one text. Repeatable.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure cells again that have a result already.")] = False,
    assignments: Settings = None,
) -> None:
    """Time and memory of attentions alone, by length, against torch's own; from which length each pays.

    With --decode: a whole model that generates with a long context in its cache, against the dense model.
    With --launches: how many operations a layer starts on a GPU, counted without one.
    With --roofline: what a GPU's published rates allow at best, and from which length that beats flash attention.
    On a CPU: time of the process on one thread, beside it several by the clock (--set wall_threads=2).
    A killed run goes on where it was. Exit status 1 if a cell failed.
    """
    found: Any
    _large_pages()
    with one_line_errors():
        flags = {"output_dir": output_dir, "device": device, "model": model}
        tree = settings(config, flags | {"contexts" if decode else "lengths": length or None}, assignments)
        if attn:
            tree["attentions"] = {text: parse_yaml(text) for text in attn}
    if launches or roofline is not None:
        _on_paper(tree, roofline)
        return
    with one_line_errors():
        if decode:
            from attn_plugins.benchmark.cost.decode import DecodeConfig, prepare_decode

            if attn:
                tree["attentions"] = {"dense": None, **tree["attentions"]}
            generation = build(DecodeConfig, tree)
            results = prepare_decode(generation)
        else:
            from attn_plugins.benchmark.cost.kernels import BenchConfig, prepare_bench

            alone = build(BenchConfig, tree)
            results = prepare_bench(alone)
        need("matplotlib", "compare")
        running = results.lock()
    with running:
        if decode:
            from attn_plugins.benchmark.cost.decode import run_decode
            from attn_plugins.benchmark.cost.decode_report import DecodeResults, write_decode_report

            run_decode(generation, results, fresh=fresh)
            found = DecodeResults(generation, results)
            tables, files = write_decode_report(found, results.path.parent)
        else:
            from attn_plugins.benchmark.cost.kernels import run_bench
            from attn_plugins.benchmark.cost.kernels_report import KernelResults, write_bench_report

            run_bench(alone, results, fresh=fresh)
            found = KernelResults(alone, results)
            tables, files = write_bench_report(found, results.path.parent)
    show(tables, [results.path, *files])
    if found.failed:
        print("error: some cells failed; see the last table", file=sys.stderr)
        raise typer.Exit(1)


def _on_paper(tree: dict[str, Any], roofline: str | None) -> None:
    """Launches, or what published rates of a GPU allow: nothing is timed."""
    with one_line_errors():
        if roofline is None:
            from attn_plugins.benchmark.cost.launches import LaunchesConfig, run_launches, write_launches

            counted = build(LaunchesConfig, tree)
            check_folder(counted.output_dir)
        else:
            from attn_plugins.benchmark.cost.roofline import DEVICES, RooflineConfig, costs, heads_of
            from attn_plugins.benchmark.cost.roofline_report import write_roofline

            tree["devices"] = list(DEVICES) if roofline == "all" else roofline.split(",")
            paper = build(RooflineConfig, tree)
            check_folder(paper.output_dir)
            heads, layers = heads_of(paper)
    if roofline is None:
        show(*write_launches(counted, run_launches(counted)))
    else:
        show(*write_roofline(paper, heads, layers, costs(paper, heads)))


def _large_pages() -> None:
    """Large tensors in large pages, for all that is compared: else a pass over long texts is a tenth page faults.

    torch reads it once, when it first allocates.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
