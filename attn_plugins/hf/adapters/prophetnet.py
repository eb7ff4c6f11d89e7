"""ProphetNet: its encoder's self-attention, and from its decoder to the encoder.

Self-attention of its decoder attends in several streams, to the tokens and to one key more of each query's own. It is
left as it is.
"""

from typing import Any

import torch
from transformers.models.prophetnet import modeling_prophetnet

from attn_plugins.hf.adapters import attend, cached, slotted

FAMILIES = ("prophetnet",)


class ProphetNetAttention(modeling_prophetnet.ProphetNetAttention):
    is_causal = False

    @property
    def num_heads(self) -> int:
        return self.num_attn_heads

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_attn_heads, self.head_dim)).transpose(1, 2)

        def made() -> tuple[torch.Tensor, torch.Tensor]:
            return heads(self.key_proj(source)), heads(self.value_proj(source))

        cross = key_value_states is not None
        source = key_value_states if cross else hidden_states
        key, value = cached(past_key_values, self.layer_idx, cross, made)
        out, weights = attend(
            self,
            heads(self.query_proj(hidden_states)),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout,
            output_attentions=bool(output_attentions),
        )
        out = self.out_proj(out.flatten(2))
        return torch.nn.functional.dropout(out, p=self.dropout, training=self.training), weights
