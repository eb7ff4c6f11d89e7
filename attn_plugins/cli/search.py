"""The verb that tries settings: search."""

from typing import Any

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
)
from attn_plugins.cli.stop import stoppable
from attn_plugins.cli.train import Loss, TrainedTask, Tune
from attn_plugins.core.options import build


@app.command()
def search(
    config: ConfigFile = None,
    model: Model = None,
    attn: Attn = None,
    data: Data = None,
    task: TrainedTask = None,
    tune: Tune = None,
    loss: Loss = None,
    output_dir: OutputDir = None,
    seed: Seed = None,
    assignments: Settings = None,
) -> None:
    """Fine-tune several times, with settings that optuna chooses from those that the file's `search` names.

    Each is a run in a folder of its own in the output folder. The same command goes on with a search that was stopped.
    """
    flags = {
        **{"model": model, "data.source": data, "task": task, "tune": tune, "loss": loss},
        **{"output_dir": output_dir, "seed": seed},
    }
    with one_line_errors():
        tree = settings(config, flags, assignments, attn)
        from attn_plugins.training import search as searching

        asked = build(searching.SearchConfig, tree.pop("search", {}), "search")
        with stoppable(str(tree.get("output_dir", ".")), again=()):
            found = searching.search(tree, asked)
    print_trials(found)


def print_trials(found: list[dict[str, Any]]) -> None:
    """A row for each trial, the best first."""
    from rich.console import Console
    from rich.table import Table

    from attn_plugins.tasks import figure

    table = Table()
    for name in (found[0]["figure"], *found[0]["settings"], "folder"):
        table.add_column(name, overflow="fold")
    for one in found:
        values = [figure(value) if isinstance(value, float) else str(value) for value in one["settings"].values()]
        table.add_row(figure(one["value"]), *values, one["folder"])
    Console().print(table)
