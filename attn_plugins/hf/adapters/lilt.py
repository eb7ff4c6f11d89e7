"""LiLT: bidirectional over a text and its layout, whose scores are added up and weigh the values of both.

So queries, keys and values of the two stand beside each other, in one call. In training the model drops weights of text
and of layout apart, this adapter drops them together.
"""

from typing import Any

import torch
from transformers.models.lilt import modeling_lilt

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("lilt",)


class LiltSelfAttention(modeling_lilt.LiltSelfAttention):
    is_causal = False

    @property
    def head_dim(self) -> int:
        return self.attention_head_size + self.attention_head_size // self.channel_shrink_ratio

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        layout_inputs: torch.Tensor,
        attention_mask: Any = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        size, small = self.attention_head_size, self.attention_head_size // self.channel_shrink_ratio

        def heads(text: torch.nn.Module, layout: torch.nn.Module, scale: float = 1.0) -> torch.Tensor:
            of_text = text(hidden_states).unflatten(-1, (self.num_attention_heads, size))
            of_layout = layout(layout_inputs).unflatten(-1, (self.num_attention_heads, small))
            return torch.cat([of_text, of_layout * scale], dim=-1).transpose(1, 2)

        out, weights = attend(
            self,
            heads(self.query, self.layout_query, (size / small) ** 0.5),
            heads(self.key, self.layout_key),
            heads(self.value, self.layout_value),
            attention_mask,
            scaling=size**-0.5,
            dropout=self.dropout.p,
            output_attentions=output_attentions,
        )
        text, layout = out.split([size, small], dim=-1)
        made = (text.flatten(2), layout.flatten(2))
        return (*made, weights) if output_attentions else made
