"""FSMT: encoder and decoder of a translator, with the sequence before the batch in all that its modules are given."""

from typing import Any

import torch
from torch import nn
from transformers.models.fsmt import modeling_fsmt

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.adapters import attend, cached, slotted

FAMILIES = ("fsmt",)


class Attention(modeling_fsmt.Attention):
    def is_causal_in(self, model: nn.Module, path: str) -> bool:
        return "decoder" in path.split(".")

    @staticmethod
    def hidden_given(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.transpose(0, 1)

    @slotted
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None = None,
        layer_state: Any = None,
        attn_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``attn_mask`` is causal where it is given. With a cache there is none: tokens come one at a time, and where
        several come, each sees all."""

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)

        cross = self.encoder_decoder_attention
        source = key if cross else query
        keys, values = cached(
            layer_state, self.layer_idx, cross, lambda: (heads(self.k_proj(source)), heads(self.v_proj(source)))
        )
        queries = heads(self.q_proj(query))
        hidden = key_padding_mask if key_padding_mask is not None and key_padding_mask.ndim else None
        mask = AttentionMask(
            len(queries),
            queries.shape[2],
            keys.shape[2],
            causal=not cross and (attn_mask is not None or (layer_state is not None and queries.shape[2] == 1)),
            cross=cross,
            padding_BK=None if hidden is None else ~hidden,
            device=queries.device,
        )
        out, weights = attend(
            self,
            queries,
            keys,
            values,
            mask,
            scaling=self.scaling,
            dropout=self.dropout,
            output_attentions=bool(output_attentions),
        )
        return self.out_proj(out.flatten(2).transpose(0, 1)), weights
