"""Settings of a transfer, as YAML gives them, validated before anything is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attn_plugins.core.options import build
from attn_plugins.data.sources import DataConfig
from attn_plugins.tasks import TrainableTask, trained_task
from attn_plugins.training.models import AS_SAVED, Dtype, read_attention
from attn_plugins.transfer.attention_transfer import check_settings
from attn_plugins.transfer.errors import Loss


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """One transfer: which model with which attention, on which text, how long."""

    model: str
    """A folder, a name on the hub, or smollm2-135m-demo."""
    data: DataConfig
    """Text to learn on, and held-out text to measure errors on."""
    output_dir: str
    """Where checkpoints, the swapped model, report.json, metrics.json, errors.png and the model card go."""
    attention: Any = AS_SAVED
    """A name, a rule, a list of rules, a YAML file of these, or as-saved."""
    task: str | None = None
    """A task that finetune trains for: batches are made of its columns as it makes them, such as pictures, sound, or
    texts with their translations. Null: texts of ``length`` tokens."""
    options: dict[str, Any] | None = None
    """Options of the task, such as what its rows are cut to."""
    steps: int = 100
    """Updates of the new weights."""
    length: int = 512
    """Tokens of a text: as many as the model will read, since what sums over far keys learns their number. With a
    task, its options say it."""
    batch_size: int = 1
    """Texts, or rows of the task, in a batch, in each process."""
    loss: Loss = "output"
    """output: squared error of a head's outputs over the squared length of the model's own. weights: cross-entropy of
    its weights against the model's own, N x N."""
    learning_rate: float = 1e-2
    """Of AdamW; falls to a tenth as a cosine."""
    body_dtype: Literal["bfloat16", "float16"] | None = None
    """What the model runs in around its slots, by autocast; null is ``dtype``. Slots learn in float32."""
    dtype: Dtype = "float32"
    """What weights are loaded and saved in."""
    held_out: int = 8
    """Batches of held-out text that errors are measured on, before and after, and half as many of twice the length."""
    training: dict[str, Any] = field(default_factory=dict)
    """More fields of transformers' TrainingArguments, such as save_steps."""
    seed: int = 0
    """Of new weights, of the order of the texts, and of what an attention draws."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", read_attention(self.attention))
        object.__setattr__(self, "output_dir", str(Path(self.output_dir).expanduser()))
        for name, least in {"length": 2, "batch_size": 1, "held_out": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least {least}")
        if self.attention is None:
            raise ValueError("attention is null, the model's own, which has nothing to learn; name another")
        if self.task is None and self.options:
            raise ValueError(f"options {sorted(self.options)} go with a task, and task is null")
        self.trained()
        check_settings(self.steps, self.learning_rate, self.body_dtype, self.training)

    def trained(self) -> TrainableTask | None:
        """The task that makes the batches, or None; ValueError where there is no such task, or an option is wrong."""
        if self.task is None:
            return None
        cls = trained_task(self.task)
        return cls(build(cls.Config, self.options or {}, "options"))
