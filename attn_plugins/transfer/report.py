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
    """Name of the attention in the slot."""
    trained: bool
    """False where it has no weights."""
    before: list[float]
    after: list[float]
    after_at_twice: list[float] | None = None
    """The errors afterwards at twice the length of the training batches, where they were measured."""


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
        """Mean error of the trained modules before training, over modules and heads."""
        return _mean([layer.before for layer in self.layers if layer.trained])

    @property
    def after(self) -> float:
        """The same after training."""
        return _mean([layer.after for layer in self.layers if layer.trained])

    @property
    def after_at_twice(self) -> float | None:
        """The same at twice the length, None where that was not measured."""
        found = [layer.after_at_twice for layer in self.layers if layer.trained and layer.after_at_twice is not None]
        return _mean(found) if found else None

    @property
    def worst(self) -> LayerErrors:
        """The trained module with the greatest mean error after training."""
        return max((layer for layer in self.layers if layer.trained), key=lambda layer: statistics.fmean(layer.after))

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds: all fields, and the means."""
        means = {"before": self.before, "after": self.after, "after_at_twice": self.after_at_twice}
        return {**dataclasses.asdict(self), **means}

    def __str__(self) -> str:
        header = ("path", "attention", "before", "after", "worst head")
        lines: list[tuple[str, ...]] = [header]
        for layer in self.layers:
            means = [f"{statistics.fmean(errors):.3f}" for errors in (layer.before, layer.after)]
            head = max(range(len(layer.after)), key=lambda number: layer.after[number])
            name = layer.attention if layer.trained else f"{layer.attention} (no weights)"
            lines.append((layer.path, name, *means, f"{layer.after[head]:.3f} (head {head})"))
        lines.append(("mean of those trained", "", f"{self.before:.3f}", f"{self.after:.3f}", ""))
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
        for name, errors in {
            "before": [layer.before for layer in self.layers],
            "after": [layer.after for layer in self.layers],
        }.items():
            lines.plot(
                numbers, [statistics.fmean(of_heads) for of_heads in errors], marker="o", markersize=3, label=name
            )
        lines.axhline(1, color="grey", linewidth=0.8, linestyle=":", label="as wrong as zeros")
        lines.set(xlabel="attention module", ylabel="relative squared error of outputs", yscale="log")
        lines.legend()
        most = max(len(layer.after) for layer in self.layers)
        table = [[*layer.after, *[float("nan")] * (most - len(layer.after))] for layer in self.layers]
        image = heads.imshow(table, aspect="auto", cmap="viridis", vmin=0)
        heads.set(xlabel="head", ylabel="attention module", title="after")
        figure.colorbar(image, ax=heads)
        figure.savefig(path, dpi=120)


def _mean(errors: list[list[float]]) -> float:
    return statistics.fmean(statistics.fmean(of_heads) for of_heads in errors)
