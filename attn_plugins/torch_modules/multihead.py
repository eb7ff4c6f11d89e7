"""Attention over inputs and masks as ``torch.nn.MultiheadAttention`` takes them, and the adapter of that class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from attn_plugins.core.attention import HeadShape
from attn_plugins.hf.names import ROLE, SLOT, slot_of
from attn_plugins.torch_modules.masks import inverted, read

Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries (B, H, Q, D), keys and values (B, G, K, D)."""

SELF = "_attn_plugin_self"
"""Attribute of a module with a slot: whether the layer that holds it gives it one sequence, in three arguments."""


@dataclass(frozen=True, kw_only=True)
class TorchCall:
    """The arguments of a forward of nn.MultiheadAttention, by their names there, batch first."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_padding_mask: torch.Tensor | None
    need_weights: bool
    attn_mask: torch.Tensor | None
    average_attn_weights: bool
    is_causal: bool

    def serve(
        self, module: nn.Module, slot: Any, project: Callable[[], Projected], out: nn.Module, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output and the weights of a module whose attention is in its slot.

        Args:
            project: makes the heads of queries, keys and values.
            out: the layer behind attention.
            dropout: probability in training.

        Raises:
            ValueError: inputs or masks are of other sizes, or the attention cannot honour the call.
        """
        self._check(module)
        query_BHQD, key_BGKD, value_BGKD = project()
        batch, heads, queries, head_dim = query_BHQD.shape
        keys, mask = key_BGKD.shape[2], self.attn_mask
        if mask is not None:
            mask = inverted(mask)
            if mask.ndim == 3:
                if len(mask) != batch * heads:
                    raise ValueError(
                        f"attn_mask is of shape {tuple(mask.shape)}; allowed here: {(queries, keys)} or "
                        f"{(batch * heads, queries, keys)}, batch * heads first"
                    )
                mask = mask.view(batch, heads, *mask.shape[1:])
        cross = getattr(module, ROLE, None) == "cross" or queries != keys
        seen, bias = read(
            query_BHQD, key_BGKD, mask, hidden_BK=self.key_padding_mask, is_causal=self.is_causal, cross=cross
        )
        one_sequence = self.key is self.query or getattr(module, SELF, False) or seen.causal
        served = slot_of(module) or slot
        out_BQHV, weights_BHQK = slot(
            query_BHQD,
            key_BGKD,
            value_BGKD,
            mask=seen if one_sequence else seen.as_cross(),
            scale=head_dim**-0.5,
            dropout=dropout if module.training else 0.0,
            position_bias=bias,
            hidden=self.query if served.wants_hidden else None,
            need_weights=self.need_weights,
        )
        if weights_BHQK is not None and self.average_attn_weights:
            weights_BHQK = weights_BHQK.mean(dim=1)
        return out(out_BQHV.flatten(2)), weights_BHQK

    def _check(self, module: Any) -> None:
        sizes = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}
        for name, size in sizes.items():
            given = getattr(self, name)
            if given.ndim != 3 or given.shape[2] != size:
                raise ValueError(
                    f"{name} is of shape {tuple(given.shape)}; allowed: (batch, length, {size}), or without a batch "
                    f"(length, {size})"
                )
        if len(self.key) != len(self.query) or self.key.shape[:2] != self.value.shape[:2]:
            shapes = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in sizes)
            raise ValueError(f"{shapes}; allowed: one batch of all three, and as many keys as values")


def with_batch(
    call: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    batch_first: bool,
    key_padding_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call with the batch first, whether it is elsewhere or there is none, and give back what was asked for."""
    alone = query.ndim == 2
    given = (query, key, value)
    made: dict[int, torch.Tensor] = {}  # the same tensor stays the same: attention of a sequence to itself
    for x in given:
        if id(x) not in made:
            made[id(x)] = x.unsqueeze(0) if alone and x.ndim == 2 else x if batch_first else x.transpose(0, 1)
    if alone and key_padding_mask is not None and key_padding_mask.ndim == 1:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    out, weights = call(*(made[id(x)] for x in given), key_padding_mask=key_padding_mask, **options)
    if alone:
        return out.squeeze(0), weights if weights is None else weights.squeeze(0)
    return out if batch_first else out.transpose(0, 1), weights


class MultiheadAttention:
    """What a torch.nn.MultiheadAttention is while it has a slot.

    It takes what the class takes, and ``is_causal`` without a mask too, which needs no tensor of Q x K.
    """

    attn_plugin: nn.Module

    @property
    def cannot(self) -> str | None:
        """Why a module cannot be swapped, or None."""
        if self.bias_k is not None:  # type: ignore[attr-defined]
            return "add_bias_kv gives it a key that is no token, which attentions know nothing of"
        if self.add_zero_attn:  # type: ignore[attr-defined]
            return "add_zero_attn gives it a key that is no token, which attentions know nothing of"
        return None

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False: in eval mode torch's layers compute attention of this class themselves where it is True."""
        return False

    def _reset_parameters(self) -> None:
        held = vars(self)["_qkv_same_embed_dim"]
        for weight in _input_weights(self) if not held else [self.in_proj_weight]:  # type: ignore[attr-defined]
            nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:  # type: ignore[attr-defined]
            nn.init.zeros_(self.in_proj_bias)  # type: ignore[attr-defined]
            nn.init.zeros_(self.out_proj.bias)  # type: ignore[attr-defined]

    def head_shape(self) -> HeadShape:
        heads: Any = self
        size = heads.embed_dim // heads.num_heads
        return HeadShape(
            num_heads=heads.num_heads,
            num_key_value_heads=heads.num_heads,
            head_dim=size,
            value_dim=size,
            hidden_size=heads.embed_dim,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the class's own."""
        options: dict[str, Any] = {
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if query.is_nested or key.is_nested or value.is_nested:
            return self._of_nested(query, key, value, key_padding_mask, **options)
        module: Any = self
        return with_batch(
            self._attend,
            query,
            key,
            value,
            batch_first=module.batch_first,
            key_padding_mask=key_padding_mask,
            **options,
        )

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        module: Any = self

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)

        def project() -> Projected:
            if module.in_proj_weight is not None and key is query and value is query:
                q, k, v = linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
                return heads(q), heads(k), heads(v)
            biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
            made = zip((query, key, value), _input_weights(module), biases, strict=True)
            q, k, v = (linear(x, weight, bias) for x, weight, bias in made)
            return heads(q), heads(k), heads(v)

        call = TorchCall(query=query, key=key, value=value, **options)
        return call.serve(module, module._modules[SLOT], project, module.out_proj, module.dropout)

    def _of_nested(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within each row of a nested tensor, which nn.TransformerEncoder makes of padded ones."""
        if key is not query or value is not query or query.layout != torch.strided:
            raise ValueError(
                "got nested tensors for queries, keys and values that are not one and the same, or of a layout other "
                "than torch.strided; allowed: one nested tensor for all three, or padded tensors with key_padding_mask"
            )
        if key_padding_mask is not None or options["attn_mask"] is not None:
            raise ValueError("got a mask beside a nested tensor; allowed: is_causal, or padded tensors with masks")
        lengths = [len(row) for row in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        hidden = places >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
        out, weights = self._attend(padded, padded, padded, key_padding_mask=hidden, **options)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(out, lengths, strict=True)]), weights


def _input_weights(module: Any) -> tuple[torch.Tensor, ...]:
    """Weights of the layers of queries, keys and values."""
    if module.in_proj_weight is None:
        return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    return module.in_proj_weight.chunk(3)
