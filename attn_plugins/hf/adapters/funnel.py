"""Funnel: bidirectional, with a bias by content, relative position and segment.

Where the sequence is pooled, its shorter form attends to the longer one, which counts as cross-attention. The bias is a
tensor of Q x K numbers a head, computed as the model does: that cost remains, whatever the attention.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.funnel import modeling_funnel

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("funnel",)


class FunnelRelMultiheadAttention(modeling_funnel.FunnelRelMultiheadAttention):
    is_causal = False
    adds_position_bias = True

    @property
    def head_dim(self) -> int:
        return self.config.d_head

    def is_cross_in(self, model: nn.Module, path: str) -> bool:
        """Whether it is the first layer of a block that pools its queries alone."""
        *_, block, layer, _ = f"..{path}".split(".")
        return ".blocks." in f".{path}" and self.config.pool_q_only and block != "0" and layer == "0"

    @slotted
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_inputs: tuple[Any, ...],
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.config.n_head, self.config.d_head))

        positions, segments, mask, of_first = attention_inputs
        queries, keys, values = heads(self.q_head(query)), heads(self.k_head(key)), heads(self.v_head(value))
        bias = self.relative_positional_attention(positions, queries * self.scale, key.shape[1], of_first)
        bias = bias + self.relative_token_type_attention(segments, queries * self.scale, of_first)
        out, weights = attend(
            self,
            (queries + self.r_w_bias).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            mask,
            scaling=self.scale,
            dropout=self.attention_dropout.p,
            position_bias=bias,
            output_attentions=output_attentions,
        )
        made = self.layer_norm(query + self.hidden_dropout(self.post_proj(out.flatten(2))))
        return (made, weights) if output_attentions else (made,)
