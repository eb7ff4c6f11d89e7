"""Verbs that measure attentions beside each other: compare, bench."""

import sys
from typing import Annotated, Any

import typer

from attn_plugins.cli.app import ConfigFile, OutputDir, Settings, app, one_line_errors, settings, show
from attn_plugins.cli.stop import stoppable
from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.config.yaml import parse_yaml
from attn_plugins.core.options import build


@app.command()
def compare(
    config: ConfigFile = None,
    output_dir: OutputDir = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run cells again that have a result already.")] = False,
    assignments: Settings = None,
) -> None:
    """Compare attentions: quality untrained and fine-tuned, speed, memory. A stopped run goes on where it was.

    Exit status 1 if a cell failed.
    """
    with one_line_errors():
        from attn_plugins.benchmark.compare.config import CompareConfig
        from attn_plugins.benchmark.compare.run import prepare_compare, run_compare

        parsed = build(CompareConfig, settings(config, {"output_dir": output_dir}, assignments))
        results = prepare_compare(parsed)
        running = results.lock()
    from attn_plugins.benchmark.compare.report import write_report

    with running:
        with stoppable(parsed.output_dir, again=(), kept=f"cells that have ended are in {results.path}"):
            run_compare(parsed, results, fresh=fresh)
        tables, files = write_report(parsed, results)
    show(tables, [results.path, *files])
    failed = [cell for cell in tables if cell.title == "Errors"]
    if failed:
        print("error: some cells failed; see the table of errors", file=sys.stderr)
        raise typer.Exit(1)


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
    A killed run goes on where it was. Exit status 1 if a cell failed.
    """
    found: Any
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
