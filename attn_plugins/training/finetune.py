"""Fine-tune a model with whatever attention it has been given, on transformers' Trainer."""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.config.versions import versions
from attn_plugins.data.sources import load_data
from attn_plugins.data.stream import Stream
from attn_plugins.hf.parallel.sharding import size_of
from attn_plugins.hf.swap import describe_attention, unwrap
from attn_plugins.tasks import TrainableTask
from attn_plugins.training.arguments import early_stopping, training_arguments
from attn_plugins.training.as_saved import read_as_saved
from attn_plugins.training.before import Before
from attn_plugins.training.card import model_card
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.evaluate import (
    Measurement,
    attention_summary,
    prepare_measurements,
    run_measurements,
    write_json,
)
from attn_plugins.training.history import stages_of
from attn_plugins.training.lora import with_lora
from attn_plugins.training.loss_scale import scale_loss_once
from attn_plugins.training.models import Loaded, in_slot, load, resolve
from attn_plugins.training.new_models import is_new
from attn_plugins.training.processes import check_kept, start_processes
from attn_plugins.training.quantization import quantization_of
from attn_plugins.training.recall import prepare_recall, report
from attn_plugins.training.resume import METRICS, check_resume, check_rows, note_settings, settings_of, steps_of
from attn_plugins.training.stop import train
from attn_plugins.training.streaming import classes, endless, train_no_more
from attn_plugins.training.trained_tokenizer import texts_of

CARD = "README.md"

GONE_ON = "a sharded model is measured when its training begins, and this run went on from a checkpoint"

logger = logging.get_logger("transformers.attn_plugins")


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """A fine-tune whose inputs are all there: what can be wrong in a config has shown by now."""

    config: FinetuneConfig
    trained: TrainableTask
    loaded: Loaded
    trainer: Any
    examples: Any
    """What it trains on; of a stream, what its first rows become."""
    measurements: list[Measurement]
    """Tasks of the evaluation; the first stands for the rest."""
    recall: Measurement | str | None
    """What tells whether the model still recalls, why there can be none, or None where it is not to be told."""
    checkpoint: str | None
    """Where it goes on from."""

    def run(self, progress: str | None = "evaluation") -> dict[str, Any]:
        """Train, measure, and write the model, metrics.json and the model card into ``config.output_dir``.

        Returns:
            what metrics.json holds.

        Raises:
            Stopped: Ctrl-C or SIGTERM has ended the training; the checkpoint that it has left is whole.
        """
        config, trainer = self.config, self.trainer
        if trainer.is_world_process_zero():
            note_settings(config, rows_per_step(trainer))
        recalling = [self.recall] if isinstance(self.recall, Measurement) else []
        before = Before(trainer, self.measurements if config.evaluate_before else [], recalling, progress)
        started = time.perf_counter()
        output = train(trainer, self.checkpoint)
        seconds = time.perf_counter() - started - before.seconds
        after = run_measurements(self.measurements, trainer.model_wrapped, progress=progress)
        recall = {"missing": self.recall} if isinstance(self.recall, str) else None
        for name, found in run_measurements(recalling, trainer.model_wrapped, progress=progress).items():
            recall = report(before.recalled[name], found) if before.recalled else {"missing": GONE_ON}
        metrics = self._metrics(output, before.evaluated, after, recall, seconds)
        if trainer.is_fsdp_enabled:  # whatever checkpoints are made of: Trainer writes no model of shards
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.create_model_card = lambda *args, **named: self._describe(metrics)  # which it pushes, if it pushes
        trainer.save_model(config.output_dir)
        if trainer.is_world_process_zero():
            check_weights(Path(config.output_dir))
            self._describe(metrics)
            if recall is not None and recall.get("warning"):
                logger.warning(recall["warning"])
        trainer.accelerator.wait_for_everyone()
        return metrics

    def _describe(self, metrics: dict[str, Any]) -> None:
        """Write what tells of the model beside it."""
        out = Path(self.config.output_dir)
        if self.config.tune == "lora" and hasattr(self.trainer.model, "get_base_model"):
            _base(self.trainer.model).config.save_pretrained(out)  # tells a classifier's labels
        write_json(out / METRICS, metrics)
        (out / CARD).write_text(model_card(metrics), encoding="utf-8")

    def _metrics(
        self, output: Any, before: dict[str, Any], after: dict[str, Any], recall: dict[str, Any] | None, seconds: float
    ) -> dict[str, Any]:
        config, trainer = self.config, self.trainer
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        loss = output.training_loss
        if self.checkpoint is not None and steps_of(self.checkpoint) == output.global_step:  # nothing was left to train
            loss = statistics.fmean(entry["loss"] for entry in history) if history else float("nan")
        stages = {name: {"before": before.get(name), "after": found} for name, found in after.items()}
        task = self.measurements[0].task.name
        main = {"task": task, **stages.pop(task)}
        return {
            "stage": "finetune" if config.loss == "task" else "distill",
            "model": config.model,
            "base_model": base_of(trainer.model, self.loaded),
            "history": [] if is_new(config.model) else stages_of(resolve(config.model)),
            "attention": attention_summary(trainer.model),
            "rules": getattr(_base(trainer.model).config, "attn_plugin", None),
            "task": config.task,
            "auto": self.loaded.auto,
            "quantization": quantization_of(_base(trainer.model)),
            "tune": config.tune,
            "loss": config.loss,
            "seed": config.seed,
            "data": dataclasses.asdict(config.data),
            "evaluation": {**main, "others": stages},
            "recall": recall,
            "train": {
                "loss": loss,
                "losses": [{"step": entry["step"], "loss": entry["loss"]} for entry in history],
                "steps": trainer.state.global_step,
                "rows": self._rows(),
                "row": self.trained.row_of(),
                "processes": trainer.args.world_size,
                "seconds": round(seconds, 2),
                "resumed_from": self.checkpoint,
                "best": _best(trainer),
            },
            "parameters": parameter_counts(trainer.model),
            "training": config.training,
            "lora": config.lora,
            "settings": settings_of(config),
            "versions": versions(),
        }

    def _rows(self) -> int:
        """How many rows it was trained on; one that came in two epochs counts twice."""
        state = self.trainer.state
        if self.config.data.streaming:  # whose batches are all full
            return state.global_step * rows_per_step(self.trainer)
        return round((state.epoch or 0) * len(self.trainer.train_dataset))


