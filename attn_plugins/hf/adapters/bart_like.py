"""Modules that name their parts as BART's does: a decoder, and from it to the states of an encoder."""

from typing import Any

import torch
from transformers.models.trocr import modeling_trocr
from transformers.models.xglm import modeling_xglm

from attn_plugins.hf.adapters import attend_as_bart, slotted

FAMILIES = ("trocr", "xglm")


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
