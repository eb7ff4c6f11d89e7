"""LayoutLMv3: bidirectional, over words and patches in one row, with a bias by their order and their place on the page.

Its scores are shifted before they are exponentiated, which changes nothing but roundings.
"""

from typing import Any

import torch
from transformers.models.layoutlmv3 import modeling_layoutlmv3

from attn_plugins.hf.adapters import attend_as_bert, slotted

FAMILIES = ("layoutlmv3",)


class LayoutLMv3SelfAttention(modeling_layoutlmv3.LayoutLMv3SelfAttention):
    is_causal = False

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        rel_pos: Any = None,
        rel_2d_pos: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = None
        if self.has_relative_attention_bias:
            bias = rel_pos + rel_2d_pos if self.has_spatial_attention_bias else rel_pos
            bias = bias * self.attention_head_size**-0.5
        return attend_as_bert(
            self, hidden_states, attention_mask, position_bias=bias, output_attentions=output_attentions
        )
