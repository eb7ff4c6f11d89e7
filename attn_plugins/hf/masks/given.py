"""Whatever a module gives its attention function for a mask, as an AttentionMask and a bias on the scores."""

from typing import Any

import torch
from torch import nn

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.masks.dense_masks import read_dense
from attn_plugins.hf.masks.mask_function import LazyMask


def as_mask(
    given: Any, query: torch.Tensor, key: torch.Tensor, *, causal: bool, cross: bool
) -> tuple[AttentionMask, torch.Tensor | None]:
    """Whatever a model passes for a mask as (AttentionMask, additive bias (B, 1 or H, Q, K) or None).

    Raises:
        ValueError: the mask is of another size than queries and keys, or of a kind that is not known.
    """
    batch_size, q_length, kv_length, device = query.shape[0], query.shape[2], key.shape[2], query.device
    if isinstance(given, AttentionMask):
        if given.q_length == 1 and q_length > 1 and given.plain and not given.causal and given.segments_BK is None:
            given = given.for_queries(q_length)  # one row for all queries: padding, as in a tensor below (BridgeTower)
        if (given.q_length, given.kv_length) != (q_length, kv_length):
            raise ValueError(
                f"the mask is for {given.q_length} queries and {given.kv_length} keys, "
                f"the attention has {q_length} and {kv_length}"
            )
        return (given.as_cross() if cross else given), None
    causal = causal and not cross
    sizes: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "device": device}
    if given is None:
        return AttentionMask(**sizes, causal=causal, cross=cross), None
    if not isinstance(given, torch.Tensor) or given.ndim not in (2, 3, 4):
        got = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(f"cannot read the attention mask {got}; allowed: None, or a tensor of 2, 3 or 4 dimensions")
    fits = {2: [batch_size], 3: [batch_size, q_length], 4: [batch_size, query.shape[1], q_length]}[given.ndim]
    if given.shape[-1] < kv_length or any(n not in (1, fit) for n, fit in zip(given.shape, fits, strict=False)):
        allowed = ", ".join([*(f"1 or {fit}" for fit in fits), f"{kv_length} or more"])
        raise ValueError(f"the attention mask is of shape {tuple(given.shape)}; allowed here: ({allowed})")
    if given.ndim == 2:
        return AttentionMask(**sizes, causal=causal, cross=cross, padding_BK=given[:, -kv_length:].bool()), None
    if given.dtype != torch.bool and not given.is_floating_point():
        raise ValueError(
            f"the attention mask {tuple(given.shape)} is of dtype {given.dtype}, which does not say if it is to be "
            "added; allowed: bool, True where a key is seen, or a floating dtype, to be added to scores"
        )
    read, bias = read_dense(given, q_length, kv_length, query.dtype, causal=causal, cross=cross)
    return AttentionMask(**sizes, **read, cross=cross), bias


def chosen_keys(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
    """The mask, without keys that the model's own indexer has not chosen.

    Models that choose keys for each query (DeepSeek 3.2, MiniMax M3) put the choice into the mask where they know the
    attention function by name. To others they hand it over, and it is taken out of ``kwargs`` here.
    """
    indices, blocks = kwargs.pop("indices", None), kwargs.pop("block_indices", None)
    if indices is not None:
        chosen = torch.zeros(query.shape[0], query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
        chosen = chosen.scatter(-1, indices.long(), 1).unsqueeze(1)
        if mask is None:
            mask = AttentionMask(query.shape[0], query.shape[2], key.shape[2], causal=True, device=key.device).dense()
        if isinstance(mask, LazyMask) or mask.dtype == torch.bool:
            return mask & chosen
        return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)
    if blocks is not None:
        first = key.shape[2] - query.shape[2]
        positions = torch.arange(first, key.shape[2], device=key.device).expand(query.shape[0], -1)
        positions = positions if kwargs.get("position_ids") is None else kwargs["position_ids"].expand(len(query), -1)
        build: Any = module.indexer.build_block_mask  # type: ignore[union-attr]
        return build(blocks, mask, key.shape[2], query.dtype, key.device, positions)
    return mask
