"""Decoders: recurrent layers that write, with attention over the states of an encoder, of whatever kind that is."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils.generic import can_return_tuple

from attn_plugins.models.attention import RecurrentCrossAttention
from attn_plugins.models.configs import RecurrentDecoderConfig
from attn_plugins.models.encoder import asked, ends, mean
from attn_plugins.models.layers import State, make_layers, run
from attn_plugins.models.pretrained import RecurrentPreTrainedModel
from attn_plugins.models.state_cache import RecurrentStateLayer, state_layer


@dataclass
class Decoded:
    """What a decoder makes of the embeddings (B, T, size) of its tokens."""

    hidden: torch.Tensor
    """(B, T, hidden_size): what the head reads."""
    embeds: torch.Tensor
    cache: Cache | None
    weights: torch.Tensor | None
    """(B, H, T, K), where the implementation gives weights."""


class RecurrentDecoderStack(nn.Module):
    """Embeddings, recurrent layers and attention over an encoder.

    With h_t the state of the last layer after token t and c_t what attention answers,

    - ``luong`` (Luong et al. 2015, arXiv:1508.04025, eq. 5): c_t is asked by h_t, and ``tanh(W [c_t; h_t])`` is read
      out; with ``input_feeding`` it is also read by the first layer beside the next token.
    - ``bahdanau`` (Bahdanau et al. 2014, arXiv:1409.0473, A.1.2): c_t is asked by h_{t-1}, and read by the first layer
      beside the token; what is read out is made as above, without the paper's maxout.
    - ``none``: ``tanh(W h_t)``. All that the decoder knows of the encoder is its initial state.

    The initial states of all layers are ``tanh`` of a linear function of the encoder's states' mean, last or ends.

    Args:
        memory_size: size of the encoder's states; None where there is no encoder.
    """

    def __init__(self, config: Any, memory_size: int | None):
        super().__init__()
        self.config, size = config, config.hidden_size
        attends = memory_size is not None and config.attention != "none"
        self.stepwise = attends and (config.attention == "bahdanau" or config.input_feeding)
        """Whether what a step attends to depends on the step before, so that steps follow one another."""
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = make_layers(config, 2 * size if self.stepwise else size)
        self.cross_attention = RecurrentCrossAttention(config, memory_size) if attends else None  # type: ignore[arg-type]
        self.initial = None
        if memory_size is not None:
            self.initial = nn.Linear(memory_size, config.num_layers * size * (2 if config.cell == "lstm" else 1))
        self.readout = nn.Linear(2 * size if attends else size, size)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        memory: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool,
    ) -> Decoded:
        """
        Args:
            input_ids: (B, T), or ``inputs_embeds`` (B, T, size) in their place.
            attention_mask: (B, T or more), of these tokens or of all so far; padding leaves the state as it is.
            memory: (B, K, memory_size), the encoder's states.
            memory_mask: (B, K), true where one of them is of a real token.
            cache: what it holds goes before; it takes these tokens in.
            use_cache: whether to begin a cache where there is none.
        """
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = self._mask(attention_mask, embeds)
        cache = DynamicCache() if use_cache and cache is None else cache
        layer = None if cache is None else state_layer(cache)
        state, fed, keys, values = self._begin(layer, embeds, memory, memory_mask)
        seen: Any = None
        if keys is not None:
            seen = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=embeds[:, :1] if self.stepwise else embeds,
                attention_mask=memory_mask,
                encoder_hidden_states=_like(memory, keys),
            )
        inputs, after = self.dropout(embeds), state
        if self.stepwise:
            assert keys is not None
            assert values is not None
            assert state is not None
            outputs, context, weights, after, fed = self._step_by_step(inputs, mask, state, fed, (keys, values, seen))
        else:
            outputs, after = run(self.layers, inputs, mask, state)
            context, weights = None, None
            if self.cross_attention is not None:
                context, weights = self.cross_attention(outputs, keys, values, seen)
        if layer is not None:
            if after is None:
                raise ValueError(
                    "a recorded graph of a recurrent decoder has no cache beside a padding mask; use_cache=False"
                )
            _keep(layer, after, fed, keys, values, embeds.shape[1])
        hidden = self.dropout(self._read_out(outputs, context))
        return Decoded(hidden=hidden, embeds=embeds, cache=cache, weights=weights)

    def _begin(
        self,
        layer: RecurrentStateLayer | None,
        embeds: torch.Tensor,
        memory: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
    ) -> tuple[State | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(States, what is fed, keys, values) before these tokens."""
        if layer is not None and layer.hidden is not None:
            held = [x.transpose(0, 1).contiguous() for x in (layer.hidden, layer.cell) if x is not None]
            return tuple(held), layer.fed, layer.keys, layer.values
        if self.initial is None:
            return None, None, None, None
        if memory is None:
            raise ValueError(
                "a recurrent decoder with add_cross_attention=True needs encoder_hidden_states, got None; allowed "
                "without: add_cross_attention=False in its config"
            )
        kind = self.config.initial_state
        known = mean(memory, memory_mask) if kind == "mean" else ends(memory, memory_mask, kind == "ends")
        made = torch.tanh(self.initial(known)).unflatten(1, (-1, self.config.num_layers, self.config.hidden_size))
        state = tuple(x.transpose(0, 1).contiguous() for x in made.unbind(1))
        keys = values = None
        if self.cross_attention is not None:
            keys, values = self.cross_attention.project(memory)
        return state, embeds.new_zeros(embeds.shape[0], self.config.hidden_size), keys, values

    def _step_by_step(
        self,
        inputs: torch.Tensor,
        mask: torch.Tensor | None,
        state: State,
        fed: torch.Tensor | None,
        attended: tuple[torch.Tensor, torch.Tensor, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, State, torch.Tensor | None]:
        """(Outputs, contexts, weights, states after the last token, what is fed after it)."""
        assert self.cross_attention is not None
        before, outputs, contexts, weights = self.config.attention == "bahdanau", [], [], []
        for step, token in enumerate(inputs.unbind(1)):
            if before:
                context, weight = self.cross_attention(state[0][-1].unsqueeze(1), *attended)
                beside = context.squeeze(1)
            else:
                assert fed is not None
                beside = fed
            output, after = run(self.layers, torch.cat([token, beside], dim=1).unsqueeze(1), None, state)
            assert after is not None
            if not before:
                context, weight = self.cross_attention(output, *attended)
            new = self._read_out(output, context).squeeze(1) if not before else fed
            if mask is None:
                state, fed = after, new
            else:
                real = mask[:, step].unsqueeze(1)
                state = tuple(torch.where(real, x, old) for x, old in zip(after, state, strict=True))
                fed = None if new is None or fed is None else torch.where(real, new, fed)
            outputs.append(output)
            contexts.append(context)
            weights.append(weight)
        given = [weight for weight in weights if weight is not None]
        joined = torch.cat(given, dim=2) if len(given) == len(weights) else None
        return torch.cat(outputs, dim=1), torch.cat(contexts, dim=1), joined, state, fed

    def _read_out(self, outputs: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return torch.tanh(self.readout(outputs if context is None else torch.cat([context, outputs], dim=-1)))

    def _mask(self, mask: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor | None:
        """Which of these tokens are real, (B, T); None where that is not said.

        Raises:
            ValueError: it is no mask of padding, or of fewer tokens.
        """
        if mask is None:
            return None
        rows, length = embeds.shape[:2]
        if mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < length:
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)}; allowed: ({rows}, {length} or more), 1 where a token "
                "is real"
            )
        return mask[:, -length:].bool()


