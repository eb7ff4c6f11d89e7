"""BLIP: attention over patches, over text, and from text to patches.

The text model is causal where a language model holds it. It gives its cross-attention no mask, whatever it was given.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.blip import modeling_blip, modeling_blip_text

from attn_plugins.hf.adapters import attend, cached, slotted

FAMILIES = ("blip",)


class BlipAttention(modeling_blip.BlipAttention):
    is_causal = False

    @slotted
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        fused = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        out, weights = attend(self, query, key, value, None, scaling=self.scale, dropout=self.dropout.p, **kwargs)
        return self.projection(out.flatten(2)), weights


class BlipTextSelfAttention(modeling_blip_text.BlipTextSelfAttention):
    def is_causal_in(self, model: nn.Module, path: str) -> bool:
        names = path.split(".")
        holders = (model.get_submodule(".".join(names[:depth])) for depth in range(len(names)))
        return any(isinstance(holder, modeling_blip_text.BlipTextLMHeadModel) for holder in holders)

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)

        cross = encoder_hidden_states is not None
        source = encoder_hidden_states if cross else hidden_states
        key, value = cached(
            past_key_values, self.layer_idx, cross, lambda: (heads(self.key(source)), heads(self.value(source)))
        )
        out, weights = attend(
            self,
            heads(self.query(hidden_states)),
            key,
            value,
            encoder_attention_mask if cross else attention_mask,
            dropout=self.dropout.p,
            **kwargs,
        )
        return out.flatten(2), weights
