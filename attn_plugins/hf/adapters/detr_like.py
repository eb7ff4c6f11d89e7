"""DETR's kin, which add positions to the states that queries and keys are made of, and not to those of values."""

from typing import Any

import torch
from transformers.models.dab_detr import modeling_dab_detr
from transformers.models.table_transformer import modeling_table_transformer

from attn_plugins.hf.adapters import Heads, attend, slotted

FAMILIES = ("dab_detr", "table_transformer")


def by_heads(states: torch.Tensor, number: int) -> Heads:
    return states.unflatten(-1, (number, -1)).transpose(1, 2)


def placed(states: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    return states if positions is None else states + positions


def attend_placed(
    module: Any,
    states: torch.Tensor,
    positions: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    source: torch.Tensor | None = None,
    source_positions: torch.Tensor | None = None,
    dropout: float,
    output_attentions: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output (B, N, width), and the weights.

    Args:
        source: (B, K, width), what keys and values are made of; None is ``states``.
    """
    queries = placed(states, positions)
    keys = queries if source is None else placed(source, source_positions)
    out, weights = attend(
        module,
        by_heads(module.q_proj(queries), module.num_heads),
        by_heads(module.k_proj(keys), module.num_heads),
        by_heads(module.v_proj(states if source is None else source), module.num_heads),
        mask,
        scaling=module.scaling,
        dropout=dropout,
        output_attentions=output_attentions,
    )
    return module.out_proj(out.flatten(2)), weights


class TableTransformerAttention(modeling_table_transformer.TableTransformerAttention):
    is_causal = False

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        object_queries: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        spatial_position_embeddings: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Over an image, over queries of objects, or from these to the image."""
        return attend_placed(
            self,
            hidden_states,
            object_queries,
            attention_mask,
            source=key_value_states,
            source_positions=spatial_position_embeddings,
            dropout=self.dropout,
            output_attentions=output_attentions,
        )


class DetrAttention(modeling_dab_detr.DetrAttention):
    is_causal = False

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        object_queries: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Over an image; it makes nothing of states of another."""
        return attend_placed(
            self,
            hidden_states,
            object_queries,
            attention_mask,
            dropout=self.attention_dropout,
            output_attentions=output_attentions,
        )


class DabDetrAttention(modeling_dab_detr.DabDetrAttention):
    """Of projections that are made outside; in cross-attention positions stand beside the content, twice as wide."""

    is_causal = False

    @property
    def num_heads(self) -> int:
        return self.attention_heads

    @property
    def qk_head_dim(self) -> int:
        return self.attention_head_dim

    @property
    def v_head_dim(self) -> int:
        return self.values_head_dim

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_states: torch.Tensor | None = None,
        value_states: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert key_states is not None
        assert value_states is not None
        out, weights = attend(
            self,
            by_heads(hidden_states, self.attention_heads),
            by_heads(key_states, self.attention_heads),
            by_heads(value_states, self.attention_heads),
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout,
            output_attentions=bool(output_attentions),
        )
        return self.output_proj(out.flatten(2)), weights if output_attentions else None
