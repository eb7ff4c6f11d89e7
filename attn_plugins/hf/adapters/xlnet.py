"""XLNet: bidirectional or causal, as its config says, with a bias by content, relative position and segment.

The bias is a tensor of N x N numbers a head, computed as the model does: that cost remains, whatever the attention. All
that the modules are given has the sequence before the batch. In its second stream, which predicts tokens that it does
not see, the same keys are attended to once more.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.xlnet import modeling_xlnet

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.adapters import attend, slotted
from attn_plugins.hf.names import SLOT

FAMILIES = ("xlnet",)


class XLNetRelativeAttention(modeling_xlnet.XLNetRelativeAttention):
    adds_position_bias = True

    @property
    def head_dim(self) -> int:
        return self.d_head

    def is_causal_in(self, model: nn.Module, path: str) -> bool:
        holder = path.rpartition("layer.")[0].rstrip(".")
        return bool(model.get_submodule(holder).attn_type == "uni")

    @staticmethod
    def hidden_given(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.transpose(0, 1)

    @slotted
    def forward(
        self,
        h: torch.Tensor,
        g: torch.Tensor | None,
        attn_mask_h: torch.Tensor | None,
        attn_mask_g: torch.Tensor | None,
        r: torch.Tensor,
        seg_mat: torch.Tensor | None,
        mems: torch.Tensor | None = None,
        target_mapping: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Any, ...]:
        source = torch.cat([mems, h], dim=0) if mems is not None and mems.dim() > 1 else h
        key, value = (torch.einsum("ibh,hnd->bnid", source, part) for part in (self.k, self.v))
        position = torch.einsum("ibh,hnd->bnid", r.type(self.r.dtype), self.r)

        def stream(states: torch.Tensor, mask: torch.Tensor | None, mapping: torch.Tensor | None) -> tuple[Any, Any]:
            query = torch.einsum("ibh,hnd->bnid", states, self.q)
            if mapping is not None:
                query = torch.einsum("bnmd,mlb->bnld", query, mapping)
            out, weights = attend(
                self,
                query + self.r_w_bias.unsqueeze(1),
                key,
                value,
                _read(mask, query, key),
                scaling=self.scale,
                dropout=self.dropout.p,
                position_bias=self._bias(query, key, position, seg_mat),
                output_attentions=output_attentions,
            )
            out = out.transpose(0, 1)
            if mapping is not None:
                out = torch.einsum("lbnd,mlb->mbnd", out, mapping)
            return self.post_attention(states, out), None if weights is None else weights.permute(2, 3, 0, 1)

        out_h, weights_h = stream(h, attn_mask_h, None)
        if g is None:
            return (out_h, None, weights_h)[: 2 + output_attentions]
        if getattr(self, SLOT).wants_hidden:
            raise ValueError(
                "the attention of XLNetRelativeAttention needs the input of its queries, and the stream that predicts "
                "tokens must not have it; leave out target_mapping, or choose another attention"
            )
        out_g, weights_g = stream(g, attn_mask_g, target_mapping)
        return (out_h, out_g, (weights_h, weights_g))[: 2 + output_attentions]

    def _bias(
        self, query: torch.Tensor, key: torch.Tensor, position: torch.Tensor, seg_mat: torch.Tensor | None
    ) -> torch.Tensor:
        scores = (query + self.r_r_bias.unsqueeze(1)) @ position.transpose(2, 3)
        scores = self.rel_shift_bnij(scores, klen=key.shape[2])
        if seg_mat is not None:
            of_segments = torch.einsum("bnid,snd->bnis", query + self.r_s_bias.unsqueeze(1), self.seg_embed)
            scores = scores + torch.einsum("ijbs,bnis->bnij", seg_mat, of_segments)
        return scores * self.scale


def _read(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> Any:
    """The mask of numbers (Q, K, B or 1, 1) that are 1 where a key is hidden; None hides nothing."""
    if mask is None:
        return AttentionMask(len(query), query.shape[2], key.shape[2], causal=False, device=query.device)
    return (mask == 0).permute(2, 3, 0, 1)
