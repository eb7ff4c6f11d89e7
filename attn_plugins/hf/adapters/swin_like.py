"""Swin in other models' own copies: bidirectional within windows of an image, with a bias of their places."""

import torch
from transformers.models.donut import modeling_donut_swin
from transformers.models.maskformer import modeling_maskformer_swin

from attn_plugins.hf.adapters import attend_as_bert, slotted

FAMILIES = ("donut", "maskformer")


class DonutSwinSelfAttention(modeling_donut_swin.DonutSwinSelfAttention):
    is_causal = False
    adds_position_bias = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor | None, ...]:
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)
        if attention_mask is not None:  # of windows across an image's edge: no mask but a large number
            bias = bias + attention_mask.repeat(len(hidden_states) // len(attention_mask), 1, 1).unsqueeze(1)
        out, weights = attend_as_bert(
            self, hidden_states, None, position_bias=bias, output_attentions=bool(output_attentions)
        )
        return (out, weights) if output_attentions else (out,)


class MaskFormerSwinSelfAttention(modeling_maskformer_swin.MaskFormerSwinSelfAttention):
    is_causal = False
    adds_position_bias = True
    forward = DonutSwinSelfAttention.forward