def prepare_finetune(config: FinetuneConfig, *, resume: bool = False, quiet: bool = False) -> Finetune:
    """Load data and model, choose what trains, and build the Trainer.

    Args:
        resume: go on from the last whole checkpoint in ``config.output_dir``, from the start if there is none.
        quiet: no progress bar for training.

    Raises:
        ValueError: something that the config names is not there or does not fit, there is nothing to train,
            ``output_dir`` cannot be written, or the run that it holds is not one to go on with.
    """
    checkpoint = check_output(config, resume=resume)
    trained = config.trained()
    arguments = training_arguments(config, trained, quiet)
    start_processes()
    with arguments.main_process_first(desc="reading the data"):
        train, held_out = load_data(config.data, trained.columns)
        first = train.first if isinstance(train, Stream) else train
    loaded = load(
        config.model,
        attention=config.attention,
        kind=trained.model,
        labels=classes(trained, train),
        dtype=config.dtype,
        seed=config.seed,
        trainable=True,
        quantization=config.quantization,
        texts=texts_of(first),
    )
    if config.loss != "task":
        _check_teacher(config, loaded)
    with arguments.main_process_first(desc="tokenizing"):
        examples = trained.examples(first, loaded.processing, _base(loaded.model))
    for option, number in rows_cut(trained, examples).items():
        limit, of = f"{option}={getattr(trained.config, option)}", "the first " if config.data.streaming else ""
        logger.warning(f"{number} of {of}{len(examples)} rows to train on reach {limit}, which longer ones are cut to")
    model = choose_parameters(config, loaded)
    read_as_saved(model)
    rows = examples
    if isinstance(train, Stream):
        parts = (trained, train, loaded.processing, _base(loaded.model), arguments)
        rows = endless(*parts, first=examples, seed=config.seed)
    trainer = _trainer(config, trained, arguments, model, loaded, rows, held_out)
    placed = dataclasses.replace(loaded, model=trainer.model)
    with arguments.main_process_first(desc="tokenizing"):
        measurements = prepare_measurements(config.measured(trained), held_out, placed)
        recall = prepare_recall(config, placed, held_out)
    if checkpoint is not None:
        check_kept(trainer, checkpoint)
        check_rows(config, rows_per_step(trainer))
        _check_steps(trainer, checkpoint)
    return Finetune(
        config=config,
        trained=trained,
        loaded=loaded,
        trainer=trainer,
        examples=examples,
        measurements=measurements,
        recall=recall,
        checkpoint=checkpoint,
    )


def check_output(config: FinetuneConfig, *, resume: bool) -> str | None:
    """The checkpoint in ``config.output_dir`` that a run goes on from, or None; ValueError where it cannot be run."""
    need("accelerate", "train")
    if check_folder(config.output_dir).resolve() == Path(config.model).expanduser().resolve():
        raise ValueError(f"output_dir={config.output_dir!r} is the model's own folder; allowed: another")
    return check_resume(config, resume=resume)


def rows_per_step(trainer: Any) -> int:
    """Rows that a step is made from: of all batches whose gradients are added, in all processes that have others."""
    return trainer.get_total_train_batch_size(trainer.args)


def _check_steps(trainer: Any, checkpoint: str) -> None:
    """Have Trainer train nothing where the checkpoint is the end of the run: it would train one step more.

    Raises:
        ValueError: the checkpoint is beyond the end of the run.
    """
    asked = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    done = steps_of(checkpoint) or 0
    if done > asked:
        raise ValueError(
            f"{checkpoint} has {done} steps behind it, and the settings ask for {asked}; ask for at least as many, "
            "or name another output_dir"
        )
    if done == asked:
        train_no_more(trainer)
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
        # Other schedules divide by the number of steps.
        trainer.args.lr_scheduler_type, trainer.args.lr_scheduler_kwargs = "constant", None


