"""The attention of a swapped model's modules that no rule matches: the implementation that served them before."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.discovery.by_code import dispatch_of
from attn_plugins.hf.discovery.declared import EAGER_NAME
from attn_plugins.hf.masks.dense_masks import additive
from attn_plugins.hf.masks.mask_function import LazyMask


def attend_natively(
    module: nn.Module,
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    *,
    need_weights: bool,
    **given: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend by ``implementation``, with the mask that it would have been given; by "eager" where weights are wanted.

    Args:
        given: more arguments of an attention function; None stands for what is not given.
    """
    given = {name: value for name, value in given.items() if value is not None or name == "scaling"}
    if need_weights and implementation != "eager":  # the others give none, and the layers with a slot do
        mask, implementation = _explicit(module, query, key, mask, given.get("is_causal")), "eager"
    native_mask = mask.native(implementation) if isinstance(mask, LazyMask) else mask
    if implementation == "eager" and getattr(native_mask, "dtype", None) == torch.bool:
        # Made from a mask of ours, which is boolean, by a model that would have got one to add under this name.
        native_mask = additive(native_mask, query.dtype)
    return native_attention(module, implementation)(module, query, key, value, native_mask, **given)


def native_attention(module: nn.Module, implementation: str) -> Callable:
    """The function that the module itself would have called under ``implementation``.

    Raises:
        ValueError: the module does not show the function that it calls.
    """
    dispatch = dispatch_of(type(module))
    default: Any = None if dispatch is None else dispatch.eager
    found = None if dispatch is None else dispatch.interface.get_interface(implementation, default)
    if found is None:
        raise ValueError(
            f"cannot find the {implementation!r} attention of {type(module).__name__}; name it {EAGER_NAME}, in the "
            "file that calls the attention interface"
        )
    return found


def _explicit(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, is_causal: bool | None) -> Any:
    """The mask for "eager" of a module that was to be served by sdpa, which is causal by itself without one."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None or not causal or query.shape[2] == 1:
        return mask
    sizes = (len(query), query.shape[2], key.shape[2])
    return AttentionMask(*sizes, causal=True, q_offset=0, device=query.device).dense()
