"""A layer of attention for models that people write: projections, and a slot."""

from typing import Any

import torch
from torch import nn

from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.registry import get_attention
from attn_plugins.core.rules import Flag
from attn_plugins.hf.names import SLOT
from attn_plugins.torch_modules.multihead import Projected, TorchCall, with_batch


class AttentionLayer(nn.Module):
    """Attention with several heads, by any attention of the registry, batch first.

    Arguments and masks are those of ``torch.nn.MultiheadAttention``, whose state dict it loads, and which it equals
    with softmax attention. What differs: ``batch_first`` is always true, ``need_weights`` is False by default, since
    weights cost N x N, keys and values may have fewer heads, and ``is_causal`` needs no mask beside it.

    Args:
        embed_dim: size of queries and of the output.
        num_heads: query heads, which divide ``embed_dim``.
        num_key_value_heads: heads of keys and values, each shared by as many query heads; None is ``num_heads``.
        kdim, vdim: sizes of keys and values; None is ``embed_dim``.
        dropout: probability with which a weight is dropped in training.
        bias: whether its four linear layers have biases.
        attn_plugin: the flag: a name, a rule or a list of rules; None is softmax attention without a slot.

    Raises:
        ValueError: sizes that do not fit, or rules that do not.
    """

    cannot: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        attn_plugin: "Flag | None" = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        groups = num_heads if num_key_value_heads is None else num_key_value_heads
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim}, num_heads={num_heads}; allowed: heads that divide embed_dim")
        if groups < 1 or num_heads % groups:
            raise ValueError(
                f"num_key_value_heads={groups}, num_heads={num_heads}; allowed: a number that divides num_heads"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r}; allowed: a probability from 0 to below 1")
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim or embed_dim, vdim or embed_dim
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, groups, embed_dim // num_heads
        self.dropout = dropout
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, **made)
        self.k_proj = nn.Linear(self.kdim, groups * self.head_dim, **made)
        self.v_proj = nn.Linear(self.vdim, groups * self.head_dim, **made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **made)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_unpacked)
        if attn_plugin is not None:
            from attn_plugins.torch_modules.swap import swap_modules

            swap_modules(self, attn_plugin)

    def reset_parameters(self) -> None:
        """Draw the weights as torch.nn.MultiheadAttention does, and those of the slot as its attention does."""
        inputs = (self.q_proj, self.k_proj, self.v_proj)
        packed = self.kdim == self.vdim == self.embed_dim and self.num_key_value_heads == self.num_heads
        for layer in inputs:  # torch draws the three as one matrix where it can, whose bound is smaller
            rows = self.embed_dim * 3 if packed else layer.out_features
            bound = (6 / (layer.in_features + rows)) ** 0.5
            nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=5**0.5)
        for layer in (*inputs, self.out_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        slot: Any = self._modules.get(SLOT)
        if slot is not None:
            slot.reset_parameters()

    def head_shape(self) -> HeadShape:
        """Sizes of its heads."""
        return HeadShape(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            hidden_size=self.embed_dim,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            query: (B, Q, embed_dim), or without a batch (Q, embed_dim).
            key: (B, K, kdim); None is ``query``.
            value: (B, K, vdim); None is ``key``.
            key_padding_mask: (B, K), bool, True where a key is padding and hidden, or floating, added to scores.
            need_weights: also return the effective weights, by the dense form.
            attn_mask: (Q, K) or (B * num_heads, Q, K), bool, True where a key is hidden, or floating, added to scores.
            average_attn_weights: return the mean of the heads' weights.
            is_causal: query i sees keys 0 to i. A mask given beside it is taken for that and not read.

        Returns:
            (output (B, Q, embed_dim), weights (B, Q, K) or of each head (B, num_heads, Q, K), or None).

        Raises:
            ValueError: inputs or masks of other sizes, or the attention cannot honour the call.
        """
        key = query if key is None else key
        value = key if value is None else value
        return with_batch(
            self._attend,
            query,
            key,
            value,
            batch_first=True,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def project() -> Projected:
            return heads(self.q_proj(query)), heads(self.k_proj(key)), heads(self.v_proj(value))

        call = TorchCall(query=query, key=key, value=value, **options)
        slot = self._modules.get(SLOT)
        return call.serve(self, _softmax() if slot is None else slot, project, self.out_proj, self.dropout)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, num_key_value_heads={self.num_key_value_heads}"


def _softmax() -> Attention:
    softmax = get_attention("softmax")
    return softmax(softmax.Config())


def _unpacked(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Take what torch.nn.MultiheadAttention has saved."""
    parts = ("q_proj", "k_proj", "v_proj")
    for kind in ("weight", "bias"):
        packed = state_dict.pop(f"{prefix}in_proj_{kind}", None)
        if packed is not None:
            state_dict.update(zip((f"{prefix}{part}.{kind}" for part in parts), packed.chunk(3), strict=True))
    for part in parts:
        if (weight := state_dict.pop(f"{prefix}{part}_weight", None)) is not None:
            state_dict[f"{prefix}{part}.weight"] = weight
