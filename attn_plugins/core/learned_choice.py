"""Attentions whose own weights only choose keys: what they learn from, since a choice has no gradient."""

import abc
from typing import Any

import torch

from attn_plugins.core.attention import Attention
from attn_plugins.core.mask import AttentionMask


class LearnsChoice(Attention, abc.ABC):
    """An attention that chooses keys by scores of its own weights, which get a gradient of zero from its outputs.

    They learn where the model's own attention is at hand: ``attn_plugins.transfer_attention`` brings the softmax of
    :meth:`choice_scores` near the model's own weights, averaged over its query heads.
    """

    @abc.abstractmethod
    def choice_scores(
        self,
        q_BHQD: torch.Tensor,
        k_BGKD: torch.Tensor,
        *,
        mask: AttentionMask,
        scale: float,
        hidden_BQE: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Scores (B, Q, K) of the keys, all of them dense, with a gradient to the weights; -inf for keys out of sight.

        Args:
            options: of the call beside these, as ``reference`` gets them.
        """
