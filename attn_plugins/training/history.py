"""What was done to a model before, stage by stage, as the runs that wrote its folder say in metrics.json."""

from pathlib import Path
from typing import Any

from attn_plugins.training.resume import METRICS, read

Stage = dict[str, Any]

KEPT = ("stage", "tune", "loss", "base_model", "data", "train", "evaluation", "errors")
"""Of a run's metrics, what its successors tell of it."""


def stages_of(folder: str | Path) -> list[Stage]:
    """The stages that the model in a folder has behind it, the first one first; none for a pretrained one."""
    metrics = read(Path(folder) / METRICS)
    return [*metrics.get("history", []), stage_of(metrics)] if "train" in metrics else []


def stage_of(metrics: dict[str, Any]) -> Stage:
    """What is told of a run after it."""
    return {name: metrics[name] for name in KEPT if name in metrics}


def pretrained_base(stages: list[Stage]) -> str | None:
    """The model that stages started from, where all of them left its pretrained weights as they were; else None."""
    return stages[0]["base_model"] if stages and all(stage.get("tune") == "new" for stage in stages) else None
