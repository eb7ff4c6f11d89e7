"""Benchmark tasks, one a file, imported like attentions. A task turns a model and held-out text into figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.core.options import require
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


class Task:
    """One benchmark task.

    A subclass has a nested ``Config`` on :class:`TaskConfig` and implements ``prepare``, ``score`` and ``finish``. What
    ``score`` returns is summed over all batches, and over all processes where several share the work.
    """

    name: ClassVar[str]
    """Set by :func:`register_task`."""
    metric: ClassVar[str]
    """The figure that stands for the task in tables, a key of what ``finish`` returns."""
    better: ClassVar[str]
    """lower or higher."""
    model: ClassVar[Literal["causal-lm", "classification"]]
    """What it is for."""
    labelled: ClassVar[bool] = False
    """Whether rows need a label."""
    recalls: ClassVar[bool] = False
    """Whether it shows if a model still finds what stood far away."""

    Config: ClassVar[type[TaskConfig]] = TaskConfig

    def __init__(self, config: Any = None):
        self.config: Any = self.Config() if config is None else config

    def prepare(self, data: Any, tokenizer: Any, model: nn.Module) -> list[dict[str, torch.Tensor]]:
        """Batches of inputs from rows with the columns ``text`` (and ``label``); ValueError where they don't fit."""
        raise NotImplementedError

    def score(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over one batch, float64 tensors of the same shapes for every batch."""
        raise NotImplementedError

    def finish(self, sums: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The figures, as JSON holds them, from the sums over all batches."""
        raise NotImplementedError


TASKS: Registry[Task] = Registry("task", __name__, lambda cls: [what for what in WANTED if not hasattr(cls, what)])

register_task, list_tasks, get_task = TASKS.register, TASKS.names, TASKS.get


def run_task(
    task: Task, model: nn.Module, batches: list[dict[str, torch.Tensor]], *, progress: str | None = None
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
    """What a task found as rows of a table, label -> number: ranges of positions, distances, branches, parts too.

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
    """Where the figures of a part of a text hold: at which distance, or at which positions."""
    return f"distance {part['distance']}" if "distance" in part else f"positions {part['from']} to {part['to']}"


def figure(value: float) -> str:
    """A figure as tables show it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _run(task: Task, model: nn.Module, batches: list[dict[str, torch.Tensor]], progress: str | None) -> dict[str, Any]:
    from tqdm.auto import tqdm

    rank, world = _place()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    try:
        steps = list(_share(len(batches), rank, world))
        for index, counts in tqdm(steps, desc=progress, leave=False, disable=progress is None or rank != 0):
            batch = {name: tensor.to(device) for name, tensor in batches[index].items()}
            with torch.no_grad():
                scored = task.score(model, batch)
            for name, value in scored.items():
                value = value.double().cpu() * counts
                sums[name] = value if name not in sums else sums[name] + value
    finally:
        model.train(was_training)
    if world > 1:
        for name in sorted(sums):
            shared = sums[name].to(device) if torch.distributed.get_backend() == "nccl" else sums[name]
            torch.distributed.all_reduce(shared)
            sums[name] = shared.cpu()
    return task.finish(sums)


def _place() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


def _share(total: int, rank: int, world: int) -> Iterator[tuple[int, int]]:
    """(index, 1) of this process's batches; (0, 0) is filler: a sharded model needs all processes in every step."""
    for start in range(0, total, world):
        index = start + rank
        yield (index, 1) if index < total else (0, 0)
