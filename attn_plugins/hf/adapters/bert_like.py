"""Modules that name their parts as BERT's does, and add nothing to its attention."""

from typing import Any

import torch
from torch import nn
from transformers.models.flava import modeling_flava
from transformers.models.lxmert import modeling_lxmert
from transformers.models.megatron_bert import modeling_megatron_bert
from transformers.models.rembert import modeling_rembert
from transformers.models.superglue import modeling_superglue
from transformers.models.tapas import modeling_tapas
from transformers.models.tvp import modeling_tvp
from transformers.models.vilt import modeling_vilt
from transformers.models.visual_bert import modeling_visual_bert

from attn_plugins.hf.adapters import attend_as_bert, slotted
from attn_plugins.hf.masks.dense_masks import additive

FAMILIES = ("flava", "lxmert", "megatron_bert", "rembert", "superglue", "tapas", "tvp", "vilt", "visual_bert")


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


class TvpAttention(modeling_tvp.TvpAttention):
    is_causal = False

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, output_attentions: bool | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        """Over a prompt, a text and the frames of a video in one row; with the residual and its norm."""
        out, weights = attend_as_bert(
            self,
            hidden_states,
            attention_mask,
            dropout=self.attn_dropout.p,
            output_attentions=bool(output_attentions),
        )
        out = self.layer_norm(self.dropout(self.dense(out)) + hidden_states)
        return (out, weights) if output_attentions else (out,)


class LxmertAttention(modeling_lxmert.LxmertAttention):
    is_causal = False

    def is_cross_in(self, model: nn.Module, path: str) -> bool:
        """Between text and image; one module does both directions."""
        return isinstance(model.get_submodule(path.rpartition(".")[0]), modeling_lxmert.LxmertCrossAttentionLayer)

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        attention_mask: Any = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """Within text or image, or from one to the other."""
        out, weights = attend_as_bert(
            self, hidden_states, attention_mask, source=context, output_attentions=output_attentions
        )
        return (out, weights) if output_attentions else (out,)


class SuperGlueSelfAttention(modeling_superglue.SuperGlueSelfAttention):
    def is_cross_in(self, model: nn.Module, path: str) -> bool:
        """Whether its layer goes from the keypoints of an image to those of the other of a pair."""
        gnn, _, layer = path.partition(".layers.") if ".layers." in path else ("", "", path.removeprefix("layers."))
        kinds: Any = model.get_submodule(gnn).layers_types
        return bool(kinds[int(layer.partition(".")[0])] == "cross")

    def bool_given(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask of the other image, which the model makes of one for both."""
        return additive(mask, self.query.weight.dtype)

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: Any = None,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor | None, ...]:
        out, weights = attend_as_bert(
            self,
            hidden_states,
            attention_mask if encoder_hidden_states is None else encoder_attention_mask,
            source=encoder_hidden_states,
            output_attentions=bool(output_attentions),
        )
        return (out, weights)[: 1 + bool(output_attentions)] + (None,) * self.is_decoder
