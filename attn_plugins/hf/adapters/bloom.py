"""BLOOM: causal, with a bias that grows with the key's position (ALiBi), one row for all queries."""

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.models.bloom import modeling_bloom

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("bloom",)


class BloomAttention(modeling_bloom.BloomAttention):
    is_causal = True
    adds_position_bias = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: Any,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            assert self.layer_idx is not None
            key, value = layer_past.update(key, value, self.layer_idx)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout.p,
            position_bias=self.beta * alibi.view(len(query), self.num_heads, 1, -1),
            output_attentions=output_attentions,
        )
        out = out.flatten(2)
        if self.pretraining_tp > 1 and self.slow_but_exact:
            out = nn.functional.linear(out, self.dense.weight)  # the model adds up slices of this, and no bias
        else:
            out = self.dense(out)
        return modeling_bloom.dropout_add(out, residual, self.hidden_dropout, self.training), weights
