"""The cells of a comparison: model x attention x measurement x seed, and what the result of each depends on."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.models import learns
from attn_plugins.benchmark.results.store import hash_of
from attn_plugins.tasks import get_task, trained_task
from attn_plugins.training.config import DEFAULT_TASK, FinetuneConfig

FORMAT = 1
"""Part of every cell's key: raise it when a measurement changes its meaning, so that old results are not reused."""

Measure = Literal["evaluate", "transfer", "finetune", "speed", "memory", "cost"]


@dataclass(frozen=True, kw_only=True)
class CompareCell:
    """One figure, or one set of them, that is measured at a time."""

    model: str
    attention: str
    """Labels, for people."""
    measure: Measure
    seed: int
    settings: dict[str, Any]
    """All that the result depends on: sources, rules, options. The labels are not in it."""
    part: str | None = None
    """Label of the comparison in a suite; None where it stands alone."""

    @property
    def key(self) -> str:
        """Hash of all that the result depends on."""
        whole = {"format": FORMAT, "measure": self.measure, "seed": self.seed, **self.settings}
        return hash_of(whole)

    @property
    def labels(self) -> dict[str, Any]:
        part = {} if self.part is None else {"part": self.part}
        return part | {name: getattr(self, name) for name in ("model", "attention", "measure", "seed")}

    @property
    def timed(self) -> bool:
        """Whether other work beside it would change the result."""
        counted = self.settings.get("what") in ("cache", "paper")
        return self.measure not in ("evaluate", "transfer", "finetune") and not counted

    def __str__(self) -> str:
        place = [str(self.settings[name]) for name in ("what", "scope", "length") if name in self.settings]
        part = [] if self.part is None else [self.part]
        return " · ".join([*part, self.model, self.attention, self.measure, *place, f"seed {self.seed}"])


def cells(config: CompareConfig, part: str | None = None) -> list[CompareCell]:
    """All cells of a comparison, attention by attention; what trains comes last, since it takes longest.

    Args:
        part: its name in a suite.
    """
    found: list[CompareCell] = []
    for label, source in config.models.items():
        for attention in config.attentions:
            found += (dataclasses.replace(cell, part=part) for cell in _cells_of(config, label, source, attention))
    return sorted(found, key=lambda cell: {"transfer": 1, "finetune": 2}.get(cell.measure, 0))


def taught(config: CompareConfig) -> list[str]:
    """Labels of the attentions that the transfer is for."""
    found = [label for label, value in config.attentions.items() if learns(value)]
    return found if config.transfer_of is None else config.transfer_of


def _cells_of(config: CompareConfig, model: str, source: str, attention: str) -> Iterator[CompareCell]:
    base = {"model": source, "rules": config.attentions[attention], "dtype": config.dtype}
    data = None if config.data is None else dataclasses.asdict(config.data)
    names = {"model": model, "attention": attention}
    for seed in config.seeds:
        quality = {**base, "data": data, "evaluation": config.evaluation}
        without = {"evaluation": _spelled_evaluation(config)}
        if config.untrained and config.data is not None:
            yield CompareCell(**names, measure="evaluate", seed=seed, settings=quality | without)
        if config.transfer is not None and attention in taught(config):
            quality["transfer"] = config.transfer
            yield CompareCell(**names, measure="transfer", seed=seed, settings=quality | without)
        if config.finetune is not None:
            yield CompareCell(**names, measure="finetune", seed=seed, settings={**quality, "finetune": config.finetune})
    kind = config.task.model
    for measure, passes in (("speed", config.speed), ("memory", config.memory)):
        if passes is None:
            continue
        options = {name: getattr(passes, name) for name in ("batch_size", "rounds") if hasattr(passes, name)}
        options |= {} if kind == get_task(DEFAULT_TASK).model else {"kind": kind}  # a head for classes is no other's
        if measure == "speed":
            options["baseline"] = config.attentions[config.baseline]
        for scope, lengths in passes.lengths.items():
            for length in lengths:
                where = {"scope": scope, "length": length, "passes": passes.passes_of(scope)}
                yield CompareCell(**names, measure=measure, seed=config.seeds[0], settings={**base, **options, **where})  # type: ignore[arg-type]
    if config.cost is not None:
        for what in config.cost.what:
            options = config.cost.settings(what, config.attentions[config.baseline], kind)
            for length in config.cost.lengths:
                settings = {**base, **options, "length": length}
                yield CompareCell(**names, measure="cost", seed=config.seeds[0], settings=settings)


def _spelled_evaluation(config: CompareConfig) -> dict[str, Any] | list[dict[str, Any]]:
    """The evaluation as it is without the fine-tune, whose task and options it may leave to that."""
    assert not isinstance(config.finetune, str)
    given = config.finetune or {}
    if not {"task", "options"} & {*given}:
        return config.evaluation
    trained = trained_task(given.get("task", FinetuneConfig.task)).name

    def spelled(one: dict[str, Any]) -> dict[str, Any]:
        name = one.get("task", trained)
        return {**(given.get("options", {}) if name == trained else {}), **one, "task": name}

    asked = config.evaluation
    return [*map(spelled, asked)] if isinstance(asked, list) else spelled(asked)
