"""Swin v2 and Swin2SR: bidirectional in windows of an image, by the angle of query and key and a bias of places."""

import math

import torch
from torch import nn
from transformers.models.swin2sr import modeling_swin2sr
from transformers.models.swinv2 import modeling_swinv2

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("swin2sr", "swinv2")


class Swinv2SelfAttention(modeling_swinv2.Swinv2SelfAttention):
    is_causal = False
    adds_position_bias = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor | None, ...]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)

        query, key = (nn.functional.normalize(heads(part(hidden_states)), dim=-1) for part in (self.query, self.key))
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        out, weights = attend(
            self,
            query * scale,
            key,
            heads(self.value(hidden_states)),
            None,
            scaling=1.0,
            dropout=self.dropout.p,
            position_bias=self._bias(len(query), attention_mask),
            output_attentions=output_attentions,
        )
        return (out.flatten(2), weights) if output_attentions else (out.flatten(2),)

    def _bias(self, windows: int, mask: torch.Tensor | None) -> torch.Tensor:
        table = self.continuous_position_bias_mlp(self.relative_coords_table).flatten(0, -2)
        bias = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid().unsqueeze(0)
        if mask is None:
            return bias
        # Of windows across an image's edge. It is no mask but a large number, which the model adds twice.
        return bias + 2 * mask.repeat(windows // len(mask), 1, 1).unsqueeze(1)


class Swin2SRSelfAttention(modeling_swin2sr.Swin2SRSelfAttention):
    is_causal = False
    adds_position_bias = True
    forward = Swinv2SelfAttention.forward
    _bias = Swinv2SelfAttention._bias
