"""Falcon: causal, with rotary positions or a bias that grows with the key's position (ALiBi).

Keys and values keep their own number of heads: one (Falcon 7B), a few (Falcon 40B and 180B), or as many as queries. Of
a model with ALiBi (Falcon RW) the mask arrives as a tensor, Q x K for each head: the model adds the bias to it.
"""

from typing import Any

import torch
from transformers import Cache
from transformers.models.falcon import modeling_falcon

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("falcon",)


class FalconAttention(modeling_falcon.FalconAttention):
    @property
    def adds_position_bias(self) -> bool:
        return bool(self.config.alibi)

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        fused, groups = self.query_key_value(hidden_states), self.num_kv_heads
        if self.new_decoder_architecture or self.multi_query:  # the queries of a group, its key, its value
            fused = fused.view(*fused.shape[:2], groups, -1, self.head_dim)
            query, key, value = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
        else:
            query, key, value = fused.view(*fused.shape[:2], groups, 3, self.head_dim).unbind(3)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if alibi is None:
            assert position_embeddings is not None
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            # The model drops weights with ALiBi alone.
            dropout=self.attention_dropout.p if alibi is not None else 0.0,
            output_attentions=output_attentions,
        )
        return self.dense(out.flatten(2)), weights


class FalconFlashAttention2(modeling_falcon.FalconFlashAttention2):
    adds_position_bias = FalconAttention.adds_position_bias
    forward = FalconAttention.forward
