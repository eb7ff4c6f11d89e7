"""The attention of a swapped model's modules, or of heads, that no rule matches: what served them before."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.adapters import adapter_of
from attn_plugins.hf.discovery.by_code import dispatch_of
from attn_plugins.hf.discovery.declared import EAGER_NAME
from attn_plugins.hf.masks.dense_masks import additive
from attn_plugins.hf.masks.mask_function import LazyMask

Taking: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor]
"""Takes the part of some heads from a tensor that has all of them along an axis."""


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


class OwnCall:
    """A module's call of its attention, as the module made it, for its own attention on some of its heads.

    Args:
        implementation: what served the module before.
        query, key, value: (B, H, Q, D), (B, G, K, D) and (B, G, K, V).
        mask: as the module gave it.
        given: more arguments of an attention function; None stands for what is not given.
    """

    def __init__(
        self,
        module: nn.Module,
        implementation: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        given: dict[str, Any],
    ):
        self.module, self.implementation, self.mask, self.given = module, implementation, mask, given
        self.query, self.key, self.value = query, key, value

    def divides(self, need_weights: bool) -> bool:
        """Whether some of the heads can be attended with alone, and with the same result.

        An adapter's module has its attention within its forward. Functions for "eager" may read weights that the module
        has for all of its heads, such as learned sinks (gpt-oss); other implementations are given these.
        """
        if adapter_of(type(self.module)) is not None:
            return False
        function = _found(self.module, "eager" if need_weights else self.implementation)
        return function is not None and not reads_weights(function, self.module)

    def attend(
        self, of_queries: Taking, key: torch.Tensor, value: torch.Tensor, mask: Any, *, need_weights: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out (B, Q, h, V), weights (B, h, Q, K) or None) of some of the heads.

        Args:
            of_queries: takes the part of these heads from a tensor that has all query heads along an axis.
            key, value: of these heads.
            mask: of the queries and these keys.
        """
        heads, given = self.query.shape[1], dict(self.given)
        for name in ("position_bias", "sinks", "s_aux"):
            axis = 0 if name == "s_aux" else 1
            if per_head(given.get(name), heads, axis):
                given[name] = of_queries(given[name], axis)
        out, weights = attend_natively(
            self.module,
            self.implementation,
            of_queries(self.query, 1),
            key,
            value,
            of_queries(mask, 1) if per_head(mask, heads) else mask,
            need_weights=need_weights,
            **given,
        )
        return out, weights if need_weights else None


def per_head(x: Any, heads: int, axis: int = 1) -> bool:
    """Whether it is a tensor of a bias or mask (B, H, Q, K), or of one number a head, with something for each head."""
    return isinstance(x, torch.Tensor) and x.ndim == (4 if axis == 1 else 1) and x.shape[axis] == heads > 1


def reads_weights(function: Callable, module: nn.Module) -> bool:
    """Whether an attention function names a weight that a module has itself."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and any(name in module._parameters for name in code.co_names)


def native_attention(module: nn.Module, implementation: str) -> Callable:
    """The function that the module itself would have called under ``implementation``.

    Raises:
        ValueError: the module does not show the function that it calls.
    """
    found = _found(module, implementation)
    if found is None:
        raise ValueError(
            f"cannot find the {implementation!r} attention of {type(module).__name__}; name it {EAGER_NAME}, in the "
            "file that calls the attention interface"
        )
    return found


def _found(module: nn.Module, implementation: str) -> Callable | None:
    dispatch = dispatch_of(type(module))
    default: Any = None if dispatch is None else dispatch.eager
    return None if dispatch is None else dispatch.interface.get_interface(implementation, default)


def _explicit(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, is_causal: bool | None) -> Any:
    """The mask for "eager" of a module that was to be served by sdpa, which is causal by itself without one."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None or not causal or query.shape[2] == 1:
        return mask
    sizes = (len(query), query.shape[2], key.shape[2])
    return AttentionMask(*sizes, causal=True, q_offset=0, device=query.device).dense()
