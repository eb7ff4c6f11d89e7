"""What all verbs share: the application, the options that several have, and how errors and results are shown."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from attn_plugins.config.yaml import override, parse_yaml, read_yaml

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
OutputDir = Annotated[str | None, typer.Option("--output-dir", "-o", help="Where everything is written.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of new weights, data order and dropout.")]


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


def show(tables: list[Any], files: list[Path]) -> None:
    """Print the tables, and what was written, if anything was."""
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table.rich())
        console.print()
    if files:
        print("files:", *[f"  {path}" for path in files], sep="\n")


def spread_out() -> None:
    """Where `accelerate launch` was asked for several processes and this is the only one, start them all, then exit."""
    from attn_plugins.training.launch import spread

    status = spread(sys.argv[1:])
    if status is not None:
        raise typer.Exit(status)


def print_figures(title: str, stages: dict[str, dict[str, Any]], metric: str) -> None:
    """A column for each stage, a row for each figure of a task."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from attn_plugins.tasks import figure, rows_of

    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    columns = [rows_of(figures, metric) for figures in stages.values()]
    for name in columns[0]:
        table.add_row(Text(name), *(figure(column[name]) for column in columns))
    Console().print(table)
