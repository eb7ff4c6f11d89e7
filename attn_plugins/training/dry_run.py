"""A run of one step that leaves nothing: whether all of it can be built, how long a step takes, and in what memory."""

import dataclasses
import sys
import tempfile
import time
from datetime import timedelta
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from attn_plugins.tasks import figure, run_task
from attn_plugins.training.arguments import training_arguments
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.evaluate import attention_summary
from attn_plugins.training.finetune import check_output, parameter_counts, prepare_finetune, rows_cut

ONE_STEP = {
    "max_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "push_to_hub": False,
    "logging_steps": 1,
}


class StepTime(TrainerCallback):
    """Seconds of the last step."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.seconds = -time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter()


def dry_run(config: FinetuneConfig, *, resume: bool = False) -> dict[str, Any]:
    """Build what a fine-tune is made of, train one step, measure one batch; nothing comes into ``config.output_dir``.

    Returns:
        "rows" (None of a stream), of which were "seen" all, or the first of a stream, and of those "cut" (option -> how
        many reach it), "steps" that the run would take, "parameters", "attention", "loss" and "seconds" of the step,
        "gigabytes" (the most that were in use, of the accelerator where there is one), and figures of one batch by
        task.

    Raises:
        ValueError: as the run itself would.
    """
    check_output(config, resume=resume)
    asked = training_arguments(config, config.trained(), quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        training = {**config.training, **ONE_STEP}
        short = dataclasses.replace(config, output_dir=folder, training=training, early_stopping=None)
        run = prepare_finetune(short, quiet=True)
        trainer, step = run.trainer, StepTime()
        trainer.add_callback(step)
        trainer.remove_callback(PrinterCallback)
        steps = trainer.set_initial_training_values(asked, trainer.get_train_dataloader())[-1]
        loss = trainer.train().training_loss
        measured = {one.task.name: run_task(one.task, trainer.model, one.batches[:1]) for one in run.measurements}
    return {
        "rows": None if config.data.streaming else len(trainer.train_dataset),
        "seen": len(run.examples),
        "row": run.trained.row_of(),
        "cut": rows_cut(run.trained, run.examples),
        "steps": steps,
        "parameters": parameter_counts(trainer.model),
        "attention": attention_summary(trainer.model)["modules"],
        "loss": loss,
        "seconds": step.seconds,
        "gigabytes": _most_memory() / 1e9,
        "measured": {one.task.name: measured[one.task.name][one.task.metric] for one in run.measurements},
        "batches": {one.task.name: len(one.batches) for one in run.measurements},
    }


def told(found: dict[str, Any], config: FinetuneConfig) -> str:
    """What a dry run has found, in a few lines."""
    counts, cut = found["parameters"], found["cut"]
    whole = timedelta(seconds=round(found["seconds"] * found["steps"]))
    per_step = f"{found['seconds']:.3g} s ({whole} for all of them at that pace)"
    if found["rows"] is None:
        rows, of = "a stream, whose number nobody knows", f" of the first {found['seen']:,}"
    else:
        rows, of = f"{found['rows']:,} to train on", ""
    cuts = [f"{number:,}{of} reach {option}, which longer ones are cut to" for option, number in cut.items()]
    lines = {
        "rows": "; ".join([f"{rows} (a row is a {found['row']})", *cuts]),
        "steps": f"{found['steps']:,}; the one that was run: {per_step}, loss {found['loss']:.4g}",
        "memory": f"{found['gigabytes']:.3g} GB at most",
        "trained": f"{counts['trained']:,} of {counts['total']:,} parameters ({config.tune})",
        "attention": ", ".join(f"{kind} in {number} modules" for kind, number in found["attention"].items()),
    }
    for name, value in found["measured"].items():
        lines[name] = f"{figure(value)} on the first of {found['batches'][name]} batches, after that step"
    width = max(map(len, lines))
    return "\n".join([*(f"{name:{width}}  {line}" for name, line in lines.items()), "nothing was written"])


def _most_memory() -> int:
    """Bytes: of tensors on the accelerator, or without one of this process, since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
