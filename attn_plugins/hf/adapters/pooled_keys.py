"""Images, with the keys and values of a smaller copy of what queries are made of."""

from typing import Any

import torch
from transformers.models.cvt import modeling_cvt
from transformers.models.glpn import modeling_glpn
from transformers.models.pvt import modeling_pvt
from transformers.models.pvt_v2 import modeling_pvt_v2

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("cvt", "glpn", "pvt", "pvt_v2")


def attend_to_pooled(
    module: Any, hidden_states: torch.Tensor, pooled: torch.Tensor, dropout: float, output_attentions: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output (B, Q, width), and the weights, of queries (B, Q, width) to keys and values of (B, K, width)."""

    def heads(project: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        return project(states).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)

    out, weights = attend(
        module,
        heads(module.query, hidden_states),
        heads(module.key, pooled),
        heads(module.value, pooled),
        None,
        dropout=dropout,
        output_attentions=output_attentions,
    )
    return out.flatten(2), weights


def on_grid(states: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, channels, height, width) of (B, N, channels)."""
    return states.transpose(1, 2).unflatten(2, (height, width))


def reduced(module: Any, reduce: torch.nn.Module, states: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, K, channels): tokens of a smaller grid, with the module's norm."""
    return module.layer_norm(reduce(on_grid(states, height, width)).flatten(2).transpose(1, 2))


class GLPNEfficientSelfAttention(modeling_glpn.GLPNEfficientSelfAttention):
    is_causal = False

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor | None, ...]:
        pooled = hidden_states
        if self.sr_ratio > 1:
            pooled = reduced(self, self.sr, hidden_states, height, width)
        out, weights = attend_to_pooled(self, hidden_states, pooled, self.dropout.p, output_attentions)
        return (out, weights) if output_attentions else (out,)


class PvtEfficientSelfAttention(modeling_pvt.PvtEfficientSelfAttention):
    is_causal = False

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor | None, ...]:
        pooled = hidden_states
        if self.sequences_reduction_ratio > 1:
            pooled = reduced(self, self.sequence_reduction, hidden_states, height, width)
        out, weights = attend_to_pooled(self, hidden_states, pooled, self.dropout.p, output_attentions)
        return (out, weights) if output_attentions else (out,)


class PvtV2SelfAttention(modeling_pvt_v2.PvtV2SelfAttention):
    is_causal = False

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor | None, ...]:
        """With as many keys for an image of any size, where the config says linear attention."""
        pooled = hidden_states
        if self.linear_attention:
            smaller = self.spatial_reduction(self.pool(on_grid(hidden_states, height, width)))
            pooled = self.act(self.layer_norm(smaller.flatten(2).transpose(1, 2)))
        elif self.spatial_reduction_ratio > 1:
            pooled = reduced(self, self.spatial_reduction, hidden_states, height, width)
        out, weights = attend_to_pooled(self, hidden_states, pooled, self.attn_drop.p, output_attentions)
        out = self.proj_drop(self.proj(out))
        return (out, weights) if output_attentions else (out,)


class CvtSelfAttention(modeling_cvt.CvtSelfAttention):
    is_causal = False

    @slotted
    def forward(self, hidden_state: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Each of the three made by a convolution, in the last stage with [CLS] before them."""
        first, patches = hidden_state.split([int(self.with_cls_token), height * width], dim=1)
        patches = on_grid(patches, height, width)

        def heads(convolve: torch.nn.Module, project: torch.nn.Module) -> torch.Tensor:
            states = torch.cat([first, convolve(patches)], dim=1)
            return project(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        out, _ = attend(
            self,
            heads(self.convolution_projection_query, self.projection_query),
            heads(self.convolution_projection_key, self.projection_key),
            heads(self.convolution_projection_value, self.projection_value),
            None,
            scaling=self.scale,
            dropout=self.dropout.p,
        )
        return out.flatten(2)
