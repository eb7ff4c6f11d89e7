"""ReLU attention: all that a package needs to add an attention, beside the entry point in pyproject.toml."""

from dataclasses import dataclass

import torch

from attn_plugins import Attention, register_attention
from attn_plugins.core.attention import AttentionConfig
from attn_plugins.ops.reference import expand_heads, scores


@register_attention("relu")
class ReluAttention(Attention):
    """ReLU in place of softmax: ``out_i = sum_j relu(scale q_i . k_j)^power v_j / n_i``, n_i the keys that i sees.

    Limit case: none.
    """

    family = "dense"
    cost = "O(N^2 D)"
    paper = "Wortsman et al. 2023, Replacing softmax with ReLU in Vision Transformers, arXiv:2309.08586"
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = dropout = True
    convex = subquadratic = False
    examples = ({"power": 2},)

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        power: int = 1
        """Exponent of what the ReLU lets through."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.power >= 1, "power", "an integer from 1 on")

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, dropout, **options):
        visible = mask.dense()
        seen = visible.sum(dim=-1, keepdim=True).clamp(min=1)
        weights = scores(q_BHQD, k_BGKD, **options).relu().pow(self.config.power).masked_fill(~visible, 0.0) / seen
        weights = torch.dropout(weights, dropout, train=dropout > 0)
        out = weights @ expand_heads(v_BGKV, q_BHQD.shape[1]).to(weights.dtype)
        return out.to(v_BGKV.dtype), weights

    def attend(self, *tensors, **options):  # a method with a cheaper form puts it here; the tests compare the two
        return self.reference(*tensors, **options)[0]
