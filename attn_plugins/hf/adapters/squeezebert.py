"""SqueezeBERT: as BERT, with the features before the tokens, (B, E, N). The model itself gives scores for weights."""

from typing import Any

import torch
from transformers.models.squeezebert import modeling_squeezebert

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("squeezebert",)


class SqueezeBertSelfAttention(modeling_squeezebert.SqueezeBertSelfAttention):
    is_causal = False

    @staticmethod
    def hidden_given(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.transpose(1, 2)

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any, output_attentions: bool
    ) -> dict[str, torch.Tensor | None]:
        query, key, value = (
            part(hidden_states).unflatten(1, (self.num_attention_heads, -1)).transpose(2, 3)
            for part in (self.query, self.key, self.value)
        )
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=self.dropout.p, output_attentions=output_attentions
        )
        made: dict[str, torch.Tensor | None] = {"context_layer": out.flatten(2).transpose(1, 2)}
        return {**made, "attention_score": weights} if output_attentions else made
