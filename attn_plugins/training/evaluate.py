"""Measure one model on held-out text with one task."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attn_plugins.config.output import check_file
from attn_plugins.data.columns import ROLES
from attn_plugins.data.sources import load_data
from attn_plugins.hf.checkpoints.card import kinds_of
from attn_plugins.hf.swap import AttentionRows, describe_attention
from attn_plugins.tasks import Task, get_task, run_task
from attn_plugins.training.config import EvaluateConfig, evaluation_tasks
from attn_plugins.training.models import Loaded, in_slot, load
from attn_plugins.training.processes import in_cpu_run, is_main_process, read_whole, start_processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A task, and batches that it was prepared for."""

    task: Task
    batches: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation whose inputs are all there: what can be wrong in a config has shown by now."""

    config: EvaluateConfig
    measurements: list[Measurement]
    """The first stands for the rest."""
    loaded: Loaded

    def run(self) -> dict[str, Any]:
        """Measure; the result is also written to ``config.output`` where that is set."""
        started = time.perf_counter()
        found = run_measurements(self.measurements, self.loaded.model, progress="evaluation")
        task = self.measurements[0].task.name
        result = {
            "task": task,
            "result": found.pop(task),
            "others": found,
            "seconds": round(time.perf_counter() - started, 2),
            "model": self.config.model,
            "attention": attention_summary(self.loaded.model),
            "new_weights": sum(map(in_slot, self.loaded.fresh)),
            "data": dataclasses.asdict(self.config.data),
            "seed": self.config.seed,
        }
        if self.config.output is not None and is_main_process():
            write_json(self.config.output, result)
        return result


def prepare_evaluation(config: EvaluateConfig) -> Evaluation:
    """Load model and data.

    Raises:
        ValueError: something that the config names is not there or does not fit, or the model lacks trained weights
            outside its attention (a classifier's head), so that its figures would say nothing.
    """
    tasks = evaluation_tasks(config.evaluation)
    kind = tasks[0].model
    if config.output is not None:
        check_file(config.output, "output")
    start_processes()
    read_whole()
    _, held_out = load_data(config.data, tasks[0].columns)
    loaded = load(config.model, attention=config.attention, kind=kind, dtype=config.dtype, seed=config.seed)
    untrained = [name for name in loaded.fresh if not in_slot(name)]
    if untrained:
        raise ValueError(
            f"{config.model} holds no weights for {', '.join(untrained[:3])}, "
            f"so {tasks[0].name} would say nothing of it"
        )
    place(loaded)
    measurements = prepare_measurements(tasks, held_out, loaded)
    return Evaluation(config=config, measurements=measurements, loaded=loaded)


def prepare_measurements(tasks: list[Task], held_out: Any, loaded: Loaded) -> list[Measurement]:
    """Each task with its batches of the held-out rows; ValueError where they don't fit.

    Args:
        loaded: the model, where it is to run: a task may ask it something.
    """
    for task in tasks:
        missing = [ROLES[role].option for role in task.columns if role not in held_out.column_names]
        if missing:
            raise ValueError(
                f"evaluation.task={task.name!r} needs {', '.join(missing)}, which {tasks[0].name} reads no rows by; "
                "measure it by a command of its own"
            )
    return [Measurement(task=task, batches=task.prepare(held_out, loaded.processing, loaded.model)) for task in tasks]


def run_measurements(
    measurements: list[Measurement], model: nn.Module, *, progress: str | None
) -> dict[str, dict[str, Any]]:
    """Name of each task -> what it finds of the model."""
    return {
        one.task.name: run_task(one.task, model, one.batches, progress=progress and f"{progress}: {one.task.name}")
        for one in measurements
    }


def attention_summary(model: nn.Module) -> dict[str, Any]:
    """What serves how many of the model's attention modules, as JSON holds it.

    Where they are not all alike, ``map`` holds role -> for each module what serves it, or each of its key/value heads.
    """
    rows = describe_attention(model)
    modules = kinds_of(model)
    found = {"modules": modules, "new_params": sum(row.new_params for row in rows)}
    return found | ({"map": _map(rows)} if len(modules) > 1 else {})


def _map(rows: AttentionRows) -> dict[str, list[list[str]]]:
    modules: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        kind = row.plugin or f"own ({row.implementation})"
        modules.setdefault((row.role, row.path), {}).update(dict.fromkeys(row.kv_heads or (0,), kind))
    found: dict[str, list[list[str]]] = {}
    for (role, _), heads in modules.items():
        found.setdefault(role, []).append([heads[head] for head in sorted(heads)])
    return found


def without_recall(tasks: list[str], attention: dict[str, Any]) -> str | None:
    """What to say where a swapped language model was measured by what does not show what it recalls, else None.

    Args:
        tasks: names of those that were measured.
        attention: what ``attention_summary`` says of the model.
    """
    found = [get_task(name) for name in tasks]
    shown = any(task.recalls for task in found) or found[0].model != "causal-lm"
    if shown or all(kind.startswith("own (") for kind in attention["modules"]):
        return None
    return (
        f"{found[0].name} does not show whether the model still recalls what stood far away, which another attention "
        "may take from it; measure that too: task recall"
    )


def place(loaded: Loaded) -> Loaded:
    """Move a model to the accelerator of this process, if it has one; bitsandbytes has placed its own."""
    moves = getattr(loaded.model, "quantization_method", None) != "bitsandbytes"
    if moves and torch.accelerator.is_available() and not in_cpu_run():
        loaded.model.to(torch.accelerator.current_accelerator())
    return loaded


def write_json(path: str | Path, tree: Any) -> None:
    """Write JSON through a rename, so that a killed run leaves no half a file."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
