"""The verb that writes a model for programs without this package: export."""

from pathlib import Path
from typing import Annotated

import typer

from attn_plugins.cli.app import app, one_line_errors


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A folder, a name on the hub, or smollm2-135m-demo.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, which may not hold anything yet.")],
    native: Annotated[
        bool, typer.Option("--native", help="As a model of transformers' own, the one form that there is so far.")
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter of PEFT into its base model first.")] = False,
) -> None:
    """Write a model whose layers have windows so that transformers loads it without this package.

    For local with num_sink_tokens: 0 and dilation: 1, over all or some layers of Llama, Mistral, Qwen, Gemma and their
    like: docs/models.md. All else is refused with the reason, before anything is written.
    """
    with one_line_errors():
        if not native:
            raise ValueError("export knows one form so far; say --native")
        from attn_plugins.export.native import export_native

        written = export_native(model, out, merge=merge)
    print(f"written: {written}")
