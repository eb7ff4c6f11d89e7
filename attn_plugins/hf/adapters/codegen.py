"""CodeGen: causal, with rotary positions by sines; queries, values and keys come interleaved in four parts."""

from typing import Any

import torch
from transformers import Cache
from transformers.models.codegen import modeling_codegen

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("codegen",)


class CodeGenAttention(modeling_codegen.CodeGenAttention):
    is_causal = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_past: Cache | None = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        parts = self.qkv_proj(hidden_states).unflatten(-1, (4, 3, -1, self.head_dim))
        query, value, key = (x.flatten(2, 3) for x in parts.unbind(3))
        sin, cos = self.embed_positions.to(position_ids.device)[position_ids].chunk(2, dim=-1)

        def rotate(x: torch.Tensor) -> torch.Tensor:
            width = x.shape[-1] if self.rotary_dim is None else self.rotary_dim
            rotated = modeling_codegen.apply_rotary_pos_emb(x[..., :width], sin, cos)
            return torch.cat([rotated, x[..., width:]], dim=-1).to(x.dtype).transpose(1, 2)

        query, key, value = rotate(query), rotate(key), value.transpose(1, 2)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=self.attn_dropout.p, output_attentions=output_attentions
        )
        return self.resid_dropout(self.out_proj(out.flatten(2))), weights
