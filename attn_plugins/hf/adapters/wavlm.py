"""WavLM: bidirectional, with a relative position bias that the first layer makes and each gates by its own input.

It is a tensor of N x N numbers a head: that cost remains, whatever the attention. Of its weights the model itself gives
the mean over heads.
"""

from typing import Any

import torch
from transformers.models.wavlm import modeling_wavlm

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("wavlm",)


class WavLMAttention(modeling_wavlm.WavLMAttention):
    is_causal = False
    adds_position_bias = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        batch, length, _ = hidden_states.shape
        if position_bias is None:  # (B * H, N, N) for the layers that follow
            position_bias = self.compute_bias(length, length).repeat(batch, 1, 1)
        gates = self.gru_rel_pos_linear(heads(hidden_states)).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        update, reset = gates.chunk(2, dim=-1)
        gate = update * (reset * self.gru_rel_pos_const - 1.0) + 2.0
        query, key, value = (heads(part(hidden_states)) for part in (self.q_proj, self.k_proj, self.v_proj))
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout,
            position_bias=gate * position_bias.unflatten(0, (batch, self.num_heads)),
            output_attentions=output_attentions,
        )
        if weights is not None:
            weights = weights.mean(dim=1, keepdim=True).expand_as(weights)
        return self.out_proj(out.flatten(2)), weights, position_bias
