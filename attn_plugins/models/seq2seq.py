"""An encoder and a decoder, both recurrent, with attention between them: translation, summaries."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from attn_plugins.models.configs import RecurrentSeq2SeqConfig
from attn_plugins.models.decoder import RecurrentDecoderStack, counted
from attn_plugins.models.encoder import RecurrentEncoderStack, asked
from attn_plugins.models.pretrained import RecurrentPreTrainedModel


class RecurrentSeq2Seq(RecurrentPreTrainedModel, GenerationMixin):
    """A recurrent encoder-decoder, as Bahdanau et al. 2014 and Luong et al. 2015 have them, for any attention.

    ``config.attention`` says where attention enters, ``attn_plugin`` which attention it is: rules with
    ``roles: cross`` are for the decoder, and rules without roles for the encoder's attention to itself, if it has one.
    """

    config_class = RecurrentSeq2SeqConfig
    base_model_prefix = "recurrent_seq2seq"
    _tied_weights_keys: dict[str, str] = {  # noqa: RUF012
        "encoder.embed_tokens.weight": "decoder.embed_tokens.weight",
        "lm_head.weight": "decoder.embed_tokens.weight",
    }

    def __init__(self, config: RecurrentSeq2SeqConfig):
        if config.decoder_start_token_id is None:
            config.decoder_start_token_id = config.pad_token_id if config.bos_token_id is None else config.bos_token_id
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # labels are shifted where the decoder's inputs are made of them
        self.encoder = RecurrentEncoderStack(config)
        self.decoder = RecurrentDecoderStack(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.encoder.embed_tokens = value

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As transformers': both embeddings and the head."""
        made = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        held = self.decoder.embed_tokens
        if held.num_embeddings != made.num_embeddings:
            resized = self._get_resized_embeddings(held, made.num_embeddings, mean_resizing=mean_resizing)
            self.decoder.embed_tokens = resized
        self.tie_weights()
        return made

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The mask of padding as it is: a state needs no other, in whatever cache."""
        return attention_mask

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) one place to the right, behind the start token."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or (pad is None and bool((labels == -100).any())):
            raise ValueError(
                f"decoder_start_token_id={start} and pad_token_id={pad}: labels make the decoder's inputs only where "
                "the config says both"
            )
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, start if pad is None else pad)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """
        Args:
            input_ids: (B, K) of the source, or ``inputs_embeds``, or ``encoder_outputs`` of an earlier call.
            attention_mask: (B, K), 1 where a token is real, on whichever side the padding is.
            decoder_input_ids: (B, T); made of ``labels`` where they are not given.
            decoder_attention_mask: (B, T or more), of these tokens or of all so far.
            past_key_values: of earlier calls.
            labels: (B, T) of the target, -100 where there is none.

        Raises:
            ValueError: neither decoder inputs nor labels are given.
        """
        asking = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, **asking)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise ValueError("needs decoder_input_ids, decoder_inputs_embeds or labels, got none of them")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        made = self.decoder(
            decoder_input_ids,
            decoder_inputs_embeds,
            decoder_attention_mask,
            encoder_outputs.last_hidden_state,
            attention_mask,
            past_key_values,
            (self.config.use_cache and labels is None) if use_cache is None else use_cache,
        )
        logits = self.lm_head(made.hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **counted(kwargs)
            )
        weighed = made.weights is not None and asked(self.config, "output_attentions", output_attentions)
        shown = asked(self.config, "output_hidden_states", output_hidden_states)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=made.cache,
            decoder_hidden_states=(made.embeds, made.hidden) if shown else None,
            cross_attentions=(made.weights,) if weighed else None,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )
