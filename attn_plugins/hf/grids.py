"""The patches that a model has just made of its images or videos, for attentions that lie on their grid.

A config has the size of the images that a model was trained on; others may have as many patches in another shape. What
shows it is the layer that cuts the image into patches. Its output is noted a thread, for as long as the forward pass of
the model around it lasts, so that threads may share a model.
"""

import inspect
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attn_plugins.core.attention import Attention
from attn_plugins.core.grid import Grid, GridSize
from attn_plugins.hf.chunks import grids_of_chunks
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.hooks import remove_hooks
from attn_plugins.hf.images import Images, in_one_row, in_rows

Sides = tuple[int, ...]
"""Rows and columns of patches, after frames where there are any."""

Told = GridSize | list[Images]
"""How patches lie: all images alike, or each as it is."""

GRID = "_attn_plugin_grid"
"""Attribute of an attention module whose attention lies on a grid: a :class:`Grids`."""


@dataclass
class Grids:
    """What is known of the images that a module attends to, beside the forward pass under way."""

    in_config: bool
    """Whether the model's config has a grid."""
    trained: dict[int, Told | None] = field(default_factory=dict)
    """Grids that it was trained on, by their number of tokens; None for several of one number."""
    trained_chunks: dict[tuple[int, ...], list[Grid] | None] = field(default_factory=dict)
    """The same of rows of chunks, by the lengths of these."""


class Patches:
    """Those made in the forward pass under way."""

    batch_size = 0
    sides: Sides | None = None
    """None outside of a forward pass, and where images have sizes of their own."""
    shapes: list[Sides] | None = None
    """Rows and columns of each image, where a model takes images of several sizes."""
    images: list[list[int]] | None = None
    """(frames, rows, columns) of each image or video, where a model gets patches that were cut before."""
    sizes: Any = None
    """Height and width of each image in pixels, where a model takes images of several sizes and was told."""
    model: nn.Module | None = None
    """Whose forward pass it is, if it takes such images or patches."""
    trains = False
    """Whether gradients may be wanted of it; checkpointing that is reentrant turns them off for the layers."""

    def __init__(self) -> None:
        self.chunks: dict[tuple[int, ...], list[Grid]] = {}

    def clear(self) -> None:
        self.sides = self.shapes = self.images = self.sizes = self.model = None
        self.chunks = {}

    def of_rows(self, number: int, tokens: int) -> Told | None:
        """How so many rows of so many tokens lie, None where they are no images or videos of those made."""
        if (shapes := self.shapes) is not None:
            sizes = [math.prod(shape) for shape in shapes]
            if number == len(shapes) and max(sizes) <= tokens:
                return shapes[0] if sizes[0] == tokens and len(set(shapes)) == 1 else in_rows(shapes)
            return in_one_row(shapes) if number == 1 and sum(sizes) == tokens else None
        if self.sides is None or len(self.sides) not in (2, 3):
            return None
        if number == self.batch_size:
            return self.sides
        frames, *frame = (1, *self.sides)[-3:]
        # A row a frame (VideoPrism); a row a place, of all frames, would be as many where the numbers are the same.
        by_frame = number == self.batch_size * frames and frames != math.prod(frame)
        return tuple(frame) if by_frame else None


class Chunks:
    """Of a module that attends to a row in chunks: where they begin, and which comes next."""

    module: nn.Module | None = None
    lengths: tuple[int, ...] = ()
    rotary: Any = None
    next = 0


class _Thread(threading.local):
    def __init__(self) -> None:
        self.patches = Patches()
        self.chunks = Chunks()


_thread = _Thread()
"""An attribute of a thread's own object, not of this one, is what torch.compile keeps over the breaks of its graphs."""


def watch(model: nn.Module, slots: dict[str, Attention]) -> None:
    """Note the images of ``model`` for the modules at these paths, whose attentions want to know."""
    for path, slot in slots.items():
        module = model.get_submodule(path)
        setattr(module, GRID, Grids(slot.heads is not None and slot.heads.grid_size is not None))
        if "cu_seqlens" in _takes(type(module)):
            module.register_forward_pre_hook(_begin_chunks, with_kwargs=True)
        holder = next((part for part in discovery.outwards(model, path) if _embedding(part) is not None), None)
        if holder is not None and _begin not in holder._forward_pre_hooks.values():
            holder.register_forward_pre_hook(_begin, with_kwargs=True)
            holder.register_forward_hook(_end, always_call=True)
            _embedding(holder).register_forward_hook(_note, with_kwargs=True)  # type: ignore[union-attr]


