"""Reading the structure of a dense mask off its values: many models make their own, and few are more than padding."""

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from attn_plugins.core.tracing import readable, recorded

HIDDEN = -1e4
"""An additive mask at or below this hides a key: exp of it is 0 in every dtype."""


def read_dense(
    given: torch.Tensor, q_length: int, kv_length: int, dtype: torch.dtype, *, causal: bool, cross: bool
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """(arguments of AttentionMask, bias to add to scores of ``dtype``) for a mask ([B or 1, [1 or H,]] 1 or Q, K).

    What its values say is remembered for as long as the tensor lives and nobody writes to it: layers share their mask.
    """
    mask = given[..., :kv_length]
    if mask.ndim < 4:
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask[None, None]
    allowed = mask if mask.dtype == torch.bool else mask > HIDDEN
    known = readable(mask)
    same_for_heads = allowed.shape[1] == 1 or (known and bool((allowed == allowed[:, :1]).all()))
    bias = None
    if not same_for_heads:
        bias = additive(mask, dtype) if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(dtype).min)
    elif mask.dtype != torch.bool:
        added = mask.masked_fill(~allowed, 0.0)
        bias = added if added.requires_grad or recorded(mask) or bool(added.any()) else None
    if same_for_heads and allowed.shape[2] == 1 < q_length:  # one row for all queries
        return {"causal": False, "padding_BK": allowed[:, 0, 0]}, bias
    allowed_BQK = (allowed[:, 0] if same_for_heads else allowed.any(dim=1)).expand(-1, q_length, -1)
    found = None if not known or not same_for_heads else _remembered(given, allowed_BQK, causal, cross)
    return found or {"causal": False, "plain": False, "dense_BQK": allowed_BQK}, bias


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as it is added to scores of ``dtype``."""
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, torch.finfo(dtype).min)


def structure(allowed_BQK: torch.Tensor, *, causal: bool, cross: bool = False) -> dict[str, Any] | None:
    """Padding, causality and segments that say all of a mask, or None where it is more than these.

    A query that sees nothing and that nobody sees is padding; what it would see otherwise doesn't matter.

    Args:
        causal: what to call a mask that is as good causal as not.
    """
    _, queries, keys = allowed_BQK.shape
    padding_BK = allowed_BQK.any(dim=1)
    matters_BQ = allowed_BQK.any(dim=2)
    if not cross and queries <= keys:
        matters_BQ = matters_BQ | padding_BK[:, keys - queries :]
    in_order_QK = torch.ones(queries, keys, dtype=torch.bool, device=allowed_BQK.device).tril(keys - queries)

    def fits(is_causal: bool, segments_BK: torch.Tensor | None = None) -> bool:
        seen_BQK = padding_BK.unsqueeze(1) & in_order_QK if is_causal else padding_BK.unsqueeze(1)
        if segments_BK is not None:
            own_BQ = segments_BK[:, keys - queries :]
            seen_BQK = seen_BQK & (own_BQ.unsqueeze(2) == segments_BK.unsqueeze(1))
        return not bool(((seen_BQK != allowed_BQK) & matters_BQ.unsqueeze(2)).any())

    kinds = (False,) if cross else (causal, not causal)
    padding = {"padding_BK": None if bool(padding_BK.all()) else padding_BK}
    for kind in kinds:
        if fits(kind):
            return {"causal": kind, **padding}
    if cross or queries > keys:
        return None
    # Sequences in a row: each token is of the segment that begins with the first key it sees, and a key without a query
    # of the last that begins before it.
    first_BQ = torch.where(allowed_BQK.any(dim=2), allowed_BQK.long().argmax(dim=2), 0)
    begun_BK = torch.zeros_like(padding_BK, dtype=torch.long).scatter(1, first_BQ, first_BQ)
    segments_BK = torch.cat([begun_BK[:, : keys - queries], first_BQ], dim=1).cummax(dim=1).values
    for kind in kinds:
        if fits(kind, segments_BK):
            return {"causal": kind, **padding, "segments_BK": segments_BK}
    return None


def _remembered(given: torch.Tensor, allowed_BQK: torch.Tensor, causal: bool, cross: bool) -> dict[str, Any] | None:
    if given.is_inference():  # such tensors don't count what is written to them
        return structure(allowed_BQK, causal=causal, cross=cross)
    key = (given._version, allowed_BQK.shape, causal, cross)
    held = _found.get(given)
    if held is None or held[0] != key:
        held = _found[given] = (key, structure(allowed_BQK, causal=causal, cross=cross))
    return held[1]


_found = WeakTensorKeyDictionary()
