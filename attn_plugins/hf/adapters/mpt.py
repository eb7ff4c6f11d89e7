"""MPT: causal, with a bias that grows with the key's position (ALiBi), one row for all queries."""

from typing import Any

import torch
from transformers.models.mpt import modeling_mpt

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("mpt",)


class MptAttention(modeling_mpt.MptAttention):
    is_causal = True
    adds_position_bias = True

    @staticmethod
    def mask_given(mask: torch.Tensor) -> torch.Tensor:
        """True where a key is hidden: the model makes that of the numbers that would be added to scores."""
        return mask.to(torch.bool)

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor | None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        fused = self.Wqkv(hidden_states)
        if self.clip_qkv:
            fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = fused.unflatten(-1, (3, self.n_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.softmax_scale,
            dropout=self.attn_dropout_p,
            position_bias=None if position_bias is None else position_bias[None, ..., -key.shape[2] :],
            output_attentions=output_attentions,
        )
        return self.out_proj(out.flatten(2)), weights