def unwatch(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    for module in model.modules():
        vars(module).pop(GRID, None)
        remove_hooks(module, _begin, _end, _note, _begin_chunks)


def grid_of(module: nn.Module, query: torch.Tensor) -> Told | None:
    """How the patches that a module attends to lie, None where only its config may tell.

    Args:
        query: (B, H, N, D).

    Raises:
        ValueError: it cannot be found.
    """
    grids: Grids | None = getattr(module, GRID, None)
    if grids is None:
        return None
    batch_size, tokens, made = query.shape[0], query.shape[2], _thread.patches
    name = type(module).__name__
    if _thread.chunks.module is module:
        return _chunk(grids, made, name)
    window = _window(module)
    if (grid := made.of_rows(batch_size, tokens)) is not None:
        if window is not None and isinstance(grid, tuple) and math.prod(window) == tokens != math.prod(grid):
            return window
        if made.trains and not torch.compiler.is_compiling():
            grids.trained[tokens] = grid if grids.trained.get(tokens, grid) == grid else None
        return grid
    if window is not None and math.prod(window) == tokens:
        return window
    if made.sides is not None or made.shapes is not None:
        sizes = dict.fromkeys([made.sides] if made.sides is not None else made.shapes or [])
        patches = " or ".join(" x ".join(map(str, sides)) for sides in sizes)
        raise ValueError(
            f"{name} attends to {batch_size} sequences of {tokens} tokens, and its model has made {patches} patches of "
            f"each of {made.batch_size} images; give the option grid_size=(height, width), or leave it out with "
            "layers, roles or modules"
        )
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0 and tokens in grids.trained:
        # Gradient checkpointing calls the layer again, in the backward, without the model around it.
        if (held := grids.trained[tokens]) is None:
            raise ValueError(
                f"{name} was called with images of several shapes of {tokens} tokens, and gradient checkpointing does "
                "not tell which is computed again; give it one shape, or train without gradient checkpointing"
            )
        return held
    if not grids.in_config:
        raise ValueError(
            f"cannot tell rows and columns of the {tokens} tokens that {name} attends to: neither an image nor its "
            "config shows them; give the option grid_size=(height, width)"
        )
    return None


def grid_of_image(model: nn.Module, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the patches that a model cuts images of this size into, (B, channels, height, width).

    Raises:
        ValueError: no convolution over images cuts them.
    """
    embedding = _embedding(model)
    if not isinstance(embedding, nn.Conv2d):
        raise ValueError(
            f"cannot tell how {type(model).__name__} cuts an image into patches; allowed: models that do it by a "
            "convolution, as ViT and DINOv2"
        )
    with torch.no_grad():
        rows, columns = embedding(pixel_values).shape[2:]
    return rows, columns


def _window(module: nn.Module) -> Sides | None:
    """The window of the image that a module attends within, at once (Swin)."""
    for holder in (module, *module.children()):
        size = getattr(holder, "window_size", None)
        pair = size if isinstance(size, (tuple, list)) else (size, size)
        if len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair):
            return pair[0], pair[1]
    return None


def _embedding(model: nn.Module) -> nn.Module | None:
    """What makes patches: a model's first convolution over images, or what gets them cut, with their numbers beside."""

    def makes(module: Any) -> bool:
        if isinstance(module, PreTrainedModel):
            return False
        return isinstance(module, (nn.Conv2d, nn.Conv3d)) or {"pixel_values", "spatial_shapes"} <= _takes(type(module))

    return next(filter(makes, model.modules()), None)


def _takes(cls: type[nn.Module]) -> set[str]:
    return set(inspect.signature(inspect.unwrap(cls.forward)).parameters)


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    made = _thread.patches
    made.clear()
    made.trains = torch.is_grad_enabled()
    takes = _takes(type(model))
    if not {"grid_thw", "image_sizes"} & takes:
        return
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    made.model = model
    if given.get("grid_thw") is not None:
        made.images = given["grid_thw"].tolist()
    made.sizes = given.get("image_sizes") if "image_sizes" in takes else None


def _end(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _thread.patches.clear()


def _note(embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
    made = _thread.patches
    made.batch_size, made.sides = output.shape[0], tuple(output.shape[2:])
    if not isinstance(embedding, (nn.Conv2d, nn.Conv3d)):
        given = inspect.signature(embedding.forward).bind(*args, **kwargs).arguments["spatial_shapes"]
        made.sides, made.shapes = None, [tuple(shape) for shape in torch.as_tensor(given).tolist()]
    elif made.model is not None and isinstance(embedding, nn.Conv2d) and made.images is None:
        rows, columns = embedding.stride
        sizes = [made.sides] * made.batch_size
        if made.sizes is not None:
            sizes = [(int(height) // rows, int(width) // columns) for height, width in made.sizes]
        made.sides, made.shapes = None, sizes


def _begin_chunks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    begins, chunks = given.get("cu_seqlens"), _thread.chunks
    if begins is None:
        chunks.module = None
        return
    chunks.module, chunks.next = module, 0
    chunks.lengths = tuple(begins.diff().tolist())
    chunks.rotary = given.get("position_embeddings", given.get("rotary_pos_emb"))


def _chunk(grids: Grids, made: Patches, name: str) -> Grid:
    """The grid of the chunk that a module attends to next."""
    chunks = _thread.chunks
    if made.images is not None and made.model is not None:
        known = made.chunks.get(chunks.lengths)
        if known is None:
            known = grids_of_chunks(chunks.lengths, made.images, made.model, chunks.rotary, name)
            made.chunks[chunks.lengths] = known
        if made.trains:
            before = grids.trained_chunks.get(chunks.lengths, known)
            grids.trained_chunks[chunks.lengths] = known if before == known else None
    elif torch._C._current_graph_task_id() >= 0 and chunks.lengths in grids.trained_chunks:
        known = grids.trained_chunks[chunks.lengths]  # computed again, as below
    else:
        known = None
    if known is None:
        raise ValueError(
            f"cannot tell of what images the {len(chunks.lengths)} chunks are that {name} attends to; give the option "
            "grid_size=(height, width), or leave it out with layers, roles or modules"
        )
    chunks.next += 1
    if chunks.next == len(known):
        chunks.module = None
    return known[chunks.next - 1]
