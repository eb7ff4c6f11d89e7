"""LeViT: bidirectional over an image, values wider than keys, a bias of how far patches are apart."""

import torch
from transformers.models.levit import modeling_levit

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("levit",)


class LevitAttention(modeling_levit.LevitAttention):
    is_causal = False
    adds_position_bias = True

    @property
    def hidden_size(self) -> int:
        return self.queries_keys_values.linear.in_features

    @property
    def qk_head_dim(self) -> int:
        return self.key_dim

    @property
    def v_head_dim(self) -> int:
        return self.attention_ratio * self.key_dim

    @slotted
    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        made = self.queries_keys_values(hidden_state).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        query, key, value = made.split([self.key_dim, self.key_dim, self.v_head_dim], dim=3)
        return attended(self, query, key, value)


class LevitAttentionSubsample(modeling_levit.LevitAttentionSubsample):
    is_causal = False
    adds_position_bias = True

    @property
    def qk_head_dim(self) -> int:
        return self.key_dim

    @property
    def v_head_dim(self) -> int:
        return self.attention_ratio * self.key_dim

    @slotted
    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        """Queries are of every second row and column, between two stages."""
        made = self.keys_values(hidden_state).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        key, value = made.split([self.key_dim, self.v_head_dim], dim=3)
        query = self.queries(self.queries_subsample(hidden_state))
        return attended(self, query.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2), key, value)


def attended(
    module: LevitAttention | LevitAttentionSubsample, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    bias = module.attention_biases[:, module.attention_bias_idxs].unsqueeze(0)
    out, _ = attend(module, query, key, value, None, scaling=module.scale, dropout=0.0, position_bias=bias)
    return module.projection(module.activation(out.flatten(2)))
