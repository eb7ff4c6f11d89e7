"""The attention function that transformers calls: a module's slot attends, or what served the module before."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.arguments import refuse_unknown
from attn_plugins.hf.discovery.interface import USUAL, call_of
from attn_plugins.hf.grids import grid_of
from attn_plugins.hf.heads import fitted
from attn_plugins.hf.hidden_states import hidden_states_of
from attn_plugins.hf.masks import packing
from attn_plugins.hf.masks.dense_masks import additive, read_dense
from attn_plugins.hf.masks.mask_function import LazyMask
from attn_plugins.hf.names import BASE, ROLE, SLOT, slot_of
from attn_plugins.hf.recording import weights_wanted


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Registered as an attention function: the module's slot attends, or its base implementation where it has none."""
    slot, base = getattr(module, SLOT, None), getattr(module, BASE, None)
    if base is None:
        raise ValueError(
            f"{type(module).__name__} was told to use attn_plugins, but no attention has been put into its model; "
            "load the whole model with from_pretrained, or call attn_plugins.swap_attention(model, ...)"
        )
    ours = isinstance(attention_mask, AttentionMask)
    packing.check(attention_mask.segments_BK is not None if ours else None if attention_mask is not None else False)
    if base in ("eager", "sdpa") or slot is not None:
        attention_mask = chosen_keys(module, query, key, attention_mask, kwargs)
    weighed = weights_wanted(module, kwargs)
    if slot is None:
        given = {"is_causal": is_causal, "position_bias": position_bias, "softcap": softcap, "s_aux": s_aux}
        given = {name: extra for name, extra in given.items() if extra is not None}
        if weighed and base != "eager":  # the others give none, and the layers with a slot do
            attention_mask, base = explicit(module, query, key, attention_mask, is_causal), "eager"
        native_mask = attention_mask.native(base) if isinstance(attention_mask, LazyMask) else attention_mask
        if base == "eager" and getattr(native_mask, "dtype", None) == torch.bool:
            # Made from a mask of ours, which is boolean, by a model that would have got one to add under this name.
            native_mask = additive(native_mask, query.dtype)
        return native_attention(module, base)(
            module, query, key, value, native_mask, scaling=scaling, dropout=dropout, **given, **kwargs
        )
    if kwargs.get("cache") is not None:
        raise ValueError("attn_plugins cannot serve paged caches (continuous batching); use generate() without it")
    refuse_unknown(module, kwargs)
    causal, role = getattr(module, "is_causal", True) if is_causal is None else is_causal, getattr(module, ROLE)
    if base == "eager":
        causal = False  # where a model makes no mask, only sdpa and the like are causal by themselves (BridgeTower)
    state = attention_mask.state if isinstance(attention_mask, LazyMask) else None
    if state is not None:
        if attention_mask.spent:
            raise ValueError(
                f"{type(module).__name__} calls its attention more than once in a forward pass; allowed: once, where "
                f"a cache holds the state of {slot_of(module)!r}; generate with use_cache=False"
            )
        attention_mask.spent = True
    mask, bias = attention_mask, None
    query, key, value = fitted(type(module).__name__, query, key, value)
    if state is None:
        # Bidirectional self-attention has as many keys as queries, unless a cache holds some before them or the model
        # has pooled some (SegFormer) or added some (perceivers): then nothing says which key is where a query is.
        behind = isinstance(attention_mask, LazyMask) and attention_mask.last_queries
        cross = role == "cross" or (role == "encoder" and query.shape[2] != key.shape[2] and not behind)
        static = isinstance(attention_mask, LazyMask) and attention_mask.fixed_length and not cross
        if static and key.shape[2] == attention_mask.kv_length:
            one = torch.compiler.is_compiling() and query.shape[2] == 1
            if one and getattr(slot_of(module), "unwritten_keys", False):
                attention_mask = attention_mask.hiding_unwritten()
            else:
                attention_mask = attention_mask.written()
                number = attention_mask.kv_length
                key, value = key[:, :, :number], value[:, :, :number]
                position_bias = position_bias if position_bias is None else position_bias[..., :number]
        mask, bias = as_mask(attention_mask, query, key, causal=causal, cross=cross)
    if bias is not None:
        position_bias = bias if position_bias is None else position_bias + bias
    before = None if state is None or torch.compiler.is_compiling() else state.seen
    attended = slot(
        query,
        key,
        value,
        mask=mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        position_bias=position_bias,
        softcap=softcap,
        sinks=s_aux,
        rotary=getattr(attention_mask, "rotary", None),
        grid_size=grid_of(module, query),
        hidden=hidden_states_of(module, query),
        state=state,
        need_weights=weighed,
    )
    if before is not None and state is not None and state.seen != before + key.shape[2]:
        raise ValueError(
            f"{slot_of(module)!r} has not taken in the {key.shape[2]} tokens that its state was to grow by: a hook "
            "on its slot has kept the state from it; hooks have to hand on state= as it is"
        )
    return attended


def explicit(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, is_causal: bool | None) -> Any:
    """The mask for "eager" of a module that was to be served by sdpa, which is causal by itself without one."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None or not causal or query.shape[2] == 1:
        return mask
    sizes = (len(query), query.shape[2], key.shape[2])
    return AttentionMask(*sizes, causal=True, q_offset=0, device=query.device).dense()


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


def native_attention(module: nn.Module, implementation: str) -> Callable:
    """The function that the module itself would have called under ``implementation``.

    Raises:
        ValueError: the module does not show the function that it calls.
    """
    call = call_of(type(module))
    default: Any = None if call is None else call.eager
    found = None if call is None else call.interface.get_interface(implementation, default)
    if found is None:
        raise ValueError(
            f"cannot find the {implementation!r} attention of {type(module).__name__}; name it {USUAL}, in the file "
            "that calls the attention interface"
        )
    return found
