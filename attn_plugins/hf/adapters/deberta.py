"""DeBERTa: bidirectional, with a bias that depends on content and relative position.

The bias is a tensor of N x N numbers a head, computed as the model does: that cost remains, whatever the attention.
"""

import torch
from transformers.models.deberta import modeling_deberta

from attn_plugins.hf.adapters import attend, padding_of, slotted

FAMILIES = ("deberta",)


class DisentangledSelfAttention(modeling_deberta.DisentangledSelfAttention):
    is_causal = False

    @property
    def adds_position_bias(self) -> bool:
        return bool(self.relative_attention)

    @property
    def cannot(self) -> str | None:
        return "it mixes the scores of its heads (talking_head=True)" if self.talking_head else None

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        output_attentions: bool = False,
        query_states: torch.Tensor | None = None,
        relative_pos: torch.Tensor | None = None,
        rel_embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if query_states is not None:
            raise ValueError("this adapter takes queries of the hidden states alone, got query_states as well")
        query, key, value = self.transpose_for_scores(self.in_proj(hidden_states)).chunk(3, dim=-1)
        parts = 1 + len(self.pos_att_type)  # of a score, each of variance D
        query = query + self.transpose_for_scores(self.q_bias[None, None])
        query = query * (self.attention_head_size * parts) ** -0.5
        value = value + self.transpose_for_scores(self.v_bias[None, None])
        bias = None
        if self.relative_attention and parts > 1 and rel_embeddings is not None and relative_pos is not None:
            rel_embeddings = self.pos_dropout(rel_embeddings)
            bias = self.disentangled_att_bias(query, key, relative_pos, rel_embeddings, parts)
        out, weights = attend(
            self,
            query,
            key,
            value,
            padding_of(attention_mask),
            scaling=1.0,
            dropout=self.dropout.p,
            position_bias=bias,
            output_attentions=output_attentions,
        )
        return out.flatten(2), weights if output_attentions else None
