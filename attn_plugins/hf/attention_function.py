"""The attention function that transformers calls: a module's slot attends, or what served the module before."""

import functools
from typing import Any

import torch
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.hf.adapters import adapter_of
from attn_plugins.hf.arguments import WITHOUT_EFFECT, refuse_unsupported, sinks_of_queries
from attn_plugins.hf.caches.cache_layers import check_ends
from attn_plugins.hf.call import Call
from attn_plugins.hf.discovery.rotary import rotary_of
from attn_plugins.hf.grids import grid_of
from attn_plugins.hf.grouped_keys import fitted
from attn_plugins.hf.hidden_states import hidden_states_of
from attn_plugins.hf.images import attend_to_each
from attn_plugins.hf.masks import packing
from attn_plugins.hf.masks.given import as_mask, chosen_keys
from attn_plugins.hf.masks.mask_function import LazyMask
from attn_plugins.hf.masks.structured import with_given_structure
from attn_plugins.hf.names import BASE, ROLE, SLOT, slot_of
from attn_plugins.hf.native_attention import OwnCall, attend_natively
from attn_plugins.hf.observe import Observed, observer_of, refuse_state
from attn_plugins.hf.parallel.context import RUNNING
from attn_plugins.hf.parallel.in_parts import attend_in_part, rows_of
from attn_plugins.hf.recording import WEIGHED, weights_wanted
from attn_plugins.hf.split import SplitAttention
from attn_plugins.hf.structures import refuse_unwatched
from attn_plugins.hf.under_way import thread


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
    """Attend by the attention in the module's slot, or by its base implementation where it has none.

    Registered as an attention function, with the arguments of one: query (B, H, Q, D), key (B, G, K, D) and value
    (B, G, K, V).

    Returns:
        (out (B, Q, H, V), weights (B, H, Q, K) or None).

    Raises:
        ValueError: the module was not swapped, or the call needs something that its attention does not support.
    """
    base = getattr(module, BASE, None)
    if base is None:
        raise ValueError(
            f"{type(module).__name__} was told to use attn_plugins, but no attention has been put into its model; "
            "load the whole model with from_pretrained, or call attn_plugins.swap_attention(model, ...)"
        )
    slot: Any = module._modules.get(SLOT)
    need_weights, observer, notes = False, None, thread.notes
    call: Call | None = notes.call if notes.call is not None and notes.call.module is module else None
    usual = (
        slot is not None
        and isinstance(attention_mask, LazyMask)
        and attention_mask.segments_BK is None
        and attention_mask.rows is None
        and not RUNNING
        and (notes.packing is None or notes.packing.texts_BN is None)
        and notes.asking is None
        and not notes.observers
        and WITHOUT_EFFECT.issuperset(kwargs)
        and not (torch.is_grad_enabled() and hasattr(module, WEIGHED))
    )
    given: dict[str, Any] = {}
    if not usual:  # of what follows to the end of the block, nothing would refuse or change a usual call
        rows = rows_of(module, attention_mask)
        segmented = isinstance(attention_mask, AttentionMask) and attention_mask.segments_BK is not None
        packing.check(None if isinstance(attention_mask, torch.Tensor) else segmented)
        if segmented and call is not None:
            packing.mark_cache(call)
        if kwargs:
            refuse_unwatched(kwargs)
        if kwargs and (base in ("eager", "sdpa") or slot is not None):
            attention_mask = chosen_keys(module, query, key, attention_mask, kwargs)
        need_weights, observer = weights_wanted(module, kwargs), observer_of(module)
        extras = {"is_causal": is_causal, "position_bias": position_bias, "softcap": softcap, "s_aux": s_aux}
        given = {"scaling": scaling, **extras, **kwargs}
        if (logits := kwargs.pop("sinks", None)) is not None:
            position_bias, s_aux = sinks_of_queries(logits, position_bias, key.shape[2])
        if rows is not None:
            if need_weights or observer is not None:
                raise ValueError("in context_parallel attention weights cannot be had, nor be observed; leave it out")
            refuse_unsupported(module, call, kwargs, rows.given if slot is None else None)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            of_scores: dict[str, Any] = {"position_bias": position_bias, "softcap": softcap, "sinks": s_aux}
            return attend_in_part(
                module, query, key, value, attention_mask, rows, call, scale=scale, dropout=dropout, **of_scores
            )
        if slot is None or observer is not None:
            own = functools.partial(attend_natively, module, base, query, key, value, attention_mask, **given)
            if observer is None:
                return own(need_weights=need_weights, dropout=dropout)
            refuse_state(module, None if call is None else call.state)
            # A family with an adapter attends within its forward: softmax attention serves in its place, further below.
            served = own(need_weights=need_weights, dropout=0.0) if adapter_of(type(module)) is None else None
            if observer.see is None and served is not None:
                return served
        if kwargs:
            if kwargs.get("cache") is not None:
                raise ValueError(
                    "attn_plugins cannot serve paged caches (continuous batching); use generate() without it"
                )
            refuse_unsupported(module, call, kwargs)
    attention: Any = slot if isinstance(slot, Attention) else slot_of(module)
    query, key, value = fitted(module, query, key, value)
    beside: dict[str, Any] = {}
    if isinstance(attention, SplitAttention):
        extras = {"is_causal": is_causal, "position_bias": position_bias, "softcap": softcap, "s_aux": s_aux}
        given = {**(given or {"scaling": scaling, **extras, **kwargs}), "dropout": dropout}
        beside["own"] = OwnCall(module, base, query, key, value, attention_mask, given)
    lazy = attention_mask if isinstance(attention_mask, LazyMask) else None
    state = None
    if call is not None:
        if lazy is None and getattr(module, ROLE) == "decoder":
            check_ends(module, call, attention)
        state = None if lazy is None else call.state
    mask: AttentionMask
    if state is not None and lazy is not None and call is not None:
        if call.consumed:
            raise ValueError(
                f"{type(module).__name__} calls its attention more than once in a forward pass; allowed: once, where "
                f"a cache holds the state of {attention!r}; generate with use_cache=False"
            )
        call.consumed = True
        before = None if torch.compiler.is_compiling() else state.seen  # a compiled step is for any number of tokens
        mask = lazy.over_all_tokens(state, before)
    elif (  # what _masked would come to
        usual
        and notes.structure is None
        and not attention_mask.fixed_length
        and attention_mask.q_length == query.shape[2]
        and attention_mask.kv_length == key.shape[2]
        and ((role := getattr(module, ROLE)) == "decoder" or (role == "encoder" and query.shape[2] == key.shape[2]))
    ):
        mask = attention_mask
    else:
        key, value, position_bias, mask = _masked(
            module, attention, query, key, value, attention_mask, position_bias, base, is_causal
        )
    grid = grid_of(module, query) if attention.wants_grid else None
    images = grid if isinstance(grid, list) else None
    arguments: dict[str, Any] = {"mask": mask, "scale": query.shape[-1] ** -0.5 if scaling is None else scaling}
    for name, extra in (("position_bias", position_bias), ("softcap", softcap), ("sinks", s_aux)):
        if extra is not None:
            arguments[name] = extra
    if attention.wants_rotary:
        arguments["rotary"] = rotary_of(module, call)
    if images is None and grid is not None:
        arguments["grid_size"] = grid
    if attention.wants_hidden:
        arguments["hidden"] = hidden_states_of(module, call, query)
    if images is not None:
        if observer is not None or beside:
            raise ValueError(
                f"{type(module).__name__} was given images of several sizes, of which attention to some heads alone is "
                "not served, nor observed; give it images of one size"
            )
        return attend_to_each(slot, images, query, key, value, **arguments, dropout=dropout, need_weights=need_weights)
    if observer is not None:
        if served is None:
            softmax, plain = get_attention("softmax"), ("mask", "scale", "position_bias", "softcap", "sinks")
            of_scores = {name: arguments[name] for name in plain if name in arguments}
            own = functools.partial(softmax(softmax.Config()), query, key, value, **of_scores)
            served = own(need_weights=need_weights, dropout=0.0)
        if observer.see is not None:
            weigh = functools.partial(own, need_weights=True, dropout=0.0)
            observer.see(Observed.of(module, (query, key, value), served, weigh, **arguments))
        if observer.bypasses:
            return served
    attended = slot(query, key, value, **arguments, dropout=dropout, state=state, need_weights=need_weights, **beside)
    if state is not None and before is not None and state.seen != before + key.shape[2]:
        raise ValueError(
            f"{attention!r} has not taken in the {key.shape[2]} tokens that its state was to grow by: a hook "
            "on its slot has kept the state from it; hooks have to hand on state= as it is"
        )
    return attended


