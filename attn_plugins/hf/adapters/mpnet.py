"""MPNet: bidirectional, with a relative position bias that the encoder computes once for all layers."""

from typing import Any

import torch
from transformers.models.mpnet import modeling_mpnet

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("mpnet",)


class MPNetSelfAttention(modeling_mpnet.MPNetSelfAttention):
    is_causal = False
    adds_position_bias = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (project(hidden_states).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p,
            position_bias=position_bias,
            output_attentions=output_attentions,
        )
        out = self.o(out.flatten(2))
        return (out, weights) if output_attentions else (out,)
