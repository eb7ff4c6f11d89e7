"""Cross-attention as an alignment: what is written, down, against what is read, across."""

from collections.abc import Sequence
from typing import Any

import torch

from attn_plugins.config.extras import need
from attn_plugins.inspection.figures import shares_of
from attn_plugins.inspection.inspect import LayerWeights


def alignment_of(layers: Sequence[LayerWeights], *, own: bool = False) -> torch.Tensor:
    """Shares (q, K) of the first row: the mean over these layers and their heads."""
    sides = [shares_of(layer.own_BhqK if own else layer.weights_BhqK)[0].mean(0) for layer in layers]
    return torch.stack(sides).mean(0)


def alignment(layers: Sequence[LayerWeights], written: Sequence[str], read: Sequence[str], title: str) -> Any:
    """A matplotlib figure of the swapped attention beside the model's own, of cross-attention modules of one stack.

    Args:
        written: text of the token that each of the modules' queries leads to, of all queries.
        read: texts of the keys; numbers stand for what is no text.

    Raises:
        ValueError: matplotlib is not installed.
    """
    need("matplotlib", "compare")
    from matplotlib.figure import Figure

    queries = layers[0].queries
    rows = [shown(written[q]) for q in queries]
    sides = {"swapped": alignment_of(layers), "the model's own": alignment_of(layers, own=True)}
    keys = sides["swapped"].shape[1]
    columns = [shown(text) for text in read] if len(read) == keys else []
    width = min(4 + 0.22 * 2 * min(keys, 60), 30)
    figure = Figure(figsize=(width, min(2 + 0.2 * len(rows), 24)), layout="constrained")
    axes = figure.subplots(1, 2)
    most = max(float(side.max()) for side in sides.values())
    for axis, (name, side) in zip(axes, sides.items(), strict=True):
        image = axis.imshow(side.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        if columns and keys <= 120:
            axis.set_xticks(range(keys), columns, rotation=90, fontsize=7)
        else:
            axis.set_xlabel("key", fontsize=8)
    figure.colorbar(image, ax=list(axes), label="share, mean over layers and heads")
    figure.suptitle(title, fontsize=10)
    return figure


def shown(text: str) -> str:
    """A token for a label: spaces and line ends seen, and no mathematics for matplotlib."""
    return text.strip(" ").replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$") or "␣"
