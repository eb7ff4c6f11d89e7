"""Images, in modules that name their parts as BERT's does."""

from typing import Any

import torch
from transformers.models.data2vec import modeling_data2vec_vision
from transformers.models.mobilevit import modeling_mobilevit

from attn_plugins.hf.adapters import attend_as_bert, slotted

FAMILIES = ("data2vec", "mobilevit")


class Data2VecVisionSelfAttention(modeling_data2vec_vision.Data2VecVisionSelfAttention):
    is_causal = False

    @property
    def adds_position_bias(self) -> bool:
        return self.has_relative_position_bias or self.config.use_shared_relative_position_bias

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        output_attentions: bool = False,
        relative_position_bias: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """With a bias of its own, one that all layers share, or none, of how far patches are apart."""
        biases = [] if relative_position_bias is None else [relative_position_bias]
        if self.has_relative_position_bias:
            assert resolution is not None
            size: Any = self.config.patch_size
            grid = tuple(side // size for side in resolution)
            own = self.relative_position_bias(grid, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
            biases.append(own)
        bias = sum(biases[1:], start=biases[0]) if biases else None
        out, weights = attend_as_bert(
            self, hidden_states, None, position_bias=bias, output_attentions=output_attentions
        )
        return (out, weights) if output_attentions else (out,)


class Data2VecVisionSdpaSelfAttention(modeling_data2vec_vision.Data2VecVisionSdpaSelfAttention):
    is_causal = False
    adds_position_bias = Data2VecVisionSelfAttention.adds_position_bias
    forward = Data2VecVisionSelfAttention.forward


class MobileViTSelfAttention(modeling_mobilevit.MobileViTSelfAttention):
    is_causal = False

    @slotted
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Over the patches at one place of every window."""
        return attend_as_bert(self, hidden_states, None)[0]
