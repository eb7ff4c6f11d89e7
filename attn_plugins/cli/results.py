"""results: what runs of compare and bench have left, made one, shown, and compared."""

from pathlib import Path
from typing import Annotated

import typer

from attn_plugins.cli.app import app, one_line_errors
from attn_plugins.cli.app import show as show_tables

results = typer.Typer(help="What compare and bench have measured: merge runs, show one, or what differs between two.")
app.add_typer(results, name="results", no_args_is_help=True)

PLACE = "A folder with results.jsonl, or such a file."


@results.command()
def merge(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder whose results.jsonl is written; its own count too.")
    ],
    sources: Annotated[list[str], typer.Argument(metavar="DIR|FILE...", help=PLACE)],
) -> None:
    """Make one results.jsonl of several, of shards or machines: of each cell the record that ended last.

    A damaged line is named with its file, and nothing is written then. `compare --report` makes the tables of it.
    """
    with one_line_errors():
        from attn_plugins.benchmark.results import merge as merging

        merged, lines = merging.merge(out, sources)
    print(*lines, sep="\n")
    print(f"{merged.path}: {_counted(list(merged.records.values()))}")


@results.command()
def show(place: Annotated[str, typer.Argument(metavar="DIR|FILE", help=PLACE)]) -> None:
    """Show each cell with its figures, and what they were measured with."""
    with one_line_errors():
        from attn_plugins.benchmark.results.compared import show_table
        from attn_plugins.benchmark.results.merge import read_results

        held = read_results(place)
        table = show_table(held)
    show_tables([table], [])
    print(_counted(list(held.records.values())))
    print(*held.measured_with(held.records), *_machines(list(held.records.values())), sep="\n")


@results.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=PLACE)],
    b: Annotated[str, typer.Argument(metavar="B", help=PLACE)],
) -> None:
    """Show what changed from run A to run B, cell by cell, and what of it is noise."""
    with one_line_errors():
        from attn_plugins.benchmark.results.compared import diff_tables
        from attn_plugins.benchmark.results.merge import read_results

        tables = diff_tables(read_results(a), read_results(b))
    show_tables(tables, [])


def _counted(records: list[dict]) -> str:
    failed = sum(record["status"] == "error" for record in records)
    return f"{len(records)} cells" + (f", {failed} failed" if failed else "")


def _machines(records: list[dict]) -> list[str]:
    made = (record["hardware"] for record in records if "hardware" in record)
    told = (", ".join(f"{name} {value}" for name, value in one.items()) for one in made)
    return [f"- On {machine}" for machine in dict.fromkeys(told)]
