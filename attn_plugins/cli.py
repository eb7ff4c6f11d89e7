"""The command line: attn-plugins VERB, or python -m attn_plugins VERB, or accelerate launch -m attn_plugins VERB."""

import contextlib
import dataclasses
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.config.yaml import override, parse_yaml, read_yaml
from attn_plugins.core.catalogue import declared
from attn_plugins.core.options import build, did_you_mean

# Nothing above brings torch or transformers: `list` and --help must be quick. Each verb imports what it needs.

app = typer.Typer(
    name="attn-plugins",
    help="Put another attention into a Hugging Face model: fine-tune, evaluate and compare it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Set one setting, over the file's: training.max_steps=20. Repeatable."
    ),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="A folder, a name on the hub, or smollm2-135m-demo.")]
Attn = Annotated[
    str | None,
    typer.Option("--attn", "-a", help="A name, YAML such as '{type: local, window_size: 256}', a YAML file, or null."),
]
Data = Annotated[
    str | None, typer.Option("--data", "-d", help="A local file or folder, a data set on the hub, or python-docs.")
]


LETTERS = {
    "causal": "C",
    "bidirectional": "B",
    "cross": "X",
    "any_mask": "M",
    "segments": "S",
    "position_bias": "P",
    "softcap": "T",
    "sinks": "L",
    "dropout": "D",
}
"""A letter for each capability, for a table that is as narrow as a terminal."""


def main() -> None:
    """Run the command line. What a user got wrong ends as one line and exit status 2."""
    if sys.argv[1:2] == ["run"] and sys.argv[2:] not in ([], ["--help"]):
        _run(sys.argv[2:])  # not by way of click, which would take what the program raises for its own
        return
    # Until transformers drops the old name, peft asks for it on every load; a user can do nothing about it.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    app()


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, no_args_is_help=True)
def run(
    program: Annotated[list[str], typer.Argument(help="-m MODULE, a script, or an installed command; its arguments.")],
) -> None:
    """Run another program with the flag known to it, and to the processes that it starts: run -m lm_eval ...

    All that follows belongs to the program, and so does the exit status.
    """
    _run(program)


def _run(program: list[str]) -> None:
    from attn_plugins.launcher.run import prepare_program

    try:
        start = prepare_program(program)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    start()


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """For what happens before work starts: a ValueError says what the user got wrong, and needs no traceback."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("ATTN_PLUGINS_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") == "0":  # of several processes, which all get here, one says so
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def settings(
    config: Path | None, flags: dict[str, Any], assignments: list[str] | None, attn: str | None = None
) -> dict[str, Any]:
    """The file's settings, over them the flags that were given, over those each --set."""
    tree = {} if config is None else read_yaml(config)
    tree = override(tree, [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None])
    if attn is not None:
        tree["attention"] = attention_flag(attn)
    return override(tree, assignments or [])


