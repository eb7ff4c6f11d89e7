"""Modules with one layer for queries, keys and values, as GPT-2's, which make their causal mask themselves.

The masks that their models give them know of padding alone.
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import causal_mask_function
from transformers.models.bark import modeling_bark
from transformers.models.imagegpt import modeling_imagegpt
from transformers.models.openai import modeling_openai

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.adapters import Heads, attend, cached, slotted
from attn_plugins.hf.masks.mask_function import LazyMask, lazy_mask

FAMILIES = ("bark", "imagegpt", "openai")


class Attention(modeling_openai.Attention):
    is_causal = True

    @slotted
    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> list[torch.Tensor | None]:
        """OpenAI GPT: it has no cache."""
        query, key, value = _heads(self.c_attn(x), self.n_head, 3)
        out, weights = attend(
            self,
            query,
            key,
            value,
            _causal(attention_mask, query),
            scaling=query.shape[-1] ** -0.5 if self.scale else 1.0,
            dropout=self.attn_dropout.p,
            output_attentions=output_attentions,
        )
        made = self.resid_dropout(self.c_proj(out.flatten(2)))
        return [made, weights] if output_attentions else [made]


class ImageGPTAttention(modeling_imagegpt.ImageGPTAttention):
    is_causal = True
    makes_causal = True

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_past: Any = None,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pixels as tokens. Its cross-attention is given the mask of the pixels, whatever that of the encoder is."""
        root = self.head_dim**0.5
        if not self.reorder_and_upcast_attn:
            root = float(modeling_imagegpt.torch_float(root))  # on transformers 5.17 it is the whole part of it
        scale = 1 / root if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            assert self.layer_idx is not None
            scale = scale / (self.layer_idx + 1)
        cross = encoder_hidden_states is not None
        if cross:
            (query,) = _heads(self.q_attn(hidden_states), self.num_heads, 1)
            key, value = _heads(self.c_attn(encoder_hidden_states), self.num_heads, 2)
        else:
            query, key, value = _heads(self.c_attn(hidden_states), self.num_heads, 3)
            attention_mask = _causal(attention_mask, query, _tokens_in(layer_past, self.layer_idx))
        key, value = cached(layer_past, self.layer_idx, cross, lambda: (key, value))
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=scale,
            dropout=self.attn_dropout.p,
            output_attentions=bool(output_attentions),
        )
        return self.resid_dropout(self.c_proj(out.flatten(2))), weights


class BarkSelfAttention(modeling_bark.BarkSelfAttention):
    @property
    def makes_causal(self) -> bool:
        return self.is_causal

    def is_causal_in(self, model: nn.Module, path: str) -> bool:
        """In the models of semantic and coarse tokens, not in that of fine ones."""
        return bool(self.is_causal)

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With a cache the model itself loses sight of padding, which is hidden here."""
        query, key, value = _heads(self.att_proj(hidden_states), self.num_heads, 3)
        if self.is_causal:
            attention_mask = _causal(attention_mask, query, _tokens_in(past_key_values, self.layer_idx))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p,
            output_attentions=output_attentions,
        )
        return self.resid_dropout(self.out_proj(out.flatten(2))), weights


class BarkSelfFlashAttention2(modeling_bark.BarkSelfFlashAttention2):
    makes_causal = BarkSelfAttention.makes_causal
    is_causal_in = BarkSelfAttention.is_causal_in
    forward = BarkSelfAttention.forward


def _heads(fused: torch.Tensor, number: int, parts: int) -> tuple[Heads, ...]:
    return tuple(part.unflatten(-1, (number, -1)).transpose(1, 2) for part in fused.chunk(parts, dim=-1))


def _tokens_in(cache: Any, layer_idx: int | None) -> int:
    cache = getattr(cache, "self_attention_cache", cache)
    return 0 if cache is None else cache.get_seq_length(layer_idx)


def _causal(mask: Any, query: Heads, before: int = 0) -> AttentionMask:
    """The causal mask of queries, with the padding that a mask of another kind knows of.

    Args:
        before: how many tokens a cache holds, which the mask may have been made without a look at.
    """
    if isinstance(mask, LazyMask):
        asked = {**mask.arguments, "mask_function": causal_mask_function}
        if before and not mask.fixed_length and mask.q_offset != before:
            asked |= {"kv_length": before + query.shape[2], "q_offset": before}
        return mask.cached(("causal", before), lambda: lazy_mask(**asked))
    sizes: dict[str, Any] = {"padding_BK": None if mask is None else mask[:, 0, -1] >= 0, "device": query.device}
    return AttentionMask(len(query), query.shape[2], query.shape[2], causal=True, **sizes)
