from dataclasses import dataclass
from typing import ClassVar

import torch

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.softmax.tile_engine import topk_mask, topk_threshold
from attn_plugins.ops.softmax.topk import batched_topk_attention, tie_stable_scores, topk_attention


@register_attention("topk")
class TopkAttention(Attention):
    """Exact top-k: softmax attention over those visible keys whose scores are a query's ``topk`` highest.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j chosen for query i, each head by itself, by the
    scores as the softmax takes them, softcap and bias included; of keys with equal scores the earlier ones. The choice
    has no gradient. Learned sinks are no candidates and always in the denominator.

    Every score is computed, so it saves no time: it is what sparse methods with the same number of keys can reach at
    best, to compare them with. Queries are treated a tile at a time, forward and backward, so memory is not quadratic.
    For the backward, which computes scores again, one number a query is kept: the lowest score chosen.

    Limit case: equals softmax attention when topk >= K.
    """

    family = "sparse"
    cost = "O(N^2 D), memory O(N)"
    paper = "Gupta et al. 2021, Memory-efficient Transformers via Top-k Attention, arXiv:2106.06899"
    when = "As the yardstick: what a sparse method with so many keys could reach at best. It saves no time."
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = sinks = dropout = True
    limit: ClassVar = {"topk": 50}
    examples = ({"topk": 5}, {"topk": 1})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        topk: int = 64
        """Keys that a query sees."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.topk >= 1, "topk", "an integer from 1 on")

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        extras = {name: options[name] for name in ("scale", "position_bias", "softcap") if name in options}
        with torch.no_grad():
            s_BHQK = tie_stable_scores(q_BHQD, k_BGKD, **extras).masked_fill(~mask.dense(), -torch.inf)
            chosen = topk_mask(s_BHQK, topk_threshold(s_BHQK, self.config.topk), self.config.topk)
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, chosen, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return topk_attention(q_BHQD, k_BGKD, v_BGKV, mask, topk=self.config.topk, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return batched_topk_attention(q_BHQD, k_BGKD, v_BGKV, mask, topk=self.config.topk, **options)
