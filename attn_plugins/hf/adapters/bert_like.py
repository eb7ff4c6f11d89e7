"""Modules that name their parts as BERT's does, and add nothing to its attention."""

from typing import Any

import torch
from transformers.models.flava import modeling_flava
from transformers.models.megatron_bert import modeling_megatron_bert
from transformers.models.rembert import modeling_rembert
from transformers.models.tapas import modeling_tapas
from transformers.models.vilt import modeling_vilt
from transformers.models.visual_bert import modeling_visual_bert

from attn_plugins.hf.adapters import attend_as_bert, slotted

FAMILIES = ("flava", "megatron_bert", "rembert", "tapas", "vilt", "visual_bert")


class MegatronBertSelfAttention(modeling_megatron_bert.MegatronBertSelfAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of an encoder, of a decoder, or from a decoder to the states of an encoder."""
        return attend_as_bert(
            self,
            hidden_states,
            attention_mask,
            source=encoder_hidden_states,
            cache=past_key_values,
            output_attentions=output_attentions,
        )


class RemBertSelfAttention(modeling_rembert.RemBertSelfAttention):
    forward = MegatronBertSelfAttention.forward


class TapasSelfAttention(modeling_tapas.TapasSelfAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """The same; it returns its cache too, and weights only where they are wanted."""
        out, weights = attend_as_bert(
            self,
            hidden_states,
            attention_mask,
            source=encoder_hidden_states,
            cache=past_key_values,
            output_attentions=output_attentions,
        )
        return (out, weights)[: 1 + output_attentions] + (past_key_values,) * self.is_decoder


class FlavaSelfAttention(modeling_flava.FlavaSelfAttention):
    is_causal = False

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor | None, ...]:
        """Over patches, over text, or over both in one row."""
        out, weights = attend_as_bert(self, hidden_states, attention_mask, output_attentions=output_attentions)
        return (out, weights) if output_attentions else (out,)


class ViltSelfAttention(modeling_vilt.ViltSelfAttention):
    is_causal = False
    forward = FlavaSelfAttention.forward


class VisualBertSelfAttention(modeling_visual_bert.VisualBertSelfAttention):
    is_causal = False
    forward = FlavaSelfAttention.forward
