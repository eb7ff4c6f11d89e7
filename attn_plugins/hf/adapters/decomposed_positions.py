"""Images, with the query's products with an embedding of the distance in rows and with one of that in columns added.

For images or windows (B, rows, columns, width).
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.sam import modeling_sam
from transformers.models.sam_hq import modeling_sam_hq
from transformers.models.seggpt import modeling_seggpt
from transformers.models.slanext import modeling_slanext
from transformers.models.vitdet import modeling_vitdet

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("sam", "sam_hq", "seggpt", "slanext", "vitdet")


def attend_on_grid(
    module: Any,
    hidden_states: torch.Tensor,
    heads: int,
    table: Callable[[int, int, torch.Tensor], torch.Tensor] | None,
    *,
    dropout: float = 0.0,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output (B, rows, columns, width), and the weights.

    Args:
        table: as the families' ``get_rel_pos``; None where the module has no bias.
    """
    rows, columns = hidden_states.shape[1:3]
    query, key, value = module.qkv(hidden_states).flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    bias = None
    if table is not None:
        on_grid = query.unflatten(2, (rows, columns))
        of_rows = torch.einsum("bnhwc,hkc->bnhwk", on_grid, table(rows, rows, module.rel_pos_h))
        of_columns = torch.einsum("bnhwc,wkc->bnhwk", on_grid, table(columns, columns, module.rel_pos_w))
        bias = (of_rows.unsqueeze(-1) + of_columns.unsqueeze(-2)).flatten(4).flatten(2, 3)
    out, weights = attend(
        module,
        query,
        key,
        value,
        None,
        scaling=module.scale,
        dropout=dropout,
        position_bias=bias,
        output_attentions=output_attentions,
    )
    return module.proj(out.flatten(2).unflatten(1, (rows, columns))), weights


class SamVisionAttention(modeling_sam.SamVisionAttention):
    is_causal = False

    @property
    def adds_position_bias(self) -> bool:
        return self.use_rel_pos

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With weights (B * heads, N, N)."""
        table = self.get_rel_pos if self.use_rel_pos else None
        out, weights = attend_on_grid(
            self,
            hidden_states,
            self.num_attention_heads,
            table,
            dropout=self.dropout,
            output_attentions=bool(output_attentions),
        )
        return out, None if weights is None else weights.flatten(0, 1)


class SamVisionSdpaAttention(modeling_sam.SamVisionSdpaAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward


class SamHQVisionAttention(modeling_sam_hq.SamHQVisionAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward


class SamHQVisionSdpaAttention(modeling_sam_hq.SamHQVisionSdpaAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward


class SLANeXtVisionAttention(modeling_slanext.SLANeXtVisionAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward


class SegGptAttention(modeling_seggpt.SegGptAttention):
    is_causal = False

    @property
    def adds_position_bias(self) -> bool:
        return self.use_relative_position_embeddings

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        table = self.get_rel_pos if self.adds_position_bias else None
        return attend_on_grid(self, hidden_states, self.num_attention_heads, table, output_attentions=output_attentions)


class VitDetAttention(modeling_vitdet.VitDetAttention):
    is_causal = False

    @property
    def adds_position_bias(self) -> bool:
        return self.use_relative_position_embeddings

    @slotted
    def forward(self, hidden_state: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor | None, ...]:
        """The same; it returns weights only where they are wanted."""
        table = modeling_vitdet.get_rel_pos if self.adds_position_bias else None
        out, weights = attend_on_grid(self, hidden_state, self.num_heads, table, output_attentions=output_attentions)
        return (out, weights) if output_attentions else (out,)
