"""FastSpeech2Conformer: bidirectional, with a bias by content and relative position: N x N numbers a head."""

from typing import Any

import torch
from transformers.models.fastspeech2_conformer import modeling_fastspeech2_conformer

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("fastspeech2_conformer",)


class FastSpeech2ConformerAttention(modeling_fastspeech2_conformer.FastSpeech2ConformerAttention):
    is_causal = False
    adds_position_bias = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pos_emb: torch.Tensor | None = None,
        output_attentions: Any = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        assert pos_emb is not None
        query, scale = heads(self.linear_q(hidden_states)), self.head_dim**-0.5
        positions = heads(self.linear_pos(pos_emb))
        bias = (query + self.pos_bias_v.unsqueeze(1)) @ positions.transpose(2, 3)
        out, weights = attend(
            self,
            query + self.pos_bias_u.unsqueeze(1),
            heads(self.linear_k(hidden_states)),
            heads(self.linear_v(hidden_states)),
            None if attention_mask is None else attention_mask[:, 0].bool(),
            scaling=scale,
            dropout=self.dropout.p,
            position_bias=self.shift_relative_position_tensor(bias) * scale,
            output_attentions=bool(output_attentions),
        )
        return self.linear_out(out.flatten(2)), weights if output_attentions else None
