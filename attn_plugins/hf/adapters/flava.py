"""FLAVA: bidirectional, over patches, over text, and over both."""

from typing import Any

import torch
from transformers.models.flava import modeling_flava

from attn_plugins.hf.adapters import attend_as_bert, slotted


class FlavaSelfAttention(modeling_flava.FlavaSelfAttention):
    is_causal = False

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor | None, ...]:
        out, weights = attend_as_bert(self, hidden_states, attention_mask, output_attentions=output_attentions)
        return (out, weights) if output_attentions else (out,)