def _masked(
    module: nn.Module,
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    given: Any,
    position_bias: torch.Tensor | None,
    base: str,
    is_causal: bool | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, AttentionMask]:
    """(Keys and values that are written, what is added to scores, the mask) of a module without a state."""
    causal, role = getattr(module, "is_causal", True) if is_causal is None else is_causal, getattr(module, ROLE)
    if base == "eager":
        causal = False  # where a model makes no mask, only sdpa and the like are causal by themselves (BridgeTower)
    lazy = given if isinstance(given, LazyMask) else None
    # Bidirectional self-attention has as many keys as queries, unless a cache holds some before them or the model has
    # pooled some (SegFormer) or added some (perceivers): then nothing says which key is where a query is.
    cross = role == "cross" or (
        role == "encoder" and query.shape[2] != key.shape[2] and not (lazy is not None and lazy.last_queries)
    )
    if lazy is not None and lazy.fixed_length and not cross and key.shape[2] == lazy.kv_length:
        if torch.compiler.is_compiling() and query.shape[2] == 1 and attention.unwritten_keys:
            given = lazy.hiding_unwritten()
        else:
            given = lazy.written()
            key, value = key[:, :, : given.kv_length], value[:, :, : given.kv_length]
            position_bias = position_bias if position_bias is None else position_bias[..., : given.kv_length]
    mask, bias = as_mask(given, query, key, causal=causal, cross=cross)
    if bias is not None:
        position_bias = bias if position_bias is None else position_bias + bias
    return key, value, position_bias, with_given_structure(mask, module, given)
