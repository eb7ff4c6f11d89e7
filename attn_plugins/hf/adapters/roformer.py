"""RoFormer: as BERT, an encoder or a decoder, with rotary positions by sines, of values too where it is told so."""

from typing import Any

import torch
from transformers.models.roformer import modeling_roformer

from attn_plugins.hf.adapters import attend_as_bert, slotted

FAMILIES = ("roformer",)


class RoFormerSelfAttention(modeling_roformer.RoFormerSelfAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        sinusoidal_pos: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def rotate(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if sinusoidal_pos is None:
                return query, key, value
            if self.rotary_value:
                return self.apply_rotary_position_embeddings(sinusoidal_pos, query, key, value)
            return (*self.apply_rotary_position_embeddings(sinusoidal_pos, query, key), value)

        return attend_as_bert(
            self,
            hidden_states,
            attention_mask,
            source=encoder_hidden_states,
            cache=past_key_values,
            rotate=rotate,
            output_attentions=output_attentions,
        )
