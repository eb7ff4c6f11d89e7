"""Verbs that look: list, describe, check."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated

import typer

from attn_plugins.cli.app import Attn, app, attention_flag, one_line_errors
from attn_plugins.core.catalogue import declared
from attn_plugins.core.options import did_you_mean

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


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, everything included.")] = False) -> None:
    """List the attentions: name, what each supports, its cost and its paper, family by family."""
    if as_json:
        from attn_plugins.benchmark.pages.described_attention import facts
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
    from attn_plugins.benchmark.pages.described_attention import print_attention, print_standings
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
    from attn_plugins.benchmark.checks.check import check as run_check
    from attn_plugins.core.registry import get_attention

    with one_line_errors():
        names = None if not attentions else [get_attention(name).name for name in attentions]
        file, results = run_check(device, names)
    failed = [one for one in results if not one["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} passed; remembered in {file}")
    if failed:
        raise typer.Exit(1)


@app.command()
def build(
    into: Annotated[
        Path | None, typer.Option("--into", help="A folder for the library, instead of the cache in which it is found.")
    ] = None,
    flags: Annotated[str, typer.Option("--flags", help="More flags of the compiler, such as -fsanitize=address.")] = "",
) -> None:
    """Compile the kernels in C++ for CPUs, once for each version of torch; auto takes them from then on.

    Needs a C++ compiler ($CXX, else g++, clang++ or c++) and about ten seconds. They are kept in $ATTN_PLUGINS_CACHE,
    else ~/.cache/attn-plugins. ATTN_PLUGINS_CPP=0 leaves them alone; =avx2, =avx512 or =generic has those used.
    """
    from attn_plugins.core.backend import get_backend

    with one_line_errors():
        print(*get_backend("cpp").build(into=into, flags=flags), sep="\n")
