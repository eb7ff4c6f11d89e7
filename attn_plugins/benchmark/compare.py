"""Models x attentions x measurements: each cell runs once, is written down as it ends, and is not run again."""

import dataclasses
import os
import re
import shutil
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from attn_plugins.benchmark import timing
from attn_plugins.benchmark.cells import described, run_cells
from attn_plugins.benchmark.compare_models import (
    NOT_IN_TRANSFER,
    CompareModels,
    learns,
    refuse_keys,
    spelled_out,
    transfer_config,
)
from attn_plugins.benchmark.store import Results, hash_of
from attn_plugins.benchmark.timing import Pass, Scope
from attn_plugins.config.extras import need
from attn_plugins.config.output import check_folder
from attn_plugins.config.yaml import read_yaml_file
from attn_plugins.core.options import build
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.tasks import Task
from attn_plugins.training.config import FinetuneConfig, evaluation_tasks
from attn_plugins.training.evaluate import attention_summary, place, prepare_measurements, run_measurements
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import AS_SAVED, Dtype, Loaded, in_slot, load, skeleton
from attn_plugins.training.resume import finished, same_versions

FORMAT = 1
"""Part of every cell's key: raise it when a measurement changes its meaning, so that old results are not reused."""

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

    models: dict[str, str]
    """Label -> a folder, a name on the hub, or "smollm2-135m-demo"."""
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
    seeds: list[int] = field(default_factory=lambda: [0])
    """Evaluation and fine-tune run once for each; speed and memory with the first."""
    dtype: Dtype = "float32"
    """What weights are loaded in."""

    def __post_init__(self) -> None:
        if isinstance(self.finetune, str):
            self._read_finetune(self.finetune)
        for what in ("models", "attentions", "seeds"):
            if not getattr(self, what):
                raise ValueError(f"{what} is empty; at least one is needed")
        for what, label in (("baseline", self.baseline), ("bar", self.bar)):
            if label is not None and label not in self.attentions:
                raise ValueError(f"{what}={label!r} is none of the attentions; allowed: {', '.join(self.attentions)}")
        for stage in ("transfer", "finetune"):
            if getattr(self, stage) is not None and self.data is None:
                raise ValueError(f"{stage} needs data")
        if self.data is None and self.speed is None and self.memory is None:
            raise ValueError("nothing is measured; allowed: any of data (with untrained or finetune), speed, memory")
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


Measure = Literal["evaluate", "transfer", "finetune", "speed", "memory"]


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

    @property
    def key(self) -> str:
        """Hash of all that the result depends on."""
        whole = {"format": FORMAT, "measure": self.measure, "seed": self.seed, **self.settings}
        return hash_of(whole)

    @property
    def labels(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "attention", "measure", "seed")}

    def __str__(self) -> str:
        place = [str(self.settings[name]) for name in ("scope", "length") if name in self.settings]
        return " · ".join([self.model, self.attention, self.measure, *place, f"seed {self.seed}"])


def cells(config: CompareConfig) -> list[CompareCell]:
    """All cells of a comparison, attention by attention; what trains comes last, since it takes longest."""
    found: list[CompareCell] = []
    for label, source in config.models.items():
        for attention in config.attentions:
            found += _cells_of(config, label, source, attention)
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
        if config.untrained and config.data is not None:
            yield CompareCell(**names, measure="evaluate", seed=seed, settings={**quality})
        if config.transfer is not None and attention in taught(config):
            quality["transfer"] = config.transfer
            yield CompareCell(**names, measure="transfer", seed=seed, settings={**quality})
        if config.finetune is not None:
            yield CompareCell(**names, measure="finetune", seed=seed, settings={**quality, "finetune": config.finetune})
    for measure, passes in (("speed", config.speed), ("memory", config.memory)):
        if passes is None:
            continue
        options = {name: getattr(passes, name) for name in ("batch_size", "rounds") if hasattr(passes, name)}
        if measure == "speed":
            options["baseline"] = config.attentions[config.baseline]
        for scope, lengths in passes.lengths.items():
            for length in lengths:
                where = {"scope": scope, "length": length, "passes": passes.passes_of(scope)}
                yield CompareCell(**names, measure=measure, seed=config.seeds[0], settings={**base, **options, **where})  # type: ignore[arg-type]


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


def prepare_compare(config: CompareConfig) -> Results:
    """What an earlier run of the same comparison has left, once it is clear that this one can start.

    Raises:
        ValueError: a model is not there, results.jsonl is not one, a package is missing, or several processes run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "compare measures time, so it runs in one process; accelerate launch is for finetune and evaluate"
        )
    need("matplotlib", "compare")
    need("peft", "train")
    results = Results(check_folder(config.output_dir) / "results.jsonl")
    for source in config.models.values():
        skeleton(source)
    return results


def run_compare(
    config: CompareConfig, results: Results, *, fresh: bool = False, say: Callable[[str], None] = print
) -> None:
    """Run all cells that have no result of these versions yet, and add theirs to ``results``.

    A cell that fails is recorded with its error, and the others go on.

    Args:
        fresh: run all cells, whatever has been written before.
        say: gets a line of progress at a time.

    Raises:
        ValueError: another run is measuring into the same file.
    """
    models = CompareModels(config, fresh, folder_name)

    def measure(group: list[CompareCell]) -> Iterator[tuple[CompareCell, dict[str, Any]]]:
        (cell,) = group
        started = time.perf_counter()
        outcome: dict[str, Any]
        try:
            outcome = {"status": "ok", "result": _MEASURES[cell.measure](config, cell, models)}
        except Exception as error:  # what one attention cannot do must not end the others
            outcome = {"status": "error", "error": described(error), "traceback": traceback.format_exc()}
            models.drop()
        yield cell, {**outcome, "seconds": round(time.perf_counter() - started, 2)}

    _quiet_loading()
    run_cells([[cell] for cell in cells(config)], results, measure, _note, fresh=fresh, say=say, announce=True)


def _quiet_loading() -> None:
    """No bars or reports for loading weights and cutting text, which every cell repeats; what takes long has a bar."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    need("datasets", "train").disable_progress_bars()


