"""The verb that shows what comparisons found: report."""

from pathlib import Path
from typing import Annotated

import typer

from attn_plugins.cli.app import app, one_line_errors


@app.command()
def report(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...", help="Where compare wrote its results.jsonl, or LABEL=DIR; also the file itself."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("report.html"),
) -> None:
    """One HTML file of several comparisons: a leaderboard, figures, each cell's settings. No network, no server.

    Each `compare` writes the file of its own run; runs are told apart by their labels, or the names of their folders.
    """
    with one_line_errors():
        from attn_plugins.benchmark.html.page import write_page
        from attn_plugins.benchmark.html.runs import read_run

        if output.suffix != ".html":
            raise ValueError(f"--output {output}; allowed: a file that ends in .html")
        runs = [read_run(folder) for folder in folders]
        print(write_page(runs, output.expanduser()))
