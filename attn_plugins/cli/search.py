"""The verb that tries settings: search."""

from typing import Any

from attn_plugins.cli.app import Attn, ConfigFile, Data, Model, Settings, app, one_line_errors, settings
from attn_plugins.core.options import build


@app.command()
def search(
    config: ConfigFile = None,
    model: Model = None,
    attn: Attn = None,
    data: Data = None,
    assignments: Settings = None,
) -> None:
    """Fine-tune several times, with settings that optuna chooses from those that the file's `search` names."""
    with one_line_errors():
        tree = settings(config, {"model": model, "data.source": data}, assignments, attn)
        from attn_plugins.training import search as searching

        asked = build(searching.SearchConfig, tree.pop("search", {}), "search")
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
