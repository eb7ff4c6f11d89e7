"""Tasks, one a file, imported like attentions: a model and held-out rows become figures, and some are trained for."""

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.core.options import did_you_mean, require, shown
from attn_plugins.core.registry import Registry

WANTED = ("metric", "better", "model")
"""Attributes that a task has to set."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Base of every task's ``Config``."""

    batch_size: int = 1
    """Rows measured at once."""

    require = require

    def __post_init__(self) -> None:
        self.require(self.batch_size >= 1, "batch_size", "at least 1")


Sums = dict[str, Any]
"""What a task counts: tensors, which are added up, and lists, which are laid end to end."""


class Task:
    """What a model is measured by.

    A subclass has a nested ``Config`` on :class:`TaskConfig` and implements ``prepare``, ``score`` and ``finish``.
    """

    name: ClassVar[str]
    """Set by :func:`register_task`."""
    metric: ClassVar[str]
    """The figure that stands for the task in tables, a key of what ``finish`` returns."""
    better: ClassVar[str]
    """lower or higher."""
    model: ClassVar[str]
    """What it is for, a key of :data:`attn_plugins.tasks.kinds.KINDS`."""
    columns: ClassVar[tuple[str, ...]] = ("text",)
    """What a row has, by roles of :data:`attn_plugins.data.columns.ROLES`."""
    recalls: ClassVar[bool] = False
    """Whether it shows if a model still finds what stood far away."""

    Config: ClassVar[type[TaskConfig]] = TaskConfig

    def __init__(self, config: Any = None):
        self.config: Any = self.Config() if config is None else config

    def prepare(self, data: Any, processing: Any, model: nn.Module) -> list[dict[str, Any]]:
        """Batches of inputs from held-out rows; ValueError where they don't fit.

        Args:
            data: rows with the task's ``columns``.
            processing: the tokenizer, or for other inputs than one text the processor, that goes with the model.

        Returns:
            mappings, of tensors and what else ``score`` wants to know of a batch.
        """
        raise NotImplementedError

    def score(self, model: nn.Module, batch: dict[str, Any]) -> Sums:
        """What is counted over one batch: float64 tensors of the same shapes for every batch, which are added up, and
        lists of what JSON holds, such as texts that the model wrote, which are laid end to end in the order of the
        batches; over all processes, where several share the work."""
        raise NotImplementedError

    def finish(self, sums: Sums) -> dict[str, Any]:
        """The figures, as JSON holds them, from the sums over all batches."""
        raise NotImplementedError


