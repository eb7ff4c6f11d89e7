"""Images of a model that attends in chunks of one row, such as Qwen2-VL's: what each chunk is, and in what order.

Such models get images as patches that were cut before, with their numbers of frames, rows and columns (``grid_thw``),
and tell their attention modules where chunks begin (``cu_seqlens``). A chunk is a frame, a video, or a window of a
frame (Qwen2.5-VL). Patches come row by row, in squares that are merged later, or in windows and in these in squares:
which of these it is, the rotary positions show, whose angles are those of rows or of columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attn_plugins.core.grid import Grid, order_of, tokens_of


def grids_of_chunks(
    lengths: Sequence[int], images: Sequence[Sequence[int]], model: nn.Module, rotary: Any, name: str
) -> list[Grid]:
    """The grid of each chunk.

    Args:
        lengths: of the chunks, in tokens.
        images: (frames, rows, columns) of each image or video.
        model: that makes chunks of them; its attributes tell the sides of windows and of squares.
        rotary: what its attention modules get as rotary positions, of all tokens.
        name: of the attention module, for messages.

    Raises:
        ValueError: chunks are something else, or their order cannot be told.
    """
    sides = _sides(lengths, images, _number(model, "window_size") // max(1, _number(model, "patch_size")))
    if sides is None:
        raise ValueError(
            f"{name} attends in {len(lengths)} chunks of {_brief(lengths)} tokens, which are neither the images of "
            f"{_brief([tuple(image) for image in images])} frames, rows and columns, nor their frames or windows; "
            "leave it out with layers or modules"
        )
    merge = _number(model, "spatial_merge_size")
    window = _number(model, "window_size") // max(1, _number(model, "patch_size"))
    orders = [(), (merge,), (window,), (window, merge)]
    tokens = _per_token(rotary, sum(lengths))
    found, begin = [], 0
    for length, one in zip(lengths, sides, strict=True):
        part = None if tokens is None else tokens[begin : begin + length]
        found.append(_ordered(one, orders, part, name))
        begin += length
    return found


def _sides(lengths: Sequence[int], images: Sequence[Sequence[int]], window: int) -> list[tuple[int, ...]] | None:
    frames = [(rows, columns) for number, rows, columns in images for _ in range(number)]
    videos = [(number, rows, columns) if number > 1 else (rows, columns) for number, rows, columns in images]
    windows = [
        (min(window, rows - i), min(window, columns - j))
        for rows, columns in frames
        for i in range(0, rows, max(1, window))
        for j in range(0, columns, max(1, window))
    ]
    for sides in (frames, videos, windows):
        if [torch.Size(one).numel() for one in sides] == list(lengths):
            return list(sides)
    return None


def _ordered(sides: tuple[int, ...], orders: list[tuple[int, ...]], rotary: torch.Tensor | None, name: str) -> Grid:
    """The grid of a chunk in the one order that its rotary positions allow."""
    grids: dict[tuple[int, ...], Grid] = {}
    for blocks in orders:
        if all(blocks):
            grid = Grid(sides, tuple(side for side in blocks if 1 < side < max(sides[-2:])))
            grids.setdefault(order_of(grid), grid)
    fitting = list(grids.values())
    if len(fitting) > 1:
        fitting = [] if rotary is None else [grid for grid in fitting if _along_axes(grid, rotary)]
    if len(fitting) != 1:
        raise ValueError(
            f"{name} attends to {' x '.join(map(str, sides))} patches, and rotary positions do not tell in what order "
            "they come; leave it out with layers or modules"
        )
    return fitting[0]


def _along_axes(grid: Grid, rotary: torch.Tensor) -> bool:
    """Whether each feature of the rotary positions changes along one axis alone, if tokens lie as the grid says."""
    index = torch.tensor(tokens_of(grid), device=rotary.device)
    placed = rotary[index].view(*grid.sides, -1)
    fits = torch.zeros(placed.shape[-1], dtype=torch.bool, device=rotary.device)
    for axis in range(len(grid.sides)):
        others = [other for other in range(len(grid.sides)) if other != axis]
        spread = placed.amax(dim=others) - placed.amin(dim=others)
        fits |= (spread < 1e-5).all(dim=0)
    return bool(fits.all())


def _per_token(rotary: Any, tokens: int) -> torch.Tensor | None:
    """(tokens, features) of cosines and sines, or of angles, None for anything else."""
    parts = [x for x in (rotary if isinstance(rotary, (tuple, list)) else [rotary]) if isinstance(x, torch.Tensor)]
    parts = [x.detach().float().squeeze() for x in parts]
    if not parts or any(x.ndim != 2 or len(x) != tokens for x in parts):
        return None
    return torch.cat(parts, dim=1)


def _number(model: nn.Module, name: str) -> int:
    for holder in (model, getattr(model, "config", None)):
        value = getattr(holder, name, None)
        if isinstance(value, int):
            return value
    return 0


def _brief(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:6]))
    return shown if len(values) <= 6 else f"{shown}, ..."
