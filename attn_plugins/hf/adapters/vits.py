"""VITS: bidirectional, over text, with keys and values of relative positions within a window.

To weigh those values takes the weights, N x N numbers a head, as the bias of those keys is: that cost remains, whatever
the attention.
"""

from typing import Any

import torch
from transformers.models.vits import modeling_vits

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("vits",)


class VitsAttention(modeling_vits.VitsAttention):
    is_causal = False

    @property
    def adds_position_bias(self) -> bool:
        return bool(self.window_size)

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: Any = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            part(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        length, bias, relative = query.shape[2], None, bool(self.window_size)
        if relative:
            of_keys = self._get_relative_embeddings(self.emb_rel_k, length)
            scores = (query.flatten(0, 1) * self.scaling) @ of_keys.transpose(1, 2)
            bias = self._relative_position_to_absolute_position(scores).unflatten(0, (-1, self.num_heads))
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout,
            position_bias=bias,
            output_attentions=output_attentions or relative,
        )
        if relative:
            assert weights is not None
            near = self._absolute_position_to_relative_position(weights.flatten(0, 1))
            of_values = near @ self._get_relative_embeddings(self.emb_rel_v, length)
            out = out + of_values.unflatten(0, (-1, self.num_heads)).transpose(1, 2)
        return self.out_proj(out.flatten(2)), weights if output_attentions else None
