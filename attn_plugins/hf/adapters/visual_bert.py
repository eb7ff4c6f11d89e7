"""VisualBERT: bidirectional, over words and regions of an image in one row."""

from typing import Any

import torch
from transformers.models.visual_bert import modeling_visual_bert

from attn_plugins.hf.adapters import attend_as_bert, slotted


class VisualBertSelfAttention(modeling_visual_bert.VisualBertSelfAttention):
    is_causal = False

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor | None, ...]:
        out, weights = attend_as_bert(self, hidden_states, attention_mask, output_attentions=output_attentions)
        return (out, weights) if output_attentions else (out,)
