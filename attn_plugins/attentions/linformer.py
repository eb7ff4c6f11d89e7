from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.low_rank.linformer import dense_linformer_attention, linformer_attention


@register_attention("linformer")
class LinformerAttention(Attention):
    """Linformer: softmax attention over a fixed number of mixtures of the keys and of the values.

    ``out_i = sum_p softmax_p(scale q_i . (E k)_p) (F v)_p``, where E and F, of ``projected_length`` rows and
    ``max_length`` columns, are learned for each key/value head, or shared by all. A column belongs to a position,
    counted from the first real token of a row; padding is mixed in with weight 0.

    The positions are cut into ``projected_length`` runs of about equal length. E and F are kept as what is added to the
    averages over these runs, and that starts from zero: softmax attention over the mean key and value of every
    ``max_length / projected_length`` neighbours. Weights that decay go back there.

    What the paper leaves open for texts shorter than ``max_length``: a run that a row has no token of takes no part,
    instead of with a score of 0 and a value of zero; a run that a row fills in part is scaled up by the share that is
    missing, so that at the start it is the average over the tokens that there are.

    Limit case: equals softmax attention at its start, before training, when projected_length = max_length >= K.
    """

    family = "low_rank"
    cost = "O(N projected_length D)"
    paper = "Wang et al. 2020, Linformer: Self-Attention with Linear Complexity, arXiv:2006.04768, eq. 7"
    when = "For encoders with a known greatest length that will be trained."
    bidirectional = cross = dropout = True
    convex = False
    any_length = False
    limit: ClassVar = {"max_length": 50, "projected_length": 50}
    examples = ({"max_length": 150, "projected_length": 8}, {"max_length": 160, "projected_length": 60})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        max_length: int = 512
        """Longest text that it serves, in tokens; there are weights for each position."""
        projected_length: int = 128
        """Mixtures that stand for the keys and values, k in the paper."""
        share_heads: bool = False
        """One E and one F for all heads of a layer, instead of for each key/value head."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.max_length >= 1, "max_length", "an integer from 1 on")
            allowed = f"an integer from 1 to max_length={self.max_length}"
            self.require(1 <= self.projected_length <= self.max_length, "projected_length", allowed)

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'linformer' has weights a head and needs the sizes of the heads, got None")
        self.head_weights = () if config.share_heads else ("*",)
        shape = (1 if config.share_heads else heads.num_key_value_heads, config.projected_length, config.max_length)
        self.key_weight = nn.Parameter(torch.empty(shape))
        self.value_weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.key_weight)
        nn.init.zeros_(self.value_weight)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        weights = self.key_weight, self.value_weight
        return dense_linformer_attention(q_BHQD, k_BGKD, v_BGKV, mask, weights, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        weights = self.key_weight, self.value_weight
        return linformer_attention(q_BHQD, k_BGKD, v_BGKV, mask, weights, **options)
