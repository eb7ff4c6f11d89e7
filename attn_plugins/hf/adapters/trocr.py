"""TrOCR: a decoder of text, and from it to the states of the patches that an encoder has seen."""

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.trocr import modeling_trocr

from attn_plugins.hf.adapters import cached, slotted
from attn_plugins.hf.dispatch import IMPLEMENTATION


class TrOCRAttention(modeling_trocr.TrOCRAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        source = hidden_states if key_value_states is None else key_value_states
        key, value = cached(
            past_key_values,
            self.layer_idx,
            key_value_states is not None,
            lambda: (heads(self.k_proj(source)), heads(self.v_proj(source))),
        )
        out, weights = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION](
            self,
            heads(self.q_proj(hidden_states)),
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            output_attentions=output_attentions,
        )
        return self.out_proj(out.flatten(2)), weights
