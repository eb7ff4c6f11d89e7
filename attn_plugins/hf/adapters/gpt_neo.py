"""GPT-Neo: causal, with scores that are not scaled; every other layer sees a window, which its own forward adds."""

from typing import Any

import torch
from transformers import Cache
from transformers.masking_utils import and_masks, sliding_window_overlay
from transformers.models.gpt_neo import modeling_gpt_neo

from attn_plugins.hf.adapters import attend, slotted
from attn_plugins.hf.masks.mask_function import LazyMask

FAMILIES = ("gpt_neo",)


class GPTNeoSelfAttention(modeling_gpt_neo.GPTNeoSelfAttention):
    @property
    def layer_idx(self) -> int | None:
        return self.layer_id

    @property
    def sliding_window(self) -> int | None:
        return self.config.window_size if self.attention_type == "local" else None

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_id)
        if self.sliding_window is not None:
            attention_mask = _windowed(attention_mask, self.sliding_window)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=1.0,
            dropout=self.attn_dropout.p,
            output_attentions=output_attentions,
        )
        return self.resid_dropout(self.out_proj(out.flatten(2))), weights


class GPTNeoFlashAttention2(modeling_gpt_neo.GPTNeoFlashAttention2):
    layer_idx = GPTNeoSelfAttention.layer_idx
    sliding_window = GPTNeoSelfAttention.sliding_window
    forward = GPTNeoSelfAttention.forward


def _windowed(mask: Any, window: int) -> LazyMask:
    if not isinstance(mask, LazyMask):
        raise ValueError(
            f"layers of GPT-Neo with a window need a mask of padding, (B, N), got one of type {type(mask).__name__}; "
            "choose other modules with layers"
        )

    def build() -> LazyMask:
        return mask._copy(ruled=True, rule=and_masks(mask.arguments["mask_function"], sliding_window_overlay(window)))

    return mask.cached(("window", window), build)
