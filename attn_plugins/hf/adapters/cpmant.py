"""CPM-Ant: every token sees every other, with a bias by relative position and segment.

So it does while text is generated, where new tokens are seen by those that were there only as long as no cache keeps
these.
"""

from typing import Any

import torch
from transformers.models.cpmant import modeling_cpmant

from attn_plugins.hf.adapters import attend, padding_of, slotted

FAMILIES = ("cpmant",)


class CpmAntAttention(modeling_cpmant.CpmAntAttention):
    is_causal = False
    adds_position_bias = True

    @slotted
    def forward(
        self,
        hidden_q: torch.Tensor,
        hidden_kv: torch.Tensor,
        attention_mask: torch.Tensor,
        position_bias: torch.Tensor,
        output_attentions: bool | None = False,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, self.dim_head)).transpose(1, 2)

        query, key, value = (
            heads(self.project_q(hidden_q)),
            heads(self.project_k(hidden_kv)),
            heads(self.project_v(hidden_kv)),
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        square = query.shape[2] == key.shape[2]
        mask = attention_mask.view(len(query), 1, query.shape[2], key.shape[2])
        out, weights = attend(
            self,
            query,
            key,
            value,
            padding_of(mask) if square else mask,
            dropout=0.0 if self.dropout is None else self.dropout.p,
            position_bias=position_bias,
            output_attentions=bool(output_attentions),
        )
        return self.attention_out(out.flatten(2)), weights
