"""Benchmark tasks, one a file, imported like attentions. A task turns a model and held-out text into figures."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.core.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Base of every task's ``Config``."""

    batch_size: int = 1
    """Rows measured at once."""

    def __post_init__(self) -> None:
        self.require(self.batch_size >= 1, "batch_size", "at least 1")

    def require(self, condition: bool, option: str, allowed: str) -> None:
        """Raise a ValueError that names ``option``, its value and ``allowed`` unless ``condition`` holds."""
        if not condition:
            raise ValueError(f"{option}={getattr(self, option)!r}; allowed: {allowed}")


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


T = TypeVar("T", bound=type[Task])

_tasks: dict[str, type[Task]] = {}


def register_task(name: str) -> Callable[[T], T]:
    """Class decorator that puts a :class:`Task` into the registry under ``name``."""

    def register(cls: T) -> T:
        taken = _tasks.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"task {name!r} is already registered by {taken.__module__}.{taken.__qualname__}")
        cls.name = name
        _tasks[name] = cls
        return cls

    return register


def list_tasks() -> list[str]:
    """Names of all tasks, sorted."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_tasks)


def get_task(name: str) -> type[Task]:
    """The class registered under ``name``; ValueError with the known names where there is none."""
    known = list_tasks()
    if name not in known:
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return _tasks[name]


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
