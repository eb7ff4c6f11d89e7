"""Settings of a fine-tune and of an evaluation, as YAML gives them, validated before anything is loaded."""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attn_plugins.config.extras import need
from attn_plugins.core.options import build, check_keys, convert
from attn_plugins.data.sources import DataConfig, check_named, no_data
from attn_plugins.tasks import Task, TrainableTask, get_task, trained_task
from attn_plugins.tasks.kinds import KINDS
from attn_plugins.training.models import AS_SAVED, Dtype, read_attention
from attn_plugins.training.new_models import is_new, spelled_model
from attn_plugins.training.quantization import quantized_by
from attn_plugins.training.streaming import check_steps_known

DEFAULT_TASK = "perplexity"
"""Of an evaluation that names none, beside no fine-tune."""

OURS = {
    "output_dir": "output_dir",
    "seed": "seed",
    "resume_from_checkpoint": "--resume",
    "do_train": None,
    "do_eval": None,
    "do_predict": None,
    "local_rank": None,
}
"""Fields of TrainingArguments that are set elsewhere, or mean nothing here."""


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """When a run ends before its steps are done."""

    patience: int = 3
    """After so many of Trainer's evaluations in a row that are no better than the best."""
    threshold: float = 0.0
    """What is better by no more than this is no better."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"early_stopping.patience={self.patience}; allowed: at least 1")
        if self.threshold < 0:
            raise ValueError(f"early_stopping.threshold={self.threshold}; allowed: at least 0")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One fine-tune: which model with which attention on which data, what of it trains, and how."""

    model: Any
    """A folder, a name on the hub, or smollm2-135m-demo; or a model without weights: a config of transformers with its
    ``model_type``, as a mapping or a YAML file."""
    output_dir: str
    """Where checkpoints, the result, metrics.json and the model card go."""
    data: DataConfig = field(default_factory=no_data)
    """Training and held-out text; left out for a task that makes its rows itself."""
    attention: Any = AS_SAVED
    """A name, a rule, a list of rules, a YAML file of these, null for the model's own, or as-saved."""
    task: str = "causal-lm"
    """causal-lm: the next token, in blocks of ``block_size``. classification: a label a row, padded to the batch."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the task, for training, and unless ``evaluation`` says otherwise for measuring too."""
    tune: Literal["lora", "full", "new"] = "lora"
    """lora: adapters, and all new weights. full: everything. new: new weights alone (of the attention, of a head)."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Fields of peft's LoraConfig. ``target_modules`` is all-linear unless it is given. A classifier's head trains
    whole."""
    loss: Literal["task", "kl", "hidden"] = "task"
    """task: the model's own loss. kl: distance of the logits from those of the same model with its own attention and
    without adapters, which costs one more forward. hidden: the same of the last hidden states."""
    temperature: float = 1.0
    """What logits are divided by, for loss='kl'."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' TrainingArguments. ``learning_rate`` where the loss is kl or hidden: 5e-3 with
    tune='new', 2e-3 with LoRA, unless it is given."""
    early_stopping: EarlyStopping | None = None
    """``{patience: 3, threshold: 0.0}`` ends training where ``training.eval_strategy``'s evaluations grow no better,
    and takes the best checkpoint."""
    block_size: int = 1024
    """Tokens in a training block, for causal-lm."""
    max_length: int = 512
    """Longer texts are cut to so many tokens, for classification."""
    evaluation: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict)
    """``task`` (default: that of the fine-tune, or perplexity for causal-lm, accuracy for classification) and its
    options, or a list of these, the first of which stands for the rest; measured on held-out rows after training."""
    evaluate_before: bool = False
    """Also measure before training."""
    recall: bool = True
    """Whether a swapped causal-lm still recalls is measured too, before and after, in a few rows of ``block_size``
    tokens of the held-out text: training may improve perplexity and take that away."""
    quantization: dict[str, Any] | None = None
    """``{method: torchao, quant_type: Int8WeightOnlyConfig}``, or quanto, bitsandbytes or another method of
    transformers with the fields of its config: linear layers are quantized as the model is loaded, but those of slots
    and heads. With tune='lora' alone."""
    dtype: Dtype = "float32"
    """What weights are loaded in; mixed precision is ``training: {bf16: true}``."""
    seed: int = 0
    """Of new weights, of the order of the data, and of dropout."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", spelled_model(self.model))
        object.__setattr__(self, "attention", read_attention(self.attention))
        object.__setattr__(self, "output_dir", str(Path(self.output_dir).expanduser()))
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size}; allowed: at least 2")
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}; allowed: at least 1")
        if self.tune != "lora" and self.lora:
            raise ValueError(f"lora options {sorted(self.lora)} go with tune='lora', not with tune={self.tune!r}")
        self._check_loss()
        trained = self.trained()
        check_named(self.data, trained.columns, self.task)
        if is_new(self.model) and self.tune != "full":
            raise ValueError(f"tune={self.tune!r} keeps weights, and the model has none; allowed here: tune='full'")
        self.measured(trained)
        if self.loss != "task" and not trained.distils:
            raise ValueError(f"loss={self.loss!r} is not for task={self.task!r}; allowed: loss='task'")
        check_training(self.training, trained.arguments())
        check_steps_known(self.data.streaming, self.training)
        if self.early_stopping is not None and self.training.get("eval_strategy", "no") == "no":
            raise ValueError(
                "early_stopping looks at evaluations while the model trains, and training.eval_strategy is 'no'; "
                "allowed: steps (every eval_steps), epoch"
            )
        if self.tune == "lora":
            check_lora(self.lora)
        if self.quantization is not None:
            self._check_quantization(trained)

    def trained(self) -> TrainableTask:
        """The task with the options that it trains with.

        Raises:
            ValueError: there is no such task, or an option is wrong.
        """
        cls, options = trained_task(self.task), dict(self.options)
        ours = {"causal-lm": ("length", "block_size"), "classification": ("max_length", "max_length")}
        if self.task in ours:
            name, here = ours[self.task]
            if name in options:
                raise ValueError(f"options.{name} is not for task={self.task!r}; use {here}")
            options[name] = getattr(self, here)
            if name == "length":
                options["buckets"] = 1  # of figures, which nobody asks it for
        return cls(build(cls.Config, options, "options"))

    def measured(self, trained: TrainableTask) -> list[Task]:
        """The tasks of the evaluation; ValueError where there is none or an option is wrong."""
        return evaluation_tasks(self.evaluation, trained, self.options)

    def _check_quantization(self, trained: TrainableTask) -> None:
        if self.tune != "lora":
            raise ValueError(
                f"quantization leaves a base model that neither trains nor is saved, and tune={self.tune!r} would do "
                "both; allowed: tune='lora'"
            )
        if (library := KINDS[trained.model].library) != "transformers":
            raise ValueError(f"quantization is not for task={self.task!r}, whose models {library} loads")
        quantized_by(self.quantization or {}, [])

    def _check_loss(self) -> None:
        if self.loss != "kl" and self.temperature != 1:
            raise ValueError(f"temperature={self.temperature} goes with loss='kl', not with loss={self.loss!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; allowed: greater than 0")
        if self.loss == "task":
            return
        if self.tune == "full":
            raise ValueError(
                f"loss={self.loss!r} holds the model to itself with its own attention, and tune='full' would change "
                "that along with it; allowed: tune='new' or 'lora', or loss='task'"
            )
        if self.attention is None:
            raise ValueError(
                f"loss={self.loss!r} holds the model to itself with its own attention, and attention is null, its own; "
                "allowed: another attention, or loss='task'"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation of one model."""

    model: str
    """A folder (a PEFT adapter's too), a name on the hub, or smollm2-135m-demo."""
    data: DataConfig = field(default_factory=no_data)
    """The held-out part is measured; left out for a task that makes its rows itself."""
    attention: Any = AS_SAVED
    """A name, a rule, a list of rules, a YAML file of these, null for the model's own, or as-saved."""
    evaluation: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict)
    """``task`` (default: perplexity) and its options, or a list of these, the first of which stands for the rest."""
    dtype: Dtype = "auto"
    """What weights are loaded in; auto is what they were saved in."""
    seed: int = 0
    """Of new weights."""
    output: str | None = None
    """Write the result there, as JSON."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", read_attention(self.attention))
        task = evaluation_tasks(self.evaluation)[0]
        check_named(self.data, task.columns, task.name)


def evaluation_tasks(
    evaluation: dict[str, Any] | list[dict[str, Any]],
    trained: TrainableTask | None = None,
    options: dict[str, Any] | None = None,
) -> list[Task]:
    """The tasks that ``{"task": name, option: value}`` describes, or a list of these.

    Args:
        trained: what the model is fine-tuned for, if it is; the tasks must be ones for its kind of model.
        options: of that, for the same task where it is measured too.

    Raises:
        ValueError: there is none, one comes twice, they are for models of several kinds, or an option is wrong.
    """
    many = isinstance(evaluation, list)
    tasks: list[Task] = []
    for number, one in enumerate(evaluation if isinstance(evaluation, list) else [evaluation]):
        where = f"evaluation.{number}" if many else "evaluation"
        name = one.get("task", DEFAULT_TASK if trained is None else trained.name)
        cls = get_task(name)
        kind = trained.model if trained is not None else tasks[0].model if tasks else cls.model
        if cls.model != kind:
            beside = f"task={trained.called()!r}" if trained else f"evaluation.0.task={tasks[0].name!r}"
            raise ValueError(f"{where}.task={name!r} is for {cls.model} models, and {beside} for {kind} models")
        own = {key: value for key, value in one.items() if key != "task"}
        shared = dict(options or {}) if trained is not None and name == trained.name else {}
        tasks.append(cls(build(cls.Config, {**shared, **own}, where)))
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"evaluation has the tasks {names}; allowed: at least one, each once")
    return tasks


def check_training(training: dict[str, Any], cls: Any = None) -> None:
    """Raise a ValueError for what is no field of TrainingArguments, is set elsewhere, or is of a wrong type.

    Args:
        cls: TrainingArguments, unless it is one of its subclasses.
    """
    from transformers import TrainingArguments

    cls = cls or TrainingArguments
    hints = typing.get_type_hints(cls)
    for key in training:
        if key in OURS:
            instead = f"; use {OURS[key]}" if OURS[key] else ""
            raise ValueError(f"training.{key} is not for a config{instead}")
    known = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in OURS]
    _check(training, known, hints, "training")


def check_lora(lora: dict[str, Any]) -> None:
    """Raise a ValueError for what is no field of peft's LoraConfig, or is of a wrong type."""
    cls = need("peft", "train").LoraConfig
    ours = ("task_type", "peft_type", "base_model_name_or_path", "inference_mode")
    known = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in ours]
    _check(lora, known, typing.get_type_hints(cls), "lora")


def _check(values: dict[str, Any], known: list[str], hints: dict[str, Any], where: str) -> None:
    check_keys(values, known, where)
    for key, value in values.items():
        convert(value, hints[key], f"{where}.{key}")
