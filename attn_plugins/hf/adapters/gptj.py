"""GPT-J: causal, with rotary positions by sines that each module looks up itself."""

from typing import Any

import torch
from transformers import Cache
from transformers.models.gptj import modeling_gptj

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("gptj",)


class GPTJAttention(modeling_gptj.GPTJAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_past: Cache | None = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], self.num_attention_heads, self.head_dim)
        query, key, value = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        table = self._get_embed_positions(position_ids)
        index = position_ids.unsqueeze(-1).repeat(1, 1, table.shape[-1])
        sin, cos = torch.gather(table, 1, index).to(key.dtype).chunk(2, dim=-1)

        def rotate(x: torch.Tensor) -> torch.Tensor:
            width = x.shape[-1] if self.rotary_dim is None else self.rotary_dim
            rotated = modeling_gptj.apply_rotary_pos_emb(x[..., :width], sin, cos)
            return torch.cat([rotated, x[..., width:]], dim=-1).transpose(1, 2)

        query, key, value = rotate(query), rotate(key), value.transpose(1, 2)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=self.attn_dropout.p, output_attentions=output_attentions
        )
        return self.resid_dropout(self.out_proj(out.flatten(2))), weights


class GPTJFlashAttention2(modeling_gptj.GPTJFlashAttention2):
    forward = GPTJAttention.forward
