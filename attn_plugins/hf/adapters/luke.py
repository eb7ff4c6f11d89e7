"""LUKE: bidirectional over words and entities in one row, with other queries for words than for entities as keys.

Those queries stand beside each other, and keys in the half that is theirs, so that each score is one product of vectors
of twice the size.
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.models.luke import modeling_luke

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("luke",)


class LukeSelfAttention(modeling_luke.LukeSelfAttention):
    is_causal = False

    @property
    def head_dim(self) -> int:
        return self.attention_head_size * (1 + self.use_entity_aware_attention)

    @property
    def v_head_dim(self) -> int:
        return self.attention_head_size

    @slotted
    def forward(
        self,
        word_hidden_states: torch.Tensor,
        entity_hidden_states: torch.Tensor | None,
        attention_mask: Any = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        heads, words, size = self.transpose_for_scores, word_hidden_states.shape[1], self.attention_head_size
        both = word_hidden_states
        if entity_hidden_states is not None:
            both = torch.cat([word_hidden_states, entity_hidden_states], dim=1)
        query, key, value = (heads(part(both)) for part in (self.query, self.key, self.value))
        if self.use_entity_aware_attention:
            to_entities = query.new_zeros(query.shape)
            if entity_hidden_states is not None:
                query = heads(torch.cat([self.query(word_hidden_states), self.e2w_query(entity_hidden_states)], dim=1))
                to_entities = heads(
                    torch.cat([self.w2e_query(word_hidden_states), self.e2e_query(entity_hidden_states)], dim=1)
                )
            query = torch.cat([query, to_entities], dim=-1)
            key = torch.cat([pad(key[:, :, :words], (0, size)), pad(key[:, :, words:], (size, 0))], dim=2)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=size**-0.5,
            dropout=self.dropout.p,
            output_attentions=output_attentions,
        )
        out = out.flatten(2)
        made = (out[:, :words], None if entity_hidden_states is None else out[:, words:])
        return (*made, weights) if output_attentions else made