class TrainableTask(Task):
    """A task that models are fine-tuned for, too, with its options: how rows become examples, and examples batches."""

    trained_as: ClassVar[str] = ""
    """What ``finetune`` calls it; the task's name, unless this says otherwise."""
    pipeline_tag: ClassVar[str]
    """What the hub calls the use of such a model."""
    row: ClassVar[str]
    """What a row of training is, for reports: a text, a picture."""
    trainer: ClassVar[str] = "Trainer"
    """Name of transformers' class that trains for it, Trainer or Seq2SeqTrainer; for a class of another library the
    task brings its own ``arguments`` and ``make_trainer``."""
    targets: ClassVar[tuple[str, ...]] = ("labels",)
    """What of a batch says the right answers, by the names that the model takes them by."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Settings of its trainer, where ``training`` does not give them."""
    distils: ClassVar[bool] = True
    """Whether its batches are what a model is called with, so that it can be held to itself (loss='kl' or 'hidden')."""

    @abc.abstractmethod
    def examples(self, data: Any, processing: Any, model: nn.Module) -> Any:
        """A ``datasets.Dataset`` of inputs to train on, from rows with the task's ``columns``; ValueError where they
        don't fit."""

    @abc.abstractmethod
    def collator(self, processing: Any, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]] | None:
        """What makes a batch, with the ``targets``, of a list of examples; None for what its trainer makes it by.

        One that is a TrainerCallback is told what Trainer does, so that it can draw by the epoch: what a global
        generator drew does not come back in a run that goes on, since Trainer reads one batch ahead.
        """

    def blank(self, number: int, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """A batch of so many rows, whatever they hold, where all are of one length; None where it takes rows to tell.

        Raises:
            ValueError: rows are longer than the model takes.
        """
        return None

    def labels(self, data: Any) -> list[str] | None:
        """Names of the classes that a model's head is to have, from the rows to train on; ValueError where there is
        nothing to tell apart. None where it has no classes."""
        return None

    def training_metrics(self, processing: Any) -> Callable[[Any], dict[str, float]] | None:
        """Figures of Trainer's own evaluation while it trains, beside the loss: a function of its EvalPrediction."""
        return None

    def limits(self) -> dict[str, str]:
        """Field of an example -> the option that says how long it may be, where longer ones are cut."""
        return {}

    def lengths(self, rows: Any) -> dict[str, list[int]]:
        """Option of ``limits`` -> the length of each of these examples, as the option counts it."""
        return {option: [len(value) for value in rows[field]] for field, option in self.limits().items()}

    def arguments(self) -> Any:
        """Class of the settings that its trainer takes: TrainingArguments, or one built on it.

        Raises:
            ValueError: it is of a library that is not installed.
        """
        import transformers

        return getattr(transformers, self.trainer.replace("Trainer", "TrainingArguments"))

    def make_trainer(self, **parts: Any) -> Any:
        """Its trainer: Trainer, or what is built on it.

        Args:
            parts: what Trainer takes, by its names: model, args, train_dataset, eval_dataset, data_collator,
                processing_class, compute_metrics.
        """
        import transformers

        return getattr(transformers, self.trainer)(**parts)

    @classmethod
    def called(cls) -> str:
        """What ``finetune`` calls it."""
        return cls.trained_as or cls.name

    def row_of(self) -> str:
        """What a row is, with its size where all have the same."""
        return self.row


def _lacks(cls: Any) -> list[str]:
    wanted = [*WANTED, *(("pipeline_tag", "row") if issubclass(cls, TrainableTask) else ())]
    return [what for what in wanted if not hasattr(cls, what)]


TASKS: Registry[Task] = Registry("task", __name__, _lacks, dashes=True)

register_task, list_tasks, get_task = TASKS.register, TASKS.names, TASKS.get


def trained_tasks() -> dict[str, type[TrainableTask]]:
    """What ``finetune`` calls each task that it trains for -> its class."""
    found = [cls for cls in map(get_task, list_tasks()) if issubclass(cls, TrainableTask)]
    return {cls.called(): cls for cls in sorted(found, key=lambda cls: cls.called())}


def trained_task(name: str) -> type[TrainableTask]:
    """The task that ``finetune`` calls so; ValueError with all of them where there is none."""
    known = trained_tasks()
    if name not in known:
        raise ValueError(f"task={shown(name)}{did_you_mean(name, known)}; allowed: {', '.join(known)}")
    return known[name]


def run_task(
    task: Task, model: nn.Module, batches: list[dict[str, Any]], *, progress: str | None = None
) -> dict[str, Any]:
    """Measure a model on prepared batches, each process its share of them.

    Args:
        model: in any mode; it is put into evaluation mode for the time being.
        batches: what ``task.prepare`` gave, the same in all processes.
        progress: label of the progress bar, or None for no bar.

    Returns:
        what ``task.finish`` makes of the sums; the same in all processes. Where attentions of the model have branches,
        "branches" holds the task's figure with each of them alone: one that is idle shows in no other figure.
    """
    figures = _run(task, model, batches, progress)
    slots = [module for module in model.modules() if isinstance(module, Attention) and module.branches]
    for branch in dict.fromkeys(branch for slot in slots for branch in slot.branches):
        having = [(slot, slot.branch) for slot in slots if branch in slot.branches]
        try:
            for slot, _ in having:
                slot.branch = branch
            alone = _run(task, model, batches, progress and f"{progress}, {branch} alone")
        finally:
            for slot, before in having:
                slot.branch = before
        figures.setdefault("branches", {})[branch] = alone[task.metric]
    return figures


def rows_of(figures: dict[str, Any], metric: str) -> dict[str, float]:
    """What a task found as rows of a table, label -> number: positions, distances, lengths, branches, parts too.

    Args:
        metric: the task's.
    """
    rows: dict[str, float] = {}
    for name, value in figures.items():
        if name == "by_part":
            for part, its in value.items():
                rows |= {f"{part}: {label}": number for label, number in rows_of(its, metric).items()}
        elif name == "branches":
            rows |= {f"with the branch {branch!r} alone": number for branch, number in value.items()}
        elif isinstance(value, list):
            rows |= {f"{metric} at {place_of(part)}": part[metric] for part in value}
        else:
            rows[name] = value
    return rows


def place_of(part: dict[str, Any]) -> str:
    """Where the figures of a part of a text, or of rows, hold: at which distance, length, pairs, or positions."""
    for name in ("distance", "length", "pairs"):
        if name in part:
            return f"{name} {part[name]}"
    return f"positions {part['from']} to {part['to']}"


def figure(value: float) -> str:
    """A figure as tables show it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _run(task: Task, model: nn.Module, batches: list[dict[str, Any]], progress: str | None) -> dict[str, Any]:
    from tqdm.auto import tqdm

    rank, world = _place()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: Sums = {}
    lists: dict[str, list[tuple[int, list[Any]]]] = {}
    try:
        steps = list(_share(len(batches), rank, world))
        for index, counts in tqdm(steps, desc=progress, leave=False, disable=progress is None or rank != 0):
            with torch.no_grad():
                scored = task.score(model, _on_device(batches[index], device))
            for name, value in scored.items():
                if isinstance(value, list):
                    lists.setdefault(name, []).extend([(index, value)] * counts)
                    continue
                value = value.double().cpu() * counts
                sums[name] = value if name not in sums else sums[name] + value
    finally:
        model.train(was_training)
    if world > 1:
        for name in sorted(sums):  # tensors, so far
            shared = sums[name].to(device) if torch.distributed.get_backend() == "nccl" else sums[name]
            torch.distributed.all_reduce(shared)
            sums[name] = shared.cpu()
        for name in sorted(lists):
            parts: list[Any] = [None] * world
            torch.distributed.all_gather_object(parts, lists[name])
            lists[name] = [batch for part in parts for batch in part]
    for name, batches_of_items in lists.items():
        in_order = sorted(batches_of_items, key=lambda batch: batch[0])
        sums[name] = [item for _, items in in_order for item in items]
    return task.finish(sums)


def _on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _place() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


def _share(total: int, rank: int, world: int) -> Iterator[tuple[int, int]]:
    """(index, 1) of this process's batches; (0, 0) is filler: a sharded model needs all processes in every step."""
    for start in range(0, total, world):
        index = start + rank
        yield (index, 1) if index < total else (0, 0)
