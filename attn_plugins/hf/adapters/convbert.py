"""ConvBERT: half of the features by attention as BERT's, half by a convolution whose kernels follow from the tokens.

The attention is exchanged, the convolution stays as it is.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.convbert import modeling_convbert

from attn_plugins.hf.adapters import attend_as_bert, slotted

FAMILIES = ("convbert",)


class ConvBertSelfAttention(modeling_convbert.ConvBertSelfAttention):
    is_causal = False

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, weights = attend_as_bert(
            self, hidden_states, attention_mask, source=encoder_hidden_states, output_attentions=output_attentions
        )
        return torch.cat([out, self._convolved(hidden_states)], dim=-1), weights

    def _convolved(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, heads * D): each token's weighted sum of the tokens around it, with a kernel a head."""
        size, heads = self.conv_kernel_size, (self.num_attention_heads, self.attention_head_size)
        keys = self.key_conv_attn_layer(hidden_states.transpose(1, 2)).transpose(1, 2)
        kernels = self.conv_kernel_layer(keys * self.query(hidden_states)).unflatten(-1, (-1, size)).softmax(dim=-1)
        values = nn.functional.pad(self.conv_out_layer(hidden_states), (0, 0, (size - 1) // 2, (size - 1) // 2))
        around = values.unfold(1, size, 1).unflatten(2, heads)
        return (around @ kernels.unsqueeze(-1)).squeeze(-1).flatten(2)
