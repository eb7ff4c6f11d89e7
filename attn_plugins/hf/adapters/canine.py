"""CANINE: bidirectional, over characters, first in chunks that see nothing else, and over what is downsampled of them.

Chunks are told as texts in a row are. Of a module with chunks the model itself gives the weights of the first alone.
"""

from typing import Any

import torch
from transformers.models.canine import modeling_canine

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("canine",)


class CanineAttention(modeling_canine.CanineAttention):
    is_causal = False

    @property
    def num_attention_heads(self) -> int:
        return self.self.num_attention_heads

    @property
    def attention_head_size(self) -> int:
        return self.self.attention_head_size

    @property
    def cannot(self) -> str | None:
        sizes = {getattr(self, f"attend_{end}_chunk_{of}") for end in ("from", "to") for of in ("width", "stride")}
        if self.local and (
            len(sizes) > 1 or self.always_attend_to_first_position or self.first_position_attends_to_all
        ):
            return "its chunks overlap, or see the first token too"
        return None

    @slotted
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, output_attentions: bool | None = False
    ) -> tuple[torch.Tensor | None, ...]:
        inner = self.self

        def heads(project: torch.nn.Module) -> torch.Tensor:
            return project(hidden_states).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)

        query = heads(inner.query)
        if self.local:
            attention_mask, blank = self._chunked(attention_mask)
            query = query.masked_fill(blank[:, None, :, None], 0.0)
        out, weights = attend(
            self,
            query,
            heads(inner.key),
            heads(inner.value),
            attention_mask,
            dropout=inner.dropout.p,
            output_attentions=bool(output_attentions),
        )
        out = self.output(out.flatten(2), hidden_states)
        return (out, weights) if output_attentions else (out,)

    def _chunked(self, mask: torch.Tensor) -> tuple[AttentionMask, torch.Tensor]:
        """Chunks as texts in a row, of a mask (B, N, N) that has the same padding for each query.

        Convolutions bring padding next to what is real, so it matters what becomes of it: in a chunk of nothing else it
        sees all of the chunk, by the same weights. These tokens (B, N) are told too.
        """
        size, length = self.attend_from_chunk_width, mask.shape[-1]
        real_BK = mask[:, 0].bool()
        chunks = torch.arange(length, device=mask.device) // size
        filled = torch.zeros(len(mask), -(-length // size), dtype=torch.long, device=mask.device)
        blank_BK = filled.index_add(1, chunks, real_BK.long())[:, chunks] == 0
        chunked = AttentionMask(
            len(mask),
            length,
            length,
            causal=False,
            padding_BK=real_BK | blank_BK,
            segments_BK=chunks.expand(len(mask), -1) if length > size else None,
            device=mask.device,
        )
        return chunked, blank_BK