def _evaluate(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    found = _evaluated(config, cell, models.get(cell, cell.attention, cell.seed))
    return found | ({"rules": models.rules(cell)} if isinstance(cell.settings["rules"], dict) else {})


def _evaluated(config: CompareConfig, cell: CompareCell, loaded: Loaded) -> dict[str, Any]:
    assert config.data is not None
    task = config.task
    untrained = [name for name in loaded.fresh if not in_slot(name)]
    if untrained:
        raise ValueError(
            f"the model holds no weights for {', '.join(untrained[:3])}, so {task.name} would say nothing of it"
        )
    _, held_out = load_data(config.data, task.columns)
    found = run_measurements(
        prepare_measurements(config.tasks, held_out, loaded), loaded.model, progress=cell.attention
    )
    figures = found.pop(task.name)
    summary = attention_summary(loaded.model)
    return {**_headline(task, figures), "figures": figures, "others": found, "attention": summary}


def _transfer(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    folder, metrics = models.transferred(cell)
    loaded = place(load(folder, kind=config.task.model, dtype=config.dtype, seed=cell.seed))
    kept = {name: metrics[name] for name in ("train", "errors")}
    return {**_evaluated(config, cell, loaded), **kept, "folder": folder}


def folder_name(cell: CompareCell, key: str) -> str:
    """Of what is made for a cell."""
    return f"{file_stem(cell.model)}-{file_stem(cell.attention)}-seed{cell.seed}-{key[:6]}"


def _finetune(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    models.drop()
    folder = Path(config.output_dir).expanduser() / "finetuned" / folder_name(cell, cell.key)
    if folder.exists() and (models.fresh or not same_versions(folder)):
        shutil.rmtree(folder)  # its checkpoints are of a run that does not count any more
    source, rules = cell.settings["model"], models.rules(cell)
    if "transfer" in cell.settings:
        (source, _), rules = models.transferred(cell), AS_SAVED
    settings = finetune_config(config, source, rules, cell.seed, str(folder))
    metrics = finished(settings)
    if metrics is None:
        metrics = prepare_finetune(settings, resume=True).run(progress=cell.attention)
    figures = metrics["evaluation"]["after"]
    others = {name: found["after"] for name, found in metrics["evaluation"]["others"].items()}
    kept = {name: metrics[name] for name in ("attention", "parameters", "train")}
    return {**_headline(config.task, figures), "figures": figures, "others": others, **kept, "folder": str(folder)}


def _speed(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    base = models.get(cell, config.baseline, config.seeds[0])
    own, input_ids, device = _model_and_tokens(cell, models)
    scope: Scope = cell.settings["scope"]
    found = {}
    for which in cell.settings["passes"]:
        contenders = {
            "baseline": timing.parts(base.model, input_ids, scope, which),
            "own": timing.parts(own.model, input_ids, scope, which),
        }
        seconds = timing.interleaved(contenders, cell.settings["rounds"], device)
        found[which] = timing.compared(seconds["own"], seconds["baseline"])
    return {"passes": found}


def _memory(config: CompareConfig, cell: CompareCell, models: CompareModels) -> dict[str, Any]:
    own, input_ids, device = _model_and_tokens(cell, models)
    found = {}
    for which in cell.settings["passes"]:
        found[which] = {
            "bytes": timing.peak_bytes(timing.parts(own.model, input_ids, cell.settings["scope"], which), device)
        }
    return {"passes": found}


def _model_and_tokens(cell: CompareCell, models: CompareModels) -> tuple[Loaded, torch.Tensor, torch.device]:
    """The cell's model, random tokens for it, and where it is."""
    own = models.get(cell, cell.attention, cell.seed)
    text: Any = own.model.config.get_text_config()  # type: ignore[operator, union-attr]
    length, limit = cell.settings["length"], getattr(text, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"length {length}; allowed: at most {limit}, the model's max_position_embeddings")
    generator = torch.Generator().manual_seed(cell.seed)
    input_ids = torch.randint(text.vocab_size, (cell.settings["batch_size"], length), generator=generator)
    device = next(own.model.parameters()).device
    return own, input_ids.to(device), device


_MEASURES: dict[str, Callable[[CompareConfig, CompareCell, CompareModels], dict[str, Any]]] = {
    "evaluate": _evaluate,
    "transfer": _transfer,
    "finetune": _finetune,
    "speed": _speed,
    "memory": _memory,
}


def _headline(task: Task, figures: dict[str, Any]) -> dict[str, Any]:
    return {"metric": task.metric, "better": task.better, "value": figures[task.metric]}


def _note(cell: CompareCell, result: dict[str, Any]) -> str:
    if cell.measure == "speed":
        return ", ".join(
            f"{which} {found['times_as_fast']:.2f}x the baseline" for which, found in result["passes"].items()
        )
    if cell.measure == "memory":
        return ", ".join(f"{which} {found['bytes'] / 2**20:.1f} MiB" for which, found in result["passes"].items())
    return f"{result['metric']} {result['value']:.4g}"
