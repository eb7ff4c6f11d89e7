"""The verb that shows what heads look at: inspect."""

import re
from typing import Annotated, Any

import typer

from attn_plugins.cli.app import Attn, Model, OutputDir, app, attention_flag, one_line_errors
from attn_plugins.core.options import build


@app.command()
def inspect(
    model: Model = None,
    attn: Attn = None,
    text: Annotated[str | None, typer.Option("--text", "-t", help="What it reads.")] = None,
    text_file: Annotated[str | None, typer.Option("--text-file", help="A file with what it reads.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="A file of a picture that it sees.")] = None,
    audio: Annotated[str | None, typer.Option("--audio", help="A file of sound that it hears.")] = None,
    layer: Annotated[str | None, typer.Option("--layer", help="'0,5', '0-3', 'every:4', -1; all without it.")] = None,
    head: Annotated[str | None, typer.Option("--head", help="Query heads, in the same forms.")] = None,
    query: Annotated[
        list[str] | None, typer.Option("--query", help="Tokens that look: last, a position, or a word. Repeatable.")
    ] = None,
    role: Annotated[list[str] | None, typer.Option("--role", help="encoder, decoder, cross. Repeatable.")] = None,
    attribution: Annotated[
        list[str] | None, typer.Option("--attribution", help="Beside weights: rollout, gradient. Repeatable.")
    ] = None,
    through: Annotated[
        str | None, typer.Option("--through", help="Which attention the model goes on with: swapped, or own.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens that the text is cut to.")] = None,
    generate: Annotated[int | None, typer.Option("--generate", help="Tokens that the model writes first.")] = None,
    window: Annotated[int | None, typer.Option("--window", help="Keys outside of which shares are told.")] = None,
    output_dir: OutputDir = None,
) -> None:
    """Show what each head of a model looks at, for any attention, beside the model's own on the same input.

    Writes a page in which a token is pointed at (page.html), figures of all heads (inspect.json, overview_*.png), the
    weights (weights.safetensors), and of what reads one text and writes another the alignment of both. See
    docs/inspect.md.
    """
    with one_line_errors():
        from attn_plugins.inspection.run import InspectConfig, run_inspect

        flags: dict[str, Any] = {
            "model": model,
            "output_dir": output_dir,
            "text": text,
            "text_file": text_file,
            "image": image,
            "audio": audio,
            "layers": None if layer is None else numbers(layer),
            "heads": None if head is None else numbers(head),
            "queries": query or None,
            "roles": role or None,
            "attributions": attribution or None,
            "through": through,
            "length": length,
            "generate": generate,
            "window": window,
        }
        tree = {name: value for name, value in flags.items() if value is not None}
        if attn is not None:
            tree["attention"] = attention_flag(attn)
        found = run_inspect(build(InspectConfig, tree))
    from rich.console import Console

    Console().print(summary(found.layers))
    print("files:", *[f"  {path}" for path in found.files], sep="\n")


def numbers(told: str) -> list[int | str]:
    """'0,5' and the like, as rules take them."""
    return [int(item) if re.fullmatch(r"-?\d+", item) else item for item in (x.strip() for x in told.split(","))]


def summary(layers: list[Any]) -> Any:
    """A table with a row for each module: means over its heads."""
    from rich.table import Table

    names = ("entropy", "sinks", "outside")
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("role", "layer", "attention", *(f"{name}\n(own)" for name in names), "overlap", "error"):
        table.add_column(column, overflow="fold")
    for one in layers:
        means = [
            f"{_mean(x.weights for x in one.figures)(name)} ({_mean(x.own for x in one.figures)(name)})"
            for name in names
        ]
        both = [_mean(one.figures)(name) for name in ("overlap", "error")]
        table.add_row(one.role, str(one.layer), one.attention.partition("(")[0], *means, *both)
    return table


def _mean(sides: Any) -> Any:
    every = list(sides)

    def of(name: str) -> str:
        values = [value for one in every if (value := getattr(one, name)) is not None]
        return f"{sum(values) / len(values):.2g}" if values else "-"

    return of