def rows_cut(trained: TrainableTask, rows: Any) -> dict[str, int]:
    """Option that cuts rows -> how many rows have the length that it cuts to; those that none reaches are left out."""
    counts = {
        option: sum(length >= getattr(trained.config, option) for length in lengths)
        for option, lengths in trained.lengths(rows).items()
    }
    return {option: number for option, number in counts.items() if number}


def check_weights(out: Path) -> None:
    """Raise a RuntimeError where Trainer has written no model, which it does for some ways of sharding."""
    kinds = ("model*.safetensors", "adapter_model*", "pytorch_model*.bin")
    if not any(path for kind in kinds for path in out.glob(kind)):
        raise RuntimeError(
            f"Trainer wrote no weights into {out}: with this way of sharding they are kept in checkpoints alone; the "
            f"last one in {out} has them, in shards"
        )


def base_of(model: Any, loaded: Loaded) -> str:
    """What a model, or an adapter, was made from."""
    peft = getattr(getattr(model, "transformers_model", model), "peft_config", None)
    return loaded.source if peft is None else next(iter(peft.values())).base_model_name_or_path


def _check_teacher(config: FinetuneConfig, loaded: Loaded) -> None:
    """Raise a ValueError where the model with its own attention has nothing to teach."""
    if not any(row.plugin for row in describe_attention(loaded.model)):
        raise ValueError(
            f"loss={config.loss!r} holds a model to itself with its own attention, and {config.model} has no other; "
            "name an attention, or take loss='task'"
        )
    untrained = [name for name in loaded.fresh if not in_slot(name)]
    if untrained:
        raise ValueError(
            f"loss={config.loss!r} holds a model to what it says with its own attention, and {config.model} has no "
            f"weights for {', '.join(untrained[:3])}; allowed here: loss='task'"
        )


def choose_parameters(config: FinetuneConfig, loaded: Loaded) -> nn.Module:
    """Make trainable what ``config.tune`` says, and nothing else. An adapter trains on as it is.

    Raises:
        ValueError: nothing is left to train, or PEFT cannot place its adapters.
    """
    outer = loaded.model
    model = getattr(outer, "transformers_model", outer)  # the one in a SentenceTransformer
    new = [name for name, _ in model.named_parameters() if in_slot(name) or name in loaded.fresh]
    if hasattr(model, "peft_config"):
        if config.tune != "lora" or config.lora:
            wrong = f"tune={config.tune!r}" if config.tune != "lora" else f"lora options {sorted(config.lora)}"
            raise ValueError(
                f"{config.model} is a PEFT adapter, which trains on as it is, with tune='lora' and no lora options; "
                f"got {wrong}. Fine-tune its base model, or merge it first"
            )
        return outer
    if config.tune == "full":
        return outer.requires_grad_(True)
    if config.tune == "new":
        if not new:
            raise ValueError(
                "tune='new' trains the weights that the checkpoint did not hold, and there are none: "
                "this attention has no weights of its own; allowed here: lora, full"
            )
        outer.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in new)
        return outer
    return with_lora(config, loaded, model, new)


def _trainer(
    config: FinetuneConfig, trained: TrainableTask, arguments: Any, model: Any, loaded: Loaded, rows: Any, held_out: Any
) -> Any:
    from attn_plugins.training.distillation_trainer import DistillationTrainer

    processing, evaluated = loaded.processing, None
    if arguments.eval_strategy != "no":
        evaluated = trained.examples(held_out, processing, _base(model))
    checkpointed = arguments.gradient_checkpointing or getattr(arguments, "activation_checkpointing", False)
    if checkpointed and config.tune != "full":
        unwrap(model).enable_input_require_grads()  # reentrant checkpoints of frozen weights would pass no gradient on
    parts: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": rows,
        "eval_dataset": evaluated,
        "data_collator": trained.collator(processing, _base(model)),
        "processing_class": processing,
        "compute_metrics": trained.training_metrics(processing),
        "callbacks": early_stopping(config),
    }
    if isinstance(parts["data_collator"], TrainerCallback):
        parts["callbacks"] = [*parts["callbacks"], parts["data_collator"]]
    if config.loss == "task":
        trainer = trained.make_trainer(**parts)
        scale_loss_once(trainer)
        return trainer
    return DistillationTrainer(**parts, loss=config.loss, temperature=config.temperature)


def _best(trainer: Any) -> dict[str, Any] | None:
    """Which checkpoint the model is of, where it is the best one."""
    if not trainer.args.load_best_model_at_end or trainer.state.best_model_checkpoint is None:
        return None
    step = steps_of(trainer.state.best_model_checkpoint)
    return {"step": step, trainer.args.metric_for_best_model: trainer.state.best_metric}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: in all, of those that train, and of those that belong to attentions."""
    return {
        "total": size_of(model.parameters()),
        "trained": size_of(p for p in model.parameters() if p.requires_grad),
        "attention": sum(row.new_params for row in describe_attention(model)),
    }


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
