"""The verb that chooses which heads and layers keep full attention."""

from typing import Annotated

import typer

from attn_plugins.cli.app import Attn, ConfigFile, Data, Model, OutputDir, Settings, app, one_line_errors, settings
from attn_plugins.core.options import build


@app.command()
def choose(
    config: ConfigFile = None,
    model: Model = None,
    attn: Attn = None,
    data: Data = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Share of heads or layers that keep full attention; 0.25 if unset.")
    ] = None,
    level: Annotated[str | None, typer.Option("--level", help="heads (key/value heads) or layers.")] = None,
    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            help="contribution: a forward pass a row, seconds. kl, kl_swapped, recall, recall_kept: a forward pass for "
            "each head or layer, minutes. gates: learned, 24 training steps, minutes.",
        ),
    ] = None,
    output_dir: OutputDir = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the rows that scores are measured on.")] = None,
    assignments: Settings = None,
) -> None:
    """Choose the heads or layers that keep full attention where all others get --attn; prints rules for the flag.

    Writes rules.yaml, which --attn takes, scores.json, and scores.png. Without --attn the model has to be one that was
    saved swapped: it is scored with the weights that it has.
    """
    flags = {"model": model, "data.source": data, "budget": budget, "level": level, "score": score}
    with one_line_errors():
        tree = settings(config, flags | {"output_dir": output_dir, "seed": seed}, assignments, attn)
        from rich.console import Console

        from attn_plugins.choice.run import ChooseConfig
        from attn_plugins.choice.run import choose as make_choice

        parsed = build(ChooseConfig, tree)
        console = Console(stderr=True)
        with console.status("choose: loading") as status:
            chosen = make_choice(parsed, lambda line: status.update(f"choose: {line}"))
    print(chosen.choice)
    if chosen.dense_bytes is not None and chosen.chosen_bytes is not None:
        before, after = (f"{number / 2**20:.1f} MiB" for number in (chosen.dense_bytes, chosen.chosen_bytes))
        share = chosen.chosen_bytes / chosen.dense_bytes
        print(f"\ncache of one text of {chosen.context:,} tokens: {before} dense, {after} so ({share:.0%})")
    print("files:", *[f"  {path}" for path in chosen.files], sep="\n")