def _keep(
    layer: RecurrentStateLayer, state: State, fed: Any, keys: torch.Tensor | None, values: torch.Tensor | None, new: int
) -> None:
    layer.hidden, layer.cell = state[0].transpose(0, 1), state[1].transpose(0, 1) if len(state) > 1 else None
    layer.keys, layer.values, layer.fed = keys, values, fed
    layer.seen, layer.is_initialized = layer.seen + new, True


def _like(memory: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    """Something of the batch and length of the encoder's states."""
    return keys[:, 0] if memory is None else memory


class RecurrentDecoder(RecurrentPreTrainedModel, GenerationMixin):
    """A causal language model of recurrent layers, with attention over ``encoder_hidden_states``.

    By itself, or as the decoder of transformers' ``EncoderDecoderModel`` and ``VisionEncoderDecoderModel``.
    """

    config_class = RecurrentDecoderConfig
    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "stack.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RecurrentDecoderConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        memory = config.cross_attention_hidden_size or config.hidden_size
        self.stack = RecurrentDecoderStack(config, memory if config.add_cross_attention else None)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.stack.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.stack.embed_tokens = value

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The mask of padding as it is: a state needs no other, in whatever cache."""
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """
        Args:
            input_ids: (B, T), or ``inputs_embeds`` (B, T, hidden_size) in their place.
            attention_mask: (B, T or more), 1 where a token is real, of these tokens or of all so far.
            encoder_hidden_states: (B, K, size of the encoder's states).
            encoder_attention_mask: (B, K).
            past_key_values: of earlier calls.
            labels: (B, T), -100 where there is none; each is predicted from the tokens before it.
        """
        caching = (self.config.use_cache and labels is None) if use_cache is None else use_cache
        made = self.stack(
            input_ids,
            inputs_embeds,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            caching,
        )
        logits = self.lm_head(made.hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **counted(kwargs)
            )
        weighed = made.weights is not None and asked(self.config, "output_attentions", output_attentions)
        shown = asked(self.config, "output_hidden_states", output_hidden_states)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=made.cache,
            hidden_states=(made.embeds, made.hidden) if shown else None,
            cross_attentions=(made.weights,) if weighed else None,
        )


def counted(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What Trainer says of the number of tokens that a loss is a mean over."""
    return {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
