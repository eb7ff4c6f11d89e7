"""Verbs that teach new weights what the model itself does: transfer."""

from typing import Annotated

import typer

from attn_plugins.cli.app import (
    Attn,
    ConfigFile,
    Data,
    Model,
    OutputDir,
    Settings,
    app,
    one_line_errors,
    settings,
    spread_out,
)
from attn_plugins.cli.stop import stoppable
from attn_plugins.core.options import build


@app.command()
def transfer(
    config: ConfigFile = None,
    model: Model = None,
    attn: Attn = None,
    data: Data = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Make batches as finetune does for this task: pictures, sound, pairs.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Updates of the new weights (100).")] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens of a text, as many as in use (512).")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Texts in a batch (1).")] = None,
    loss: Annotated[str | None, typer.Option("--loss", help="output (the default) or weights.")] = None,
    body_dtype: Annotated[
        str | None, typer.Option("--body-dtype", help="bfloat16 or float16: what the model runs in around its slots.")
    ] = None,
    output_dir: OutputDir = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of new weights and the order of texts.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint in the output folder.")
    ] = False,
    assignments: Settings = None,
) -> None:
    """Teach the new weights of an attention what the model's own attention does, layer by layer, in minutes.

    Writes the swapped model, report.json and errors.png (errors by layer and head), metrics.json and a model card.
    """
    flags = {
        "model": model,
        "data.source": data,
        "task": task,
        "steps": steps,
        "length": length,
        "batch_size": batch_size,
        "loss": loss,
        "body_dtype": body_dtype,
        "output_dir": output_dir,
        "seed": seed,
    }
    with one_line_errors():
        tree = settings(config, flags, assignments, attn)
        from attn_plugins.training.processes import is_main_process
        from attn_plugins.training.resume import finished
        from attn_plugins.transfer.config import TransferConfig
        from attn_plugins.transfer.run import prepare_transfer

        parsed = build(TransferConfig, tree)
        spread_out()
        if resume and finished(parsed) is not None:
            print(f"the run in {parsed.output_dir} has ended with these settings; nothing was trained")
            return
    with stoppable(parsed.output_dir):
        with one_line_errors():
            run = prepare_transfer(parsed, resume=resume)
        report, _ = run.run()
    if not is_main_process():
        return
    print(report)
    if report.after_at_twice is not None:
        print(f"at {2 * parsed.length} tokens: {report.after_at_twice:.3f}")
        if report.after_at_twice > 1.25 * report.after:
            print("note: the error grows with the length: transfer at the length that the model will read (--length)")
    print(f"written to {parsed.output_dir}: the model, README.md, report.json, metrics.json, errors.png")
