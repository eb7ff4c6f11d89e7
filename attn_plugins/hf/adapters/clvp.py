"""CLVP: encoders of text and of speech, with rotary positions of keys, queries and values, and a causal decoder."""

from typing import Any

import torch
from torch import nn
from transformers.models.clvp import modeling_clvp

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("clvp",)


class ClvpSelfAttention(modeling_clvp.ClvpSelfAttention):
    def is_causal_in(self, model: nn.Module, path: str) -> bool:
        """In the decoder, whose modules alone have a layer of a cache."""
        return self.layer_idx is not None

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_pos_emb: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            part(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if rotary_pos_emb is not None:
            width, table = rotary_pos_emb.shape[-1], rotary_pos_emb.squeeze(0)
            parts = [x[..., :width] for x in (query, key, value)]
            turn: Any = modeling_clvp.apply_rotary_pos_emb
            turned = turn(*parts, table.cos(), table.sin(), position_ids)
            query, key, value = (
                torch.cat([t, x[..., width:]], dim=-1) for t, x in zip(turned, (query, key, value), strict=True)
            )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scale,
            dropout=self.dropout,
            output_attentions=output_attentions,
        )
        return self.out_proj(out.flatten(2)), weights
