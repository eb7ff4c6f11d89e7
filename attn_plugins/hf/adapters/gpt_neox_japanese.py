"""GPT-NeoX Japanese: causal, with rotary positions in a part of each head, and a bias in its last layer."""

from typing import Any

import torch
from transformers import Cache
from transformers.models.gpt_neox_japanese import modeling_gpt_neox_japanese

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("gpt_neox_japanese",)


class GPTNeoXJapaneseAttention(modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention):
    is_causal = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor,
        layer_past: Cache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_size))
        query, key, value = fused.transpose(1, 2).unbind(3)
        width = self.rotary_ndims
        rotated = modeling_gpt_neox_japanese.apply_rotary_pos_emb(
            query[..., :width], key[..., :width], *position_embeddings
        )
        query, key = (torch.cat([t, x[..., width:]], dim=-1) for t, x in zip(rotated, (query, key), strict=True))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p,
            output_attentions=output_attentions,
        )
        return self.dense(out.flatten(2)), weights, self.dense_bias
