"""I-BERT: as BERT, an encoder, while its numbers are not whole ones (quant_mode)."""

from typing import Any

import torch
from transformers.models.ibert import modeling_ibert

from attn_plugins.hf.adapters import attend, slotted

FAMILIES = ("ibert",)


class IBertSelfAttention(modeling_ibert.IBertSelfAttention):
    is_causal = False

    @property
    def cannot(self) -> str | None:
        return "it computes softmax with whole numbers (quant_mode=True)" if self.quant_mode else None

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        hidden_states_scaling_factor: torch.Tensor | None,
        attention_mask: Any = None,
        output_attentions: bool = False,
    ) -> tuple[tuple[torch.Tensor | None, ...], tuple[None, ...]]:
        """The output, and the factors of whole numbers, of which there are none."""

        def heads(project: torch.nn.Module, rounded: torch.nn.Module) -> torch.Tensor:
            made, _ = rounded(*project(hidden_states, hidden_states_scaling_factor))
            return made.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)

        out, weights = attend(
            self,
            heads(self.query, self.query_activation),
            heads(self.key, self.key_activation),
            heads(self.value, self.value_activation),
            attention_mask,
            dropout=self.dropout.p,
            output_attentions=output_attentions,
        )
        out, _ = self.output_activation(out.flatten(2), None)
        return ((out, weights), (None, None)) if output_attentions else ((out,), (None,))