def attention_flag(attn: str) -> Any:
    """What --attn says. A bare name becomes a rule, so that ``--attn local --set attention.window_size=64`` works."""
    from attn_plugins.core.registry import list_attentions

    value = attn if attn.endswith((".yaml", ".yml")) else parse_yaml(attn)
    return {"type": value} if isinstance(value, str) and value in list_attentions() else value


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, everything included.")] = False) -> None:
    """List the attentions: name, what each supports, its cost and its paper, family by family."""
    if as_json:
        from attn_plugins.benchmark.described_attention import facts
        from attn_plugins.core.registry import get_attention, list_attentions

        print(json.dumps([facts(get_attention(name)) for name in list_attentions()], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("name", "supports", "cost of a head", "paper"):
        table.add_column(column, no_wrap=column in ("name", "supports"), overflow="fold")
    family = None
    attentions = declared(("family", "cost", "paper", *LETTERS))
    for attention in sorted(attentions, key=lambda one: (one["family"], one["name"])):
        if attention["family"] != family:
            family = attention["family"]
            table.add_row(f"[bold]{family.replace('_', ' ')}[/bold]")
        supports = "".join(letter if attention[name] else "·" for name, letter in LETTERS.items())
        table.add_row(f"  {attention['name']}", supports, attention["cost"], brief_paper(attention["paper"]))
    legend = ", ".join(f"{letter} {name.replace('_', ' ')}" for name, letter in LETTERS.items())
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\nsupports: {legend}\nattn-plugins describe NAME tells what it is: formula, options, limits, source"
    )


def brief_paper(paper: str) -> str:
    """Authors and year of the first paper: 'Lu et al. 2025'."""
    authors = re.match(r".*?\b\d{4}\b", paper)
    return authors.group() if authors else paper


@app.command()
def describe(
    what: Annotated[str, typer.Argument(help="An attention's name, or a model: a folder, a name on the hub.")],
    attn: Attn = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Of an attention: what computes it on cpu or cuda, and how fast.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe an attention, or which attention serves each module of a model (with --attn: would serve)."""
    from attn_plugins.benchmark.described_attention import print_attention, print_standings
    from attn_plugins.core.registry import get_attention, list_attentions

    if what in list_attentions() and attn is None:
        if device is None:
            print_attention(get_attention(what), as_json)
        else:
            with one_line_errors():
                print_standings(what, device, as_json)
        return
    with one_line_errors():
        if device is not None:
            raise ValueError(f"--device goes with the name of an attention, got {what!r}")
        near = did_you_mean(what, list_attentions())
        looks_like_model = Path(what).expanduser().exists() or "/" in what or what == "smollm2-135m-demo"
        if not looks_like_model and near and attn is None:
            raise ValueError(
                f"{what!r} is neither an attention{near} nor a model folder; known: {', '.join(list_attentions())}"
            )
        from attn_plugins.hf.swap import describe_attention
        from attn_plugins.training.models import skeleton

        rows = describe_attention(skeleton(what) if attn is None else skeleton(what, attention_flag(attn)))
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        print(rows)


@app.command()
def check(
    attentions: Annotated[list[str] | None, typer.Argument(help="Names of attentions; without any, all.")] = None,
    device: Annotated[str, typer.Option("--device", help="cuda, or another that torch knows beside the CPU.")] = "cuda",
) -> None:
    """Run every backend on this machine's device against the dense form, time it, and let auto take what passed.

    What passed, and how fast it was, is remembered for this device, driver and versions in $ATTN_PLUGINS_CACHE, else
    ~/.cache/attn-plugins. Exit status 1 if a backend failed.
    """
    from attn_plugins.benchmark.check import check as run_check
    from attn_plugins.core.registry import get_attention

    with one_line_errors():
        names = None if not attentions else [get_attention(name).name for name in attentions]
        file, results = run_check(device, names)
    failed = [one for one in results if not one["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} passed; remembered in {file}")
    if failed:
        raise typer.Exit(1)


@app.command()
def finetune(
    config: ConfigFile = None,
    model: Model = None,
    attn: Attn = None,
    data: Data = None,
    tune: Annotated[
        str | None, typer.Option("--tune", help="What trains: lora, full, or new (new weights alone).")
    ] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="Where everything is written.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of new weights, data order and dropout.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint in the output folder.")
    ] = False,
    assignments: Settings = None,
) -> None:
    """Fine-tune a model with an attention of your choice; writes the model, metrics.json and a model card."""
    flags = {"model": model, "data.source": data, "tune": tune, "output_dir": output_dir, "seed": seed}
    with one_line_errors():
        tree = settings(config, flags, assignments, attn)
        from attn_plugins.training.config import FinetuneConfig
        from attn_plugins.training.evaluate import is_main_process
        from attn_plugins.training.finetune import prepare_finetune
        from attn_plugins.training.resume import finished

        parsed = build(FinetuneConfig, tree)
        _spread()
        metrics = finished(parsed) if resume else None
        run = prepare_finetune(parsed, resume=resume) if metrics is None else None
    if run is not None:
        metrics = run.run()
        done = f"written to {parsed.output_dir}: the model, README.md, metrics.json"
    else:
        done = f"the run in {parsed.output_dir} has ended with these settings; nothing was trained, nothing written"
    if metrics is not None and is_main_process() and os.environ.get("RANK", "0") == "0":
        evaluation = metrics["evaluation"]
        stages = {stage: evaluation[stage] for stage in ("before", "after") if evaluation[stage] is not None}
        _print_figures(f"{evaluation['task']}, held-out", stages)
        print(done)


@app.command()
def evaluate(
    config: ConfigFile = None,
    model: Model = None,
    attn: Attn = None,
    data: Data = None,
    task: Annotated[str | None, typer.Option("--task", help="perplexity, accuracy or streaming_perplexity.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Also write the result there, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    assignments: Settings = None,
) -> None:
    """Measure a model, swapped or not, or a PEFT adapter, on held-out text."""
    flags = {"model": model, "data.source": data, "evaluation.task": task, "output": output}
    with one_line_errors():
        tree = settings(config, flags, assignments, attn)
        from attn_plugins.training.config import EvaluateConfig
        from attn_plugins.training.evaluate import is_main_process, prepare_evaluation

        parsed = build(EvaluateConfig, tree)
        _spread()
        run = prepare_evaluation(parsed)
    result = run.run()
    if not is_main_process():
        return
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        served = ", ".join(f"{kind} in {count}" for kind, count in result["attention"]["modules"].items())
        _print_figures(f"{result['task']} of {result['model']} ({served} attention modules)", {"": result["result"]})
        if result["new_weights"]:
            print(
                f"note: {result['new_weights']} weights of the attention are at their initial values: it is untrained"
            )


@app.command()
def compare(
    config: ConfigFile = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="Where everything is written.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run cells again that have a result already.")] = False,
    assignments: Settings = None,
) -> None:
    """Compare attentions: quality untrained and fine-tuned, speed, memory. A killed run goes on where it was.

    Exit status 1 if a cell failed.
    """
    with one_line_errors():
        from attn_plugins.benchmark.compare import CompareConfig, prepare_compare, run_compare

        parsed = build(CompareConfig, settings(config, {"output_dir": output_dir}, assignments))
        results = prepare_compare(parsed)
        running = results.lock()
    from attn_plugins.benchmark.compare_report import write_report

    with running:
        run_compare(parsed, results, fresh=fresh)
        tables, files = write_report(parsed, results)
    _show(tables, [results.path, *files])
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
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="Where everything is written.")] = None,
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
            from attn_plugins.benchmark.decode import DecodeConfig, prepare_decode

            if attn:
                tree["attentions"] = {"dense": None, **tree["attentions"]}
            generation = build(DecodeConfig, tree)
            results = prepare_decode(generation)
        else:
            from attn_plugins.benchmark.kernels import BenchConfig, prepare_bench

            alone = build(BenchConfig, tree)
            results = prepare_bench(alone)
        need("matplotlib", "compare")
        running = results.lock()
    with running:
        if decode:
            from attn_plugins.benchmark.decode import run_decode
            from attn_plugins.benchmark.decode_report import DecodeResults, write_decode_report

            run_decode(generation, results, fresh=fresh)
            found = DecodeResults(generation, results)
            tables, files = write_decode_report(found, results.path.parent)
        else:
            from attn_plugins.benchmark.kernels import run_bench
            from attn_plugins.benchmark.kernels_report import KernelResults, write_bench_report

            run_bench(alone, results, fresh=fresh)
            found = KernelResults(alone, results)
            tables, files = write_bench_report(found, results.path.parent)
    _show(tables, [results.path, *files])
    if found.failed:
        print("error: some cells failed; see the last table", file=sys.stderr)
        raise typer.Exit(1)


def _on_paper(tree: dict[str, Any], roofline: str | None) -> None:
    """Launches, or what published rates of a GPU allow: nothing is timed."""
    with one_line_errors():
        if roofline is None:
            from attn_plugins.benchmark.launches import LaunchesConfig, run_launches, write_launches

            counted = build(LaunchesConfig, tree)
            check_folder(counted.output_dir)
        else:
            from attn_plugins.benchmark.roofline import DEVICES, RooflineConfig, costs, heads_of
            from attn_plugins.benchmark.roofline_report import write_roofline

            tree["devices"] = list(DEVICES) if roofline == "all" else roofline.split(",")
            paper = build(RooflineConfig, tree)
            check_folder(paper.output_dir)
            heads, layers = heads_of(paper)
    if roofline is None:
        _show(*write_launches(counted, run_launches(counted)))
    else:
        _show(*write_roofline(paper, heads, layers, costs(paper, heads)))


def _show(tables: list[Any], files: list[Path]) -> None:
    """Print the tables, and what was written."""
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table.rich())
        console.print()
    print("files:", *[f"  {path}" for path in files], sep="\n")


def _spread() -> None:
    """Where `accelerate launch` was asked for several processes and this is the only one, start them all, then exit."""
    from attn_plugins.training.launch import spread

    status = spread(sys.argv[1:])
    if status is not None:
        raise typer.Exit(status)


def _print_figures(title: str, stages: dict[str, dict[str, Any]]) -> None:
    """A column for each stage, a row for each figure."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    columns = [_flat(figures) for figures in stages.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    Console().print(table)


def _flat(figures: dict[str, Any]) -> dict[str, str]:
    flat = {}
    for name, value in figures.items():
        if isinstance(value, list):
            for part in value:
                flat[f"perplexity at positions {part['from']} to {part['to']}"] = f"{part['perplexity']:.4g}"
        elif isinstance(value, dict):
            flat |= {f"with the branch {part!r} alone": f"{figure:.4g}" for part, figure in value.items()}
        else:
            flat[name] = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return flat
