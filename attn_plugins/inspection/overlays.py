"""Where on an image weights lie: patches shaded over it, the swapped attention beside the model's own."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attn_plugins.config.extras import need
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.grids import grid_of_image
from attn_plugins.hf.swap import unwrap
from attn_plugins.inspection.alignment import shown

ACROSS = 6
"""Panels side by side."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a model sees of an image, and where its patches lie."""

    image_HWC: torch.Tensor = field(repr=False)
    """The pixels that it reads, 0 to 1, resized and cut as its processor does."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    prefix_tokens: int
    """[CLS] and registers, before the patches."""

    @property
    def tokens(self) -> list[str]:
        """What its tokens are called: first tokens by number, patches by row and column."""
        first = [" [CLS]", *(f" [reg{n}]" for n in range(1, self.prefix_tokens))][: self.prefix_tokens]
        return [*first, *(f" {row},{column}" for row in range(self.grid[0]) for column in range(self.grid[1]))]

    def patches(self, shares_K: torch.Tensor) -> torch.Tensor:
        """Shares of the patches, (rows, columns).

        Raises:
            ValueError: there are more or fewer keys than its tokens.
        """
        rows, columns = self.grid
        if len(shares_K) != self.prefix_tokens + rows * columns:
            raise ValueError(
                f"{len(shares_K)} keys; allowed: {self.prefix_tokens} first tokens and {rows} x {columns} patches"
            )
        return shares_K[self.prefix_tokens :].view(rows, columns)


def seen(model: nn.Module, processor: Any, pixel_values: torch.Tensor) -> Seen:
    """What a model sees of the first of these images, (B, channels, height, width).

    Raises:
        ValueError: it is not cut into patches by a convolution.
    """
    inner: Any = unwrap(model)
    grid = grid_of_image(inner, pixel_values[:1])
    encoders = [target for target in discovery.targets(inner) if target.role == "encoder"]
    image_CHW = pixel_values[0].float().cpu()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(processor, f"image_{name}")).view(-1, 1, 1) for name in ("mean", "std"))
        image_CHW = image_CHW * std + mean
    return Seen(
        image_HWC=image_CHW.clamp(0, 1).permute(1, 2, 0),
        grid=grid,
        prefix_tokens=max((target.prefix_tokens or 0 for target in encoders), default=0),
    )


def overlay(columns: Sequence[str], sides: Mapping[str, torch.Tensor], image: Seen, query: int, title: str) -> Any:
    """A matplotlib figure of where one token of an image's encoder looks: attentions down, layers or heads across.

    Shades are of a share against an even one: 1 is what a patch had if all tokens had the same.

    Args:
        columns: titles of them.
        sides: by name of an attention the shares, (columns, keys).
        query: position of the token that looks.

    Raises:
        ValueError: keys are not the tokens of the image, or matplotlib is not installed.
    """
    maps = _maps(sides, image)
    figure, axes = _frame(len(columns), maps, image, title)
    _mark(axes[0][0], image, query)
    axes[0][0].set_title(f"{image.tokens[query].strip()} looks", fontsize=9)
    for (name, shares_CK), row in zip(sides.items(), axes, strict=True):
        for axis, column, share_K in zip(row[1:], columns, shares_CK, strict=True):
            _mark(axis, image, query)
            first = float(share_K[: image.prefix_tokens].sum())
            told = f"\n{first:.0%} on first tokens" if image.prefix_tokens else ""
            axis.set_title(f"{column}, {name}{told}", fontsize=9)
    return figure


def caption(sides: Mapping[str, torch.Tensor], image: Seen, written: Sequence[str], title: str) -> Any:
    """A matplotlib figure of where a model looks as it writes of an image: attentions down, tokens across.

    Args:
        sides: by name of an attention the shares, (tokens, keys).
        written: the tokens, each as text.

    Raises:
        ValueError: as in :func:`overlay`.
    """
    maps = _maps(sides, image)
    figure, axes = _frame(len(written), maps, image, title)
    names = list(sides)
    for number, row in enumerate(axes):
        name = names[number % len(names)]
        if number % len(names) == 0:
            row[0].set_title(name, fontsize=9)
            for token, axis in zip(written[number // len(names) * ACROSS :], row[1:], strict=False):
                told = f"\N{LEFT DOUBLE QUOTATION MARK}{shown(token)}\N{RIGHT DOUBLE QUOTATION MARK}"
                axis.set_title(told, fontsize=10)
        else:
            row[0].text(0.5, 0.5, textwrap.fill(name, 18), ha="center", va="center", fontsize=9)
    return figure


def _maps(sides: Mapping[str, torch.Tensor], image: Seen) -> torch.Tensor:
    """(attentions, columns, rows of patches, columns of patches) of shares against an even one."""
    return torch.stack([torch.stack([image.patches(one_K) * len(one_K) for one_K in side]) for side in sides.values()])


def _frame(number: int, maps_SCRC: torch.Tensor, image: Seen, title: str) -> tuple[Any, Any]:
    """A figure with the image at the left of each row of panels, and these shaded, ``ACROSS`` columns at a time.

    The scale ends where one patch in two hundred is above it, so that a single one does not hide the rest.
    """
    need("matplotlib", "compare")
    from matplotlib.figure import Figure

    sides, lines, across = len(maps_SCRC), -(-number // ACROSS), min(ACROSS, number)
    figure = Figure(figsize=(1.75 * (across + 1) + 1.0, 0.5 + 2.1 * sides * lines), layout="constrained")
    axes = figure.subplots(sides * lines, across + 1, squeeze=False)
    most = float(maps_SCRC.quantile(0.995))
    shaded: Any = None
    for axis in axes.flatten():
        axis.set_axis_off()
    for line in range(lines):
        axes[line * sides][0].imshow(image.image_HWC.numpy())
        for side, maps_CRC in enumerate(maps_SCRC):
            for axis, one in zip(axes[line * sides + side][1:], maps_CRC[line * ACROSS :], strict=False):
                shaded = _shade(axis, image, one, most)
    bar = figure.colorbar(shaded, ax=axes.ravel().tolist(), shrink=0.6, pad=0.01, extend="max")
    bar.set_label("times an even share", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    return figure, axes


def _shade(axis: Any, image: Seen, map_RC: torch.Tensor, most: float) -> Any:
    """Patches over the image in pale grey, which shows through where there is little weight."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    height, width = image.image_HWC.shape[:2]
    axis.imshow(0.35 + 0.65 * image.image_HWC.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()
    colours = colormaps["YlOrRd"](torch.linspace(0.1, 1, 256).numpy())
    colours[:, 3] = torch.linspace(0, 1, 256).sqrt().mul(0.9).numpy()
    where = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    return axis.imshow(map_RC.numpy(), cmap=ListedColormap(colours), vmin=0, vmax=most, **where)


def _mark(axis: Any, image: Seen, query: int) -> None:
    """A frame around the patch that looks."""
    from matplotlib.patches import Rectangle

    if query < image.prefix_tokens:
        return
    (rows, columns), (height, width) = image.grid, image.image_HWC.shape[:2]
    row, column = divmod(query - image.prefix_tokens, columns)
    high, wide = height / rows, width / columns
    axis.add_patch(Rectangle((column * wide, row * high), wide, high, fill=False, edgecolor="blue", linewidth=1.5))
