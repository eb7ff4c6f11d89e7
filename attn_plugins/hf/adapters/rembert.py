"""RemBERT: as BERT, an encoder, a decoder, or from a decoder to the states of an encoder."""

from typing import Any

import torch
from transformers.models.rembert import modeling_rembert

from attn_plugins.hf.adapters import attend_as_bert, slotted


class RemBertSelfAttention(modeling_rembert.RemBertSelfAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return attend_as_bert(
            self,
            hidden_states,
            attention_mask,
            source=encoder_hidden_states,
            cache=past_key_values,
            output_attentions=output_attentions,
        )
