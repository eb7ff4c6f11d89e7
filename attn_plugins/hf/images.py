"""Images of several sizes in one call: an attention on a grid attends to each by itself, as the model's mask has it.

Models put such images into rows of their own, filled up with padding (SigLIP 2), or one after another into one row,
kept apart by the mask (Pixtral).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attn_plugins.core.grid import GridSize
from attn_plugins.core.mask import AttentionMask


@dataclass(frozen=True)
class Images:
    """Some of the images of a call, of one size: where their tokens are."""

    rows: tuple[int, ...]
    tokens: slice
    """In these rows."""
    grid: GridSize


def in_rows(shapes: list[tuple[int, ...]]) -> list[Images]:
    """Images in rows of their own, from the first token on."""
    return [
        Images(tuple(row for row, other in enumerate(shapes) if other == shape), slice(0, shape[0] * shape[1]), shape)
        for shape in dict.fromkeys(shapes)
    ]


def in_one_row(shapes: list[tuple[int, ...]]) -> list[Images]:
    """Images one after another."""
    found, begin = [], 0
    for shape in shapes:
        found.append(Images((0,), slice(begin, begin + shape[0] * shape[1]), shape))
        begin += shape[0] * shape[1]
    return found


def attend_to_each(
    slot: nn.Module,
    images: list[Images],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: AttentionMask,
    position_bias: torch.Tensor | None = None,
    need_weights: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a slot returns for the whole call: (out (B, Q, H, V), weights (B, H, Q, K) or None).

    Tokens of no image, such as padding, get zeros.

    Raises:
        ValueError: the mask shows a token of one image to one of another, or hides an image from itself.
    """
    batch, heads, tokens = query.shape[:3]
    if batch == 1 and len(images) > 1 and not _apart(mask, images):
        raise ValueError(
            f"{len(images)} images are in one row of {tokens} tokens, and the mask does not say that each attends to "
            f"itself alone, got {mask!r}; allowed: masks that show all of an image to itself, and nothing else"
        )
    out = value.new_zeros(batch, tokens, heads, value.shape[3])
    weights = value.new_zeros(batch, heads, tokens, key.shape[2]) if need_weights else None
    for part in images:
        rows, place = torch.tensor(part.rows, device=query.device), part.tokens
        q, k, v = (x[rows][:, :, place] for x in (query, key, value))
        own, more = _mask_of(mask, rows, place), dict(options)
        if position_bias is not None:
            bias = position_bias if position_bias.ndim < 4 or len(position_bias) == 1 else position_bias[rows]
            more["position_bias"] = bias[..., place, place]
        attended, weighed = slot(q, k, v, mask=own, grid_size=part.grid, need_weights=need_weights, **more)
        out[rows, place] = attended.to(out.dtype)
        if weights is not None:
            weights[rows, :, place, place] = weighed
    return out, weights


def _apart(mask: AttentionMask, images: list[Images]) -> bool:
    """Whether a mask shows all of each image to itself, and none of the others."""

    def compare() -> bool:
        lengths = [part.tokens.stop - part.tokens.start for part in images]
        own = torch.arange(len(images), device=mask.device).repeat_interleave(torch.tensor(lengths, device=mask.device))
        if mask.plain and mask.segments_BK is not None and mask.padding_BK is None and not mask.causal:
            begins = torch.nn.functional.pad(own.diff() != 0, (1, 0), value=True)
            changes = torch.nn.functional.pad(mask.segments_BK[0].diff() != 0, (1, 0), value=True)
            return torch.equal(begins, changes) and len(mask.segments_BK[0].unique()) == len(images)
        return torch.equal(mask.dense()[0, 0], own.unsqueeze(1) == own)

    return mask.cached(("apart", tuple(part.tokens.stop for part in images)), compare)


def _mask_of(mask: AttentionMask, rows: torch.Tensor, place: slice) -> AttentionMask:
    """The mask of these images: plain where it hides nothing of them."""
    number = place.stop - place.start

    def cut() -> AttentionMask:
        index = torch.arange(place.start, place.stop, device=mask.device)
        shown = mask.visible(index.view(1, -1, 1), index.view(1, 1, -1))
        shown = shown[rows] if len(shown) > 1 else shown
        if bool(shown.all()):
            return AttentionMask(len(rows), number, number, causal=False, device=mask.device)
        return AttentionMask(len(rows), number, number, causal=False, plain=False, dense_BQK=shown, device=mask.device)

    return mask.cached(("images", tuple(rows.tolist()), place.start, place.stop), cut)
