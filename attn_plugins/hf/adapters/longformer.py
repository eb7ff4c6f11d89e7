"""Longformer and LED: windows around each token, and tokens with global attention through a second set of projections.

What stands in the slot attends from every token to those that it sees. The rows of global tokens are softmax attention
to all tokens whatever that is, through their own projections, and are put in its place.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.led import modeling_led
from transformers.models.longformer import modeling_longformer

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.own_pattern import OwnPattern
from attn_plugins.hf.adapters import Heads, attend, attend_as_bart, slotted
from attn_plugins.hf.masks.mask_function import lazy_mask
from attn_plugins.hf.masks.own_masks import bidirectional, shared

FAMILIES = ("led", "longformer")


class LongformerSelfAttention(modeling_longformer.LongformerSelfAttention):
    is_causal = False

    @property
    def own_options(self) -> dict[str, int]:
        """Of ``longformer``: with these it is the pretrained function."""
        return {"window_size": self.one_sided_attn_window_size + 1, "num_global_tokens": 0}

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_index_masked: torch.Tensor | None = None,
        is_index_global_attn: torch.Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """Weights, where they are wanted, are (B, N, heads, N) instead of the window's, and (B, heads, G, N)."""
        assert attention_mask is not None  # (B, N): below 0 padding, above 0 global, else local
        mask = shared(attention_mask, "longformer", lambda: _mask(attention_mask))

        def heads(project: nn.Module, states: torch.Tensor) -> Heads:
            return project(states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        out, weights = attend(
            self,
            heads(self.query, hidden_states),
            heads(self.key, hidden_states),
            heads(self.value, hidden_states),
            mask,
            dropout=self.dropout,
            output_attentions=output_attentions,
        )
        of_global = None
        if mask.own is not None:
            found = mask.cached("global tokens", lambda: _found(mask))
            query = heads(self.query_global, hidden_states[found.rows_BG, found.tokens_BG])
            key, value = heads(self.key_global, hidden_states), heads(self.value_global, hidden_states)
            seen = None if mask.padding_BK is None else mask.padding_BK[:, None, None]
            if output_attentions:
                scores = query @ key.transpose(2, 3) * self.head_dim**-0.5
                scores = scores if seen is None else scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
                of_global = scores.softmax(dim=-1)
                made = nn.functional.dropout(of_global, self.dropout, self.training) @ value
            else:
                dropped = self.dropout if self.training else 0.0
                made = nn.functional.scaled_dot_product_attention(query, key, value, seen, dropout_p=dropped)
            out = out.index_put((found.rows, found.tokens), made.transpose(1, 2)[found.rows, found.numbers])
        if weights is not None and of_global is not None:
            weights = weights.transpose(1, 2).index_put(
                (found.rows, found.tokens), of_global.transpose(1, 2)[found.rows, found.numbers]
            )
        elif weights is not None:
            weights = weights.transpose(1, 2)
        if not output_attentions:
            return (out.flatten(2),)
        return (out.flatten(2), weights) if of_global is None else (out.flatten(2), weights, of_global)


class LEDEncoderSelfAttention(modeling_led.LEDEncoderSelfAttention):
    is_causal = False
    own_options = LongformerSelfAttention.own_options
    forward = LongformerSelfAttention.forward


class LEDDecoderAttention(modeling_led.LEDDecoderAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """Of the decoder, or from it to the encoder."""
        out, weights = attend_as_bart(
            self, hidden_states, key_value_states, past_key_values, attention_mask, output_attentions=output_attentions
        )
        return out, weights, past_key_values

    def missing_mask(
        self, *, hidden_states: torch.Tensor, past_key_values: Any, attention_mask: Any = None, **kwargs: Any
    ) -> AttentionMask | None:
        """Of one token, for which the model makes none."""
        if attention_mask is not None or kwargs.get("key_value_states") is not None:
            return None
        cache, layer = getattr(past_key_values, "self_attention_cache", past_key_values), self.layer_idx or 0
        batch, number = hidden_states.shape[:2]
        length, first = cache.get_mask_sizes(number, layer)
        return lazy_mask(batch, number, length, cache.get_seq_length(layer), first, device=hidden_states.device)


class GlobalTokens(NamedTuple):
    """Where tokens with global attention are, each row's at the beginning of G places."""

    rows_BG: torch.Tensor
    tokens_BG: torch.Tensor
    """The first token where a row has fewer."""
    rows: torch.Tensor
    tokens: torch.Tensor
    numbers: torch.Tensor
    """Row, token, and place among the row's, of each token with global attention."""


def _mask(given: torch.Tensor) -> AttentionMask:
    mask, marked_BK = bidirectional(given >= 0), given > 0
    return mask._copy(own=OwnPattern(marked_BK=marked_BK)) if bool(marked_BK.any()) else mask


def _found(mask: AttentionMask) -> GlobalTokens:
    assert mask.own is not None
    marked_BK = mask.own.marked_BK
    assert marked_BK is not None
    rows, tokens = marked_BK.nonzero(as_tuple=True)
    numbers = (marked_BK.long().cumsum(dim=1) - 1)[rows, tokens]
    tokens_BG = rows.new_zeros(len(marked_BK), int(numbers.max()) + 1).index_put((rows, numbers), tokens)
    rows_BG = torch.arange(len(marked_BK), device=rows.device).unsqueeze(1).expand_as(tokens_BG)
    return GlobalTokens(rows_BG, tokens_BG, rows, tokens, numbers)
