"""The adapter of modules that call torch's ``scaled_dot_product_attention``: timm's, and those that people write.

Their own forward runs, and that one function is answered by the slot.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from attn_plugins.core.attention import HeadShape
from attn_plugins.hf.discovery import heads as head_sizes
from attn_plugins.hf.names import ROLE, SLOT, slot_of
from attn_plugins.torch_modules.masks import read


class FusedAttention:
    """What such a module is while it has a slot."""

    attn_plugin: nn.Module
    cannot: str | None = None

    def head_shape(self) -> HeadShape:
        """Sizes of its heads.

        Raises:
            ValueError: its attributes and layers do not tell.
        """
        module: Any = self
        return head_sizes.head_shape(module, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with another attention.

        Raises:
            ValueError: it has not called scaled_dot_product_attention, or the attention cannot honour the call.
        """
        module: Any = self
        answers = _Answers(module, _first(type(self), args, kwargs))
        with answers:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not answers.number:
            raise ValueError(
                f"the forward of {type(self).__name__} has not called scaled_dot_product_attention, so that the "
                f"attention in its slot ({slot_of(module)!r}) did not serve; set what makes it call that function "
                "(such as fused_attn of timm), or leave the module out with layers, roles or modules"
            )
        return out


class _Answers(TorchFunctionMode):
    """While it lasts, the slot of a module answers calls of scaled_dot_product_attention."""

    def __init__(self, module: nn.Module, hidden: Any):
        super().__init__()
        self.module, self.hidden = module, hidden
        self.number = 0
        """Calls so far."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.number += 1
            return self._attend(*args, **(kwargs or {}))
        if func is torch.Tensor.unflatten and len(args) == 3:
            func = torch.unflatten  # the method is Python that Dynamo cannot trace within a mode
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As scaled_dot_product_attention, of three or four dimensions; three are one head."""
        if query.ndim not in (3, 4) or key.ndim != query.ndim or value.ndim != query.ndim:
            shapes = [tuple(x.shape) for x in (query, key, value)]
            raise ValueError(
                f"{type(self.module).__name__} attends with queries, keys and values of shapes {shapes}; allowed: "
                "(batch, heads, length, size), or (batch, length, size) of one head"
            )
        if is_causal and attn_mask is not None:
            raise ValueError(f"{type(self.module).__name__} attends with is_causal=True and attn_mask; allowed: one")
        if query.ndim == 3:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            attn_mask = attn_mask if attn_mask is None or attn_mask.ndim < 3 else attn_mask.unsqueeze(1)
            return self._attend(query, key, value, attn_mask, dropout_p, is_causal, scale).squeeze(1)
        cross = getattr(self.module, ROLE) == "cross" or query.shape[2] != key.shape[2]
        mask, bias = read(query, key, attn_mask, is_causal=is_causal, cross=cross)
        attention: Any = slot_of(self.module)
        slot: Any = self.module._modules[SLOT]
        out_BQHV, _ = slot(
            query,
            key,
            value,
            mask=mask,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            dropout=dropout_p,
            position_bias=bias,
            hidden=self.hidden if attention.wants_hidden else None,
        )
        return out_BQHV.transpose(1, 2)


def _first(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a module's own forward: what its queries are made of."""
    if args:
        return args[0]
    forward = super(FusedAttention, cls).forward
    _, first, *_ = (*inspect.signature(forward).parameters, None, None)
    return kwargs.get(first) if first is not None else None
