"""Modules that name their parts as BART's does: an encoder, a decoder, and from it to the states of the encoder."""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.models.mvp import modeling_mvp
from transformers.models.speecht5 import modeling_speecht5
from transformers.models.trocr import modeling_trocr
from transformers.models.xglm import modeling_xglm

from attn_plugins.hf.adapters import attend_as_bart, slotted
from attn_plugins.hf.caches.prefixes import behind
from attn_plugins.hf.masks.mask_function import LazyMask

FAMILIES = ("mvp", "speecht5", "trocr", "xglm")


class TrOCRAttention(modeling_trocr.TrOCRAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return attend_as_bart(self, hidden_states, key_value_states, past_key_values, attention_mask, **kwargs)


class XGLMAttention(modeling_xglm.XGLMAttention):
    forward = TrOCRAttention.forward


class MvpAttention(modeling_mvp.MvpAttention):
    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        attn_prompt: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With a prompt where the model has one: learned keys and values, which all queries see."""
        if attn_prompt is not None:
            attention_mask = _seeing(attn_prompt.shape[2], attention_mask, cross=key_value_states is not None)
        return attend_as_bart(
            self, hidden_states, key_value_states, past_key_values, attention_mask, prompt=attn_prompt, **kwargs
        )


class SpeechT5Attention(modeling_speecht5.SpeechT5Attention):
    @property
    def adds_position_bias(self) -> bool:
        return not self.is_decoder

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With keys (N, N, D) of relative positions in the encoder, each scored by its query: N x N numbers a head."""
        if position_bias is not None:
            query = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)) * self.scaling
            position_bias = torch.einsum("bihd,ijd->bhij", query, position_bias)
        return attend_as_bart(
            self,
            hidden_states,
            key_value_states,
            past_key_values,
            attention_mask,
            position_bias=position_bias,
            **kwargs,
        )


def _seeing(number: int, mask: Any, *, cross: bool) -> Any:
    """A mask in which all queries see as many keys more, before those that it is for."""
    if mask is None:
        return None
    if isinstance(mask, LazyMask):
        if mask.plain and not mask.causal and not cross:
            return behind(mask, number)
        mask = mask.as_tensor()
    return pad(mask, (number, 0), value=mask.dtype == torch.bool)
