"""The verb that runs stages in a row: recipe."""

import os

from attn_plugins.cli.app import (
    Attn,
    ConfigFile,
    Data,
    Model,
    OutputDir,
    Seed,
    Settings,
    app,
    one_line_errors,
    settings,
    spread_out,
)
from attn_plugins.cli.stop import stoppable
from attn_plugins.core.options import build


@app.command()
def recipe(
    config: ConfigFile = None,
    model: Model = None,
    attn: Attn = None,
    data: Data = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    assignments: Settings = None,
) -> None:
    """Run the stages of a file in a row: transfer, choose, distill, finetune. A stopped recipe goes on where it was.

    Each stage is written into a folder of its own, and report.md tells what came of each.
    """
    flags = {"model": model, "data.source": data, "output_dir": output_dir, "seed": seed}
    with one_line_errors():
        tree = settings(config, flags, assignments, attn)
        from attn_plugins.training.processes import is_main_process
        from attn_plugins.transfer.recipe import RecipeConfig, prepare_recipe, run_recipe, table

        parsed = build(RecipeConfig, tree)
        spread_out()
        prepare_recipe(parsed)
    quiet = os.environ.get("RANK", "0") != "0"
    with stoppable(parsed.output_dir, again=()):
        rows = run_recipe(parsed, say=(lambda line: None) if quiet else print)
    if is_main_process() and not quiet:
        from rich.console import Console
        from rich.table import Table

        header, *lines = table(rows)
        shown = Table(box=None)
        for number, name in enumerate(header):
            shown.add_column(name, justify="right" if number > 1 else "left", no_wrap=number == 0)
        for line in lines:
            shown.add_row(*line)
        Console().print(shown)
        print(f"written to {parsed.output_dir}: report.md, report.json; the model is in {rows[-1]['folder']}")
