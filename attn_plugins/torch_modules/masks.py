"""Masks as torch's modules and functions take them, as an AttentionMask and a bias on the scores.

For ``nn.MultiheadAttention`` True hides a key; for ``scaled_dot_product_attention``, as here, True shows it.
"""

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import readable, recorded
from attn_plugins.hf.masks.dense_masks import HIDDEN, read_dense

Read = tuple[AttentionMask, torch.Tensor | None]
"""A mask, and a bias on the scores that broadcasts to (B, H, Q, K)."""


def read(
    query_BHQD: torch.Tensor,
    key_BGKD: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    hidden_BK: torch.Tensor | None = None,
    is_causal: bool = False,
    cross: bool,
) -> Read:
    """What queries see of keys.

    Args:
        mask: broadcasts to (B, H, Q, K), of 2 to 4 dimensions: bool, True where a key is seen, or floating, added to
            scores. With ``is_causal`` it is taken for the causal mask and not read.
        hidden_BK: bool, True where a key is padding, or floating, added to the scores of a key.
        is_causal: query i sees keys 0 to i.
        cross: keys are of another sequence than queries.

    Raises:
        ValueError: sizes or dtypes do not fit.
    """
    batch, heads, queries, _ = query_BHQD.shape
    keys, device = key_BGKD.shape[2], query_BHQD.device
    found: dict[str, Any] = {"causal": False}
    bias = None
    if is_causal and queries == keys and not cross:
        found = {"causal": True}
    else:
        if mask is None and is_causal:  # torch counts both from their first tokens, whatever their numbers
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
        if mask is not None:
            _check("attn_mask", mask, (batch, heads, queries, keys))
            if mask.shape[-1] == 1 < keys:
                mask = mask.expand(*mask.shape[:-1], keys)
            mask = mask.unsqueeze(0) if mask.ndim == 3 else mask
            found, bias = read_dense(mask, queries, keys, query_BHQD.dtype, causal=False, cross=cross)
    if hidden_BK is not None:
        _check("key_padding_mask", hidden_BK, (batch, keys), exact=True)
        seen_BK = ~hidden_BK if hidden_BK.dtype == torch.bool else hidden_BK > HIDDEN
        before = found.get("padding_BK")
        found = {**found, "padding_BK": seen_BK if before is None else seen_BK & before}
        if hidden_BK.is_floating_point():
            added = hidden_BK.masked_fill(~seen_BK, 0.0)
            if added.requires_grad or recorded(added) or bool(added.any()):
                added = added[:, None, None].to(query_BHQD.dtype)
                bias = added if bias is None else bias + added
    return AttentionMask(batch, queries, keys, **found, cross=cross, device=device), bias


def inverted(mask: torch.Tensor) -> torch.Tensor:
    """A mask of nn.MultiheadAttention as the others are: True shows a key. Floating ones are alike.

    The inverse of a tensor is remembered, and so is what is read of it: layers share their masks.
    """
    if mask.dtype != torch.bool:
        return mask
    if not readable(mask) or mask.is_inference():
        return ~mask
    held = _inverses.get(mask)
    if held is None or held[0] != mask._version:
        held = _inverses[mask] = (mask._version, ~mask)
    return held[1]


_inverses = WeakTensorKeyDictionary()


def _check(name: str, mask: torch.Tensor, sizes: tuple[int, ...], *, exact: bool = False) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name} is of dtype {mask.dtype}; allowed: bool, or a floating dtype, to be added to scores")
    ends = sizes[len(sizes) - mask.ndim :]
    fits = 2 <= mask.ndim <= len(sizes) and all(
        got == want or (got == 1 and not exact) for got, want in zip(mask.shape, ends, strict=True)
    )
    if not fits:
        allowed = f"{sizes}" if exact else f"what broadcasts to (batch, heads, queries, keys) = {sizes}"
        raise ValueError(f"{name} is of shape {tuple(mask.shape)}; allowed here: {allowed}")
