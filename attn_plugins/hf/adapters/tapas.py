"""TAPAS: bidirectional, as BERT, over the cells of a table."""

from typing import Any

import torch
from transformers.models.tapas import modeling_tapas

from attn_plugins.hf.adapters import attend_as_bert, slotted


class TapasSelfAttention(modeling_tapas.TapasSelfAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        out, weights = attend_as_bert(
            self,
            hidden_states,
            attention_mask,
            source=encoder_hidden_states,
            cache=past_key_values,
            output_attentions=output_attentions,
        )
        return (out, weights)[: 1 + output_attentions] + (past_key_values,) * self.is_decoder
