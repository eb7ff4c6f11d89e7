"""Perceiver: from latents or queries to what is read, and among latents; heads of keys and of values may differ."""

from typing import Any

import torch
from torch import nn
from transformers.models.perceiver import modeling_perceiver

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("perceiver",)


class PerceiverSelfAttention(modeling_perceiver.PerceiverSelfAttention):
    is_causal = False

    @property
    def is_cross_attention(self) -> bool:
        return not isinstance(self.layernorm2, nn.Identity)

    @property
    def head_dim(self) -> int:
        return self.qk_channels_per_head

    @property
    def v_head_dim(self) -> int:
        return self.v_channels_per_head

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        inputs: torch.Tensor | None = None,
        inputs_mask: Any = None,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor | None, ...]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        states = self.layernorm1(hidden_states)
        source = states if inputs is None else self.layernorm2(inputs)
        out, weights = attend(
            self,
            heads(self.query(states)),
            heads(self.key(source)),
            heads(self.value(source)),
            attention_mask if inputs is None else inputs_mask,
            dropout=self.dropout.p,
            output_attentions=bool(output_attentions),
        )
        return (out.flatten(2), weights)[: 1 + bool(output_attentions)]
