"""Figures of all heads at a glance: layers down, heads across, the attention beside the model's own."""

from collections.abc import Sequence
from typing import Any

from attn_plugins.config.extras import need
from attn_plugins.inspection.inspect import LayerWeights

OF_WEIGHTS = {
    "entropy": "entropy (nats)",
    "distance": "mean distance (tokens)",
    "density": "share of keys for 90 %",
    "sinks": "share on first tokens",
    "outside": "share outside the window",
}
OF_BOTH = {"error": "error of the output", "overlap": "overlap of top keys"}
"""Figures that are panels, with their titles."""


def overview(layers: Sequence[LayerWeights], title: str) -> Any:
    """A matplotlib figure of modules of one role: a panel a figure, of the swapped attention above the model's own.

    Both have one scale of shades. Blank is what a head has no figure of.

    Raises:
        ValueError: matplotlib is not installed.
    """
    need("matplotlib", "compare")
    from matplotlib.figure import Figure

    names = [name for name in OF_WEIGHTS if any(_values(layers, "own", name))]
    columns = len(names) + 1
    heads = max(max(layer.heads) for layer in layers) + 1
    size = 2.2 + columns * (1.3 + 0.12 * heads), 1.6 + 2 * (0.9 + 0.14 * len(layers))
    figure = Figure(figsize=(min(size[0], 26), min(size[1], 22)), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for column, name in enumerate(names):
        grids = [_grid(layers, side, name, heads) for side in ("weights", "own")]
        every = [value for grid in grids for row in grid for value in row if value == value]
        limits: dict[str, Any] = {"vmin": 0, "vmax": max(every, default=1) if name in ("entropy", "distance") else 1}
        for row, (grid, side) in enumerate(zip(grids, ("swapped", "the model's own"), strict=True)):
            image = _panel(axes[row][column], layers, grid, f"{OF_WEIGHTS[name]}\n{side}", limits)
        figure.colorbar(image, ax=list(axes[:, column]), shrink=0.7)
    for row, (name, told) in enumerate(OF_BOTH.items()):
        panel = axes[row][columns - 1]
        limits = {"vmin": 0, "vmax": 1 if name == "overlap" else None}
        figure.colorbar(_panel(panel, layers, _grid(layers, "", name, heads), told, limits), ax=panel, shrink=0.7)
    figure.suptitle(title, fontsize=10)
    return figure


def _values(layers: Sequence[LayerWeights], side: str, name: str) -> list[bool]:
    return [getattr(getattr(one, side), name) is not None for layer in layers for one in layer.figures]


def _grid(layers: Sequence[LayerWeights], side: str, name: str, heads: int) -> list[list[float]]:
    grid = [[float("nan")] * heads for _ in layers]
    for row, layer in enumerate(layers):
        for one in layer.figures:
            value = getattr(getattr(one, side) if side else one, name)
            grid[row][one.head] = float("nan") if value is None else value
    return grid


def _panel(axis: Any, layers: Sequence[LayerWeights], grid: list[list[float]], title: str, limits: Any) -> Any:
    image = axis.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", **limits)
    step = max(1, len(layers) // 16)
    axis.set_yticks(range(0, len(layers), step), [str(layer.layer) for layer in layers][::step], fontsize=7)
    axis.set_xlabel("head", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.set_title(title, fontsize=8)
    return image
