"""Images and video, in modules that make queries, keys and values in one projection, and add nothing to attention."""

import torch
from transformers.models.hiera import modeling_hiera
from transformers.models.mgp_str import modeling_mgp_str
from transformers.models.timesformer import modeling_timesformer

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("hiera", "mgp_str", "timesformer")


def unpacked(packed: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values (B, heads, N, D) of (B, N, 3 * heads * D)."""
    return packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class TimesformerSelfAttention(modeling_timesformer.TimesformerSelfAttention):
    is_causal = False

    @slotted
    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor | None, ...]:
        """Over the frames at one place, over the places of one frame, or over both."""
        query, key, value = unpacked(self.qkv(hidden_states), self.num_heads)
        out, weights = attend(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scale,
            dropout=self.attn_drop.p,
            output_attentions=output_attentions,
        )
        return (out.flatten(2), weights) if output_attentions else (out.flatten(2),)


class MgpstrAttention(modeling_mgp_str.MgpstrAttention):
    is_causal = False

    @slotted
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = unpacked(self.qkv(hidden_states), self.num_heads)
        out, weights = attend(self, query, key, value, None, scaling=self.scale, dropout=self.attn_drop.p)
        return self.proj_drop(self.proj(out.flatten(2))), weights


class HieraMaskUnitAttention(modeling_hiera.HieraMaskUnitAttention):
    is_causal = False

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Over all tokens or within windows, of which each has every W-th token; queries may be the maxima of some."""
        windows = 1
        if self.use_mask_unit_attn:
            windows = hidden_states.shape[1] // (self.query_stride * self.window_size)
        in_windows = hidden_states.unflatten(1, (-1, windows)).transpose(1, 2).flatten(0, 1)  # (B * W, N, width)
        query, key, value = unpacked(self.qkv(in_windows), self.num_heads)
        if self.query_stride > 1:
            query = query.unflatten(2, (self.query_stride, -1)).amax(dim=2)
        out, weights = attend(
            self, query, key, value, None, scaling=self.scale, dropout=0.0, output_attentions=output_attentions
        )
        out = out.flatten(2).unflatten(0, (-1, windows)).transpose(1, 2).flatten(1, 2)
        if weights is not None:
            weights = weights.unflatten(0, (-1, windows)).transpose(1, 2)  # (B, heads, W, Q, K)
        return self.proj(out), weights if output_attentions else None
