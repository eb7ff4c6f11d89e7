"""GroupViT: over patches and groups of them, or over text, in a module that names its parts as BART's does."""

from typing import Any

import torch
from transformers.models.groupvit import modeling_groupvit

from attn_plugins.hf.adapters import attend_as_bart, slotted

FAMILIES = ("groupvit",)


class GroupViTAttention(modeling_groupvit.GroupViTAttention):
    layer_idx = None  # it has no cache

    @property
    def scaling(self) -> float:
        return self.scale

    @slotted
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The groups that it assigns patches to are chosen elsewhere, by a softmax over groups."""
        source = encoder_hidden_states
        return attend_as_bart(self, hidden_states, source, None, attention_mask, output_attentions=output_attentions)
