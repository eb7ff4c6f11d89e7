"""Encoders: states of a recurrent layer for each token, which may attend to one another; and a classifier on them."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from attn_plugins.models.attention import RecurrentCrossAttention, RecurrentSelfAttention
from attn_plugins.models.configs import RecurrentEncoderConfig
from attn_plugins.models.layers import make_layers, run
from attn_plugins.models.pretrained import RecurrentPreTrainedModel


class RecurrentEncoderStack(nn.Module):
    """Embeddings, recurrent layers, and attention of the states to one another where the config says so."""

    main_input_name = "input_ids"  # as generate() asks an encoder

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = make_layers(config, config.hidden_size, bidirectional=config.bidirectional)
        self.self_attention = RecurrentSelfAttention(config) if config.self_attention else None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states, _ = run(self.layers, self.dropout(embeds), attention_mask)
        hidden: tuple[torch.Tensor, ...] = (embeds, states)
        attentions = None
        if self.self_attention is not None:
            mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=attention_mask)
            states, weights = self.self_attention(states, mask)
            hidden = (*hidden, states)
            attentions = None if weights is None else (weights,)
        return BaseModelOutput(
            last_hidden_state=states,
            hidden_states=hidden if asked(self.config, "output_hidden_states", output_hidden_states) else None,
            attentions=attentions if asked(self.config, "output_attentions", output_attentions) else None,
        )


def asked(config: Any, name: str, given: bool | None) -> bool:
    """Whether an output is wanted: by the call, or where that says nothing by the config."""
    return bool(getattr(config, name, False) if given is None else given)


def ends(states: torch.Tensor, mask: torch.Tensor | None, bidirectional: bool) -> torch.Tensor:
    """(B, size): the last state of the forward direction, and the first of the backward one, as one row.

    Args:
        states: (B, N, size), the forward direction's half first.
        mask: (B, N), true where a token is real; None where all are.
    """
    rows = torch.arange(states.shape[0], device=states.device)
    if mask is None:
        first, last = rows * 0, rows * 0 + states.shape[1] - 1
    else:
        first = mask.to(torch.uint8).argmax(dim=1)
        last = states.shape[1] - 1 - mask.to(torch.uint8).flip(1).argmax(dim=1)
    if not bidirectional:
        return states[rows, last]
    half = states.shape[2] // 2
    return torch.cat([states[rows, last, :half], states[rows, first, half:]], dim=1)


def mean(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, size): the mean of the states of real tokens."""
    if mask is None:
        return states.mean(dim=1)
    weight = mask.to(states.dtype).unsqueeze(2)
    return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


class RecurrentEncoderModel(RecurrentPreTrainedModel):
    """The states of an encoder: ``last_hidden_state`` (B, N, hidden_size)."""

    config_class = RecurrentEncoderConfig

    def __init__(self, config: RecurrentEncoderConfig):
        super().__init__(config)
        self.stack = RecurrentEncoderStack(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.stack.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.stack.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: (B, N), or ``inputs_embeds`` (B, N, hidden_size) in their place.
            attention_mask: (B, N), 1 where a token is real, on whichever side the padding is.
        """
        return self.stack(
            input_ids,
            attention_mask,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )


class RecurrentEncoderForSequenceClassification(RecurrentPreTrainedModel):
    """A class for a text, by what is pooled of an encoder's states, unless told else by a learned query's attention."""

    config_class = RecurrentEncoderConfig

    def __init__(self, config: RecurrentEncoderConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.recurrent = RecurrentEncoderModel(config)
        self.pooling = RecurrentCrossAttention(config, config.hidden_size) if config.pooling == "attention" else None
        self.pooling_query = nn.Parameter(torch.zeros(config.hidden_size)) if self.pooling is not None else None
        dropout = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.pooling_query is not None:
            init.normal_(self.pooling_query, std=1.0)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids: (B, N), or ``inputs_embeds`` (B, N, hidden_size) in their place.
            attention_mask: (B, N), 1 where a token is real, on whichever side the padding is.
            labels: (B,) classes, or as ``config.problem_type`` says.
        """
        asking = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        made = self.recurrent(input_ids, attention_mask, inputs_embeds, **asking)
        pooled, weights = self._pooled(made.last_hidden_state, attention_mask)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        attentions = made.attentions
        if weights is not None and asked(self.config, "output_attentions", output_attentions):
            attentions = (*(attentions or ()), weights)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=made.hidden_states, attentions=attentions
        )

    def _pooled(self, states: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """((B, size), weights (B, H, 1, N) or None)."""
        if self.config.pooling == "mean":
            return mean(states, mask), None
        if self.config.pooling == "last":
            return ends(states, mask, self.config.bidirectional), None
        if self.config.pooling == "max":
            hidden = states if mask is None else states.masked_fill(~mask.bool().unsqueeze(2), -torch.inf)
            largest = hidden.amax(dim=1)
            return largest.masked_fill(largest == -torch.inf, 0.0), None  # of a row of padding alone
        assert self.pooling is not None
        assert self.pooling_query is not None
        query = self.pooling_query.expand(states.shape[0], 1, -1)
        seen = create_bidirectional_mask(
            config=self.config, inputs_embeds=query, attention_mask=mask, encoder_hidden_states=states
        )
        pooled, weights = self.pooling(query, *self.pooling.project(states), seen)
        return pooled.squeeze(1), weights
