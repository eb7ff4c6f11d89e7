"""DeBERTa-v2 and v3: bidirectional, with a bias that depends on content and relative position.

The bias is computed as the model does, from queries with positions' keys and from keys with positions' queries. It is a
tensor of N x N numbers a head: that cost remains, whatever the attention.
"""

import torch
from transformers.models.deberta_v2 import modeling_deberta_v2

from attn_plugins.hf.adapters import attend, padding_of, slotted

FAMILIES = ("deberta_v2",)


class DisentangledSelfAttention(modeling_deberta_v2.DisentangledSelfAttention):
    is_causal = False

    @property
    def adds_position_bias(self) -> bool:
        return bool(self.relative_attention)

    @property
    def dropped(self) -> float:
        return self.dropout.p

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
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        query = heads(self.query_proj(hidden_states if query_states is None else query_states))
        key, value = heads(self.key_proj(hidden_states)), heads(self.value_proj(hidden_states))
        parts = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)  # of a score, each of variance D
        bias = None
        if self.relative_attention and parts > 1:
            bias = self.disentangled_attention_bias(
                query.flatten(0, 1), key.flatten(0, 1), relative_pos, self.pos_dropout(rel_embeddings), parts
            ).unflatten(0, (-1, self.num_attention_heads))
        out, weights = attend(
            self,
            query,
            key,
            value,
            padding_of(attention_mask),
            scaling=(self.attention_head_size * parts) ** -0.5,
            dropout=self.dropped,
            position_bias=bias,
            output_attentions=output_attentions,
        )
        return out.flatten(2), weights if output_attentions else None
