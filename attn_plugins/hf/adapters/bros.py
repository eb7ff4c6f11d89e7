"""BROS: as BERT, with a score of each query for the place on the page of each key beside it: N x N numbers a head."""

from typing import Any

import torch
from transformers.models.bros import modeling_bros

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("bros",)


class BrosSelfAttention(modeling_bros.BrosSelfAttention):
    adds_position_bias = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        bbox_pos_emb: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)

        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, scale = heads(self.query(hidden_states)), self.attention_head_size**-0.5
        length = query.shape[2]
        places = bbox_pos_emb.view(length, length, len(query), self.attention_head_size)
        out, weights = attend(
            self,
            query,
            heads(self.key(source)),
            heads(self.value(source)),
            attention_mask if encoder_hidden_states is None else encoder_attention_mask,
            scaling=scale,
            dropout=self.dropout.p,
            position_bias=torch.einsum("bhid,ijbd->bhij", query * scale, places),
            output_attentions=output_attentions,
        )
        return out.flatten(2), weights
