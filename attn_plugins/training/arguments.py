"""From the settings of a fine-tune to Trainer's own, with what its task and a best checkpoint ask of them."""

from typing import Any

import torch
import transformers

from attn_plugins.tasks import TrainableTask
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.processes import ask_for_cpu, shard_on_cpu
from attn_plugins.training.streaming import read_by_each


def training_arguments(config: FinetuneConfig, trained: TrainableTask, quiet: bool = False) -> Any:
    """The settings that the task's trainer takes.

    Where the best checkpoint is asked for, checkpoints are made when it is evaluated, and what tells the best is the
    task's own figure where it has one while it trains, else the loss; unless the settings say otherwise.

    Raises:
        ValueError: TrainingArguments refuses a setting, or something that one names is not installed.
    """
    options = {**trained.defaults, **config.training}
    options.setdefault("logging_steps", 10)
    if config.loss != "task":
        options.setdefault("learning_rate", 5e-3 if config.tune == "new" else 2e-3)
    options.setdefault("report_to", "none")
    options.setdefault("label_names", list(trained.targets))  # a PEFT model's forward hides them from Trainer
    options.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    options.setdefault("disable_tqdm", quiet)
    if options.get("bf16") and not torch.accelerator.is_available():
        options.setdefault("use_cpu", True)  # without which Trainer refuses it, though that is where it would train
    if config.early_stopping is not None:
        options.setdefault("load_best_model_at_end", True)
        options.setdefault("restore_callback_states_from_checkpoint", True)  # how often it was no better, so far
    if options.get("load_best_model_at_end"):
        options.setdefault("save_strategy", options.get("eval_strategy", "no"))
        if "eval_steps" in options:
            options.setdefault("save_steps", options["eval_steps"])
        options.setdefault("metric_for_best_model", trained.metric if _shows_figure(trained, options) else "loss")
    if str(options.get("metric_for_best_model")).removeprefix("eval_") == trained.metric:
        options.setdefault("greater_is_better", trained.better == "higher")
    if ask_for_cpu():
        options.setdefault("ddp_backend", "gloo")  # DeepSpeed takes what it is told
    try:
        arguments = trained.arguments()(output_dir=config.output_dir, seed=config.seed, **options)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"training: {' '.join(str(error).split())}") from error
    shard_on_cpu(arguments)
    _check_installed(arguments)
    if config.data.streaming:
        read_by_each(arguments.accelerator_config)
    return arguments


def early_stopping(config: FinetuneConfig) -> list[Any]:
    """Callbacks of a run: that of transformers which ends it early, where that is asked for."""
    if config.early_stopping is None:
        return []
    asked = config.early_stopping
    return [transformers.EarlyStoppingCallback(asked.patience, asked.threshold)]


def _shows_figure(trained: TrainableTask, options: dict[str, Any]) -> bool:
    """Whether the task has its figure while it trains, which Seq2SeqTrainer has of what it generates alone."""
    generates = trained.trainer != "Seq2SeqTrainer" or options.get("predict_with_generate", False)
    return generates and type(trained).training_metrics is not TrainableTask.training_metrics


def _check_installed(arguments: Any) -> None:
    """Raise a ValueError where Trainer would find out only once the model is there."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.utils import is_liger_kernel_available

    there = get_available_reporting_integrations()
    missing = [name for name in arguments.report_to if name not in there]
    if missing:
        allowed = ", ".join(["none", *there])
        raise ValueError(f"training.report_to: {', '.join(missing)} is not installed; allowed here: {allowed}")
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(
            "training.use_liger_kernel needs liger-kernel, which is not installed: pip install liger-kernel"
        )
