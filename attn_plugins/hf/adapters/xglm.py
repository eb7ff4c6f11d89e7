"""XGLM: causal, and from a decoder to an encoder's states where it is given them."""

from typing import Any

import torch
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.xglm import modeling_xglm

from attn_plugins.hf.adapters import slotted
from attn_plugins.hf.dispatch import IMPLEMENTATION


class XGLMAttention(modeling_xglm.XGLMAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        cross, cache = key_value_states is not None, past_key_values
        updated: dict[Any, bool] = {}
        if isinstance(cache, EncoderDecoderCache):
            updated = cache.is_updated
            cache = cache.cross_attention_cache if cross else cache.self_attention_cache
        if cross and updated.get(self.layer_idx):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            source = key_value_states if cross else hidden_states
            key, value = heads(self.k_proj(source)), heads(self.v_proj(source))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            if cross:
                updated[self.layer_idx] = True
        out, weights = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION](
            self,
            heads(self.q_proj(hidden_states)),
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(out.flatten(2)), weights
