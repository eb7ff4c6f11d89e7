"""Settings of a comparison: which models with which attentions, and what is measured of them."""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from typing import Any

from attn_plugins.benchmark.compare.cost import CostConfig
from attn_plugins.benchmark.compare.models import (
    NOT_IN_TRANSFER,
    learns,
    refuse_keys,
    spelled_out,
    transfer_config,
)
from attn_plugins.benchmark.cost.timing import Pass
from attn_plugins.config.yaml import read_yaml_file
from attn_plugins.core.options import build
from attn_plugins.data.sources import DataConfig, no_data
from attn_plugins.tasks import Task, get_task, trained_task
from attn_plugins.training.config import FinetuneConfig, evaluation_tasks
from attn_plugins.training.models import AS_SAVED, Dtype
from attn_plugins.training.new_models import is_new, spelled_model

NOT_IN_FINETUNE = ("model", "attention", "data", "evaluation", "output_dir", "seed", "dtype")
NOT_OF_A_FILE = ("evaluate_before", "recall")
"""Of a fine-tune's own file: what a comparison has rows and columns for."""


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """At which lengths the passes of models are measured, against the baseline's."""

    lengths: dict[str, list[int]]
    """Scope -> lengths in tokens: "model" is the whole model, "attention" its attention layers alone."""
    passes: list[Pass] | dict[str, list[Pass]] = field(default_factory=lambda: list(typing.get_args(Pass)))
    """forward: without autograd. forward_backward: as in a fine-tune with adapters. A list, or one for each scope."""
    batch_size: int = 1
    """Rows in a pass."""

    def __post_init__(self) -> None:
        wrong = sorted(set(self.lengths) - {"model", "attention"})
        if wrong or not self.lengths:
            raise ValueError(f"lengths has the scopes {wrong or 'of none'}; allowed: model, attention")
        if isinstance(self.passes, dict) and set(self.passes) != set(self.lengths):
            raise ValueError(
                f"passes has the scopes {sorted(self.passes)}; allowed: those of lengths, {sorted(self.lengths)}"
            )
        if not all(self.passes_of(scope) and self.lengths[scope] for scope in self.lengths):
            raise ValueError("passes and lengths must name at least one for each scope")
        if self.batch_size < 1 or any(length < 1 for lengths in self.lengths.values() for length in lengths):
            raise ValueError("batch_size and lengths must be at least 1")

    def passes_of(self, scope: str) -> list[Pass]:
        """The passes that are measured in a scope."""
        return self.passes[scope] if isinstance(self.passes, dict) else self.passes


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(PassConfig):
    """Passes timed side by side with the baseline's."""

    rounds: int = 5
    """Rounds of timing; each runs the attention and the baseline once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}; allowed: at least 1")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Which models with which attentions, and what is measured of them."""

    models: dict[str, Any]
    """Label -> a folder, a name on the hub, or "smollm2-135m-demo"; or one without weights, as a fine-tune names it."""
    attentions: dict[str, Any]
    """Label -> rules, a YAML file of rules, or null for the model's own attention; ``{choose: settings}``, as for
    ``attn-plugins choose``, for rules that are chosen on the training text when the cell runs."""
    output_dir: str
    """Where results.jsonl, report.md and the plots go."""
    baseline: str = "dense"
    """Label of the attention that speed and memory are compared with."""
    bar: str | None = None
    """Label of the attention whose untrained row every trained one has to beat, such as a window with sink tokens."""
    data: DataConfig | None = None
    """Text for evaluation and fine-tuning."""
    evaluation: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict)
    """Task and options, as for ``attn-plugins evaluate``, or a list of these: columns, the first with all its parts."""
    untrained: bool = True
    """Evaluate each attention as it is swapped in, before any training; needs data."""
    transfer: dict[str, Any] | None = None
    """Settings of a transfer, as for ``attn-plugins transfer``; each attention that brings weights is evaluated after
    it, and its fine-tune starts from there. Null: none."""
    transfer_of: list[str] | None = None
    """Labels of the attentions that the transfer is for. Null: all that bring weights."""
    finetune: dict[str, Any] | str | None = None
    """Settings of a fine-tune, as for ``attn-plugins finetune``; each attention is evaluated after it. Null: none. Or
    the YAML file of one, whose ``data`` and ``evaluation`` count where there are none here."""
    speed: SpeedConfig | None = None
    """Null to leave speed out."""
    memory: PassConfig | None = None
    """Null to leave peak memory out."""
    cost: CostConfig | None = None
    """Null to leave out what whole models cost: cache, a token, a step of training, the attention on paper."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Evaluation and fine-tune run once for each; speed, memory and cost with the first."""
    dtype: Dtype = "float32"
    """What weights are loaded in."""

    def __post_init__(self) -> None:
        if isinstance(self.finetune, str):
            self._read_finetune(self.finetune)
        if self.data is None and self._makes_rows():
            object.__setattr__(self, "data", no_data())
        for what in ("models", "attentions", "seeds"):
            if not getattr(self, what):
                raise ValueError(f"{what} is empty; at least one is needed")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds}; allowed: each once")
        for what, label in (("baseline", self.baseline), ("bar", self.bar)):
            if label is not None and label not in self.attentions:
                raise ValueError(f"{what}={label!r} is none of the attentions; allowed: {', '.join(self.attentions)}")
        for stage in ("transfer", "finetune"):
            if getattr(self, stage) is not None and self.data is None:
                raise ValueError(f"{stage} needs data")
        if self.data is None and self.speed is None and self.memory is None and self.cost is None:
            allowed = "any of data (with untrained or finetune), speed, memory, cost"
            raise ValueError(f"nothing is measured; allowed: {allowed}")
        models = {}
        for label, value in self.models.items():
            try:
                models[label] = spelled_model(value)
            except ValueError as error:
                raise ValueError(f"models.{label}: {error}") from None
            if is_new(models[label]) and self.untrained and self.data is not None:
                raise ValueError(
                    f"models.{label} has no weights, and says nothing untrained; allowed: untrained: false"
                )
        object.__setattr__(self, "models", models)
        stems = [file_stem(label) for label in self.models]
        if len(set(stems)) < len(stems):
            raise ValueError(
                f"models: the labels {', '.join(self.models)} give files of the same name; allowed: labels that "
                "differ in letters, digits, dots or dashes, within the first 80"
            )
        rules: dict[str, Any] = {}
        for label, value in self.attentions.items():
            try:
                rules[label] = spelled_out(value, self.data)
            except ValueError as error:
                raise ValueError(f"attentions.{label}: {error}") from None
        object.__setattr__(self, "attentions", rules)
        if self.transfer is not None:
            having = [label for label, value in self.attentions.items() if learns(value)]
            for label in self.transfer_of or ():
                if label not in having:
                    allowed = ", ".join(having) or "none here"
                    raise ValueError(f"transfer_of has {label!r}; allowed: those that bring weights: {allowed}")
            refuse_keys(self.transfer, NOT_IN_TRANSFER, "transfer")
            transfer_config(self, next(iter(self.models.values())), AS_SAVED, self.seeds[0], "runs")
        if self.finetune is not None:
            assert isinstance(self.finetune, dict)
            refuse_keys(self.finetune, NOT_IN_FINETUNE, "finetune")
        self.tasks  # noqa: B018, shows what is wrong in them

    def _makes_rows(self) -> bool:
        """Whether the task that is trained for, or else measured, makes its rows itself."""
        if isinstance(self.finetune, dict):
            return "task" in self.finetune and not trained_task(self.finetune["task"]).columns
        named = self.evaluation[0] if isinstance(self.evaluation, list) and self.evaluation else self.evaluation
        return isinstance(named, dict) and "task" in named and not get_task(named["task"]).columns

    def _read_finetune(self, path: str) -> None:
        given = read_yaml_file(path, "finetune ")
        if not isinstance(given, dict):
            raise ValueError(f"finetune {path} is {given!r}; allowed: settings of a fine-tune")
        if self.data is None and "data" in given:
            object.__setattr__(self, "data", build(DataConfig, given["data"], f"{path}: data"))
        if not self.evaluation:
            object.__setattr__(self, "evaluation", given.get("evaluation", {}))
        own = {key: value for key, value in given.items() if key not in NOT_IN_FINETUNE + NOT_OF_A_FILE}
        object.__setattr__(self, "finetune", own)

    @property
    def tasks(self) -> list[Task]:
        """The evaluation's tasks."""
        if self.finetune is None:
            return evaluation_tasks(self.evaluation)
        config = finetune_config(self, next(iter(self.models.values())), None, self.seeds[0], "runs")
        return config.measured(config.trained())

    @property
    def task(self) -> Task:
        """The one that stands for the others."""
        return self.tasks[0]


def finetune_config(config: CompareConfig, source: str, rules: Any, seed: int, output_dir: str) -> FinetuneConfig:
    """The fine-tune of one cell."""
    assert isinstance(config.finetune, dict)
    fixed = {"model": source, "attention": rules, "seed": seed, "output_dir": output_dir, "dtype": config.dtype}
    data = dataclasses.asdict(config.data) if config.data is not None else None
    # Recall is a column, where it is asked for.
    tree = {"recall": False, **config.finetune, **fixed, "data": data, "evaluation": config.evaluation}
    return build(FinetuneConfig, tree, "finetune")


def file_stem(label: str) -> str:
    """A label as the beginning of a file's name."""
    return re.sub(r"[^\w.-]+", "-", label)[:80]
