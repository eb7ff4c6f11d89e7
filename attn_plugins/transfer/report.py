"""What a transfer did: errors by layer and head before and after, as a table, as JSON and as a picture."""

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins.config.extras import need


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Errors of one attention module's outputs, a head: squared, over the squared length of the model's own.

    0 is what the model's own attention gives, 1 is as wrong as zeros.
    """

    path: str
    layer: int
    role: str
    """encoder, decoder or cross."""
    attention: str
    """Name of the attention in the slot; of several, that each serve some of the heads, all names."""
    learned: list[int]
    """Query heads whose attention has weights."""
    before: list[float]
    after: list[float]
    after_at_twice: list[float] | None = None
    """The errors afterwards at twice the length of the training batches, where they were measured."""

    def mean(self, when: str = "after") -> float:
        """Mean error of the heads that learned, of all heads where none did.

        Args:
            when: before, after or after_at_twice.
        """
        errors = getattr(self, when)
        return statistics.fmean(errors[head] for head in self.learned or range(len(errors)))


@dataclass(frozen=True, kw_only=True)
class TransferReport:
    """What :func:`attn_plugins.transfer_attention` did."""

    layers: list[LayerErrors]
    """In the model's order."""
    measured_on: str
    """What ``before`` and ``after`` were measured on: "held-out batches", or "the first batches"."""
    loss: str
    steps: int
    losses: list[dict[str, float]]
    """Mean loss of the layers since the entry before: ``{"step": 10, "loss": 0.41}``."""
    tokens: int
    """Real tokens that were trained on, by all processes; of an encoder-decoder model, those of its longer side."""
    seconds: float
    """Wall time of the steps, without measuring; since the checkpoint where the run was resumed."""
    processes: int
    resumed_from: str | None

    @property
    def before(self) -> float:
        """Mean error before training, over the heads that learned, then over modules."""
        return self._mean("before")

    @property
    def after(self) -> float:
        """The same after training."""
        return self._mean("after")

    @property
    def after_at_twice(self) -> float | None:
        """The same at twice the length, None where that was not measured."""
        return None if any(layer.after_at_twice is None for layer in self.layers) else self._mean("after_at_twice")

    @property
    def worst(self) -> LayerErrors:
        """The module with the greatest mean error after training, of those that learned."""
        return max((layer for layer in self.layers if layer.learned), key=LayerErrors.mean)

    def _mean(self, when: str) -> float:
        return statistics.fmean(layer.mean(when) for layer in self.layers if layer.learned)

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds: all fields, and the means."""
        means = {"before": self.before, "after": self.after, "after_at_twice": self.after_at_twice}
        return {**dataclasses.asdict(self), **means}

    def __str__(self) -> str:
        header = ("path", "attention", "before", "after", "worst head")
        lines: list[tuple[str, ...]] = [header]
        for layer in self.layers:
            means = [f"{layer.mean(when):.3f}" for when in ("before", "after")]
            head = max(range(len(layer.after)), key=lambda number: layer.after[number])
            name = layer.attention if layer.learned else f"{layer.attention} (no weights)"
            lines.append((layer.path, name, *means, f"{layer.after[head]:.3f} (head {head})"))
        lines.append(("mean of what learned", "", f"{self.before:.3f}", f"{self.after:.3f}", ""))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def plot(self, path: str | Path) -> None:
        """Write a picture: mean errors by layer before and after, and the errors afterwards by layer and head.

        Raises:
            ValueError: matplotlib is not installed.
        """
        need("matplotlib", "compare")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4), layout="constrained")
        lines, heads = figure.subplots(1, 2)
        numbers = range(len(self.layers))
        for when in ("before", "after"):
            lines.plot(numbers, [layer.mean(when) for layer in self.layers], marker="o", markersize=3, label=when)
        lines.axhline(1, color="grey", linewidth=0.8, linestyle=":", label="as wrong as zeros")
        lines.set(xlabel="attention module", ylabel="relative squared error of outputs", yscale="log")
        lines.legend()
        most = max(len(layer.after) for layer in self.layers)
        table = [[*layer.after, *[float("nan")] * (most - len(layer.after))] for layer in self.layers]
        image = heads.imshow(table, aspect="auto", cmap="viridis", vmin=0)
        heads.set(xlabel="head", ylabel="attention module", title="after")
        figure.colorbar(image, ax=heads)
        figure.savefig(path, dpi=120)
