from dataclasses import dataclass

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.softmax.sigmoid import batched_sigmoid_attention, dense_sigmoid_attention, sigmoid_attention


@register_attention("sigmoid")
class SigmoidAttention(Attention):
    """Sigmoid attention: each weight for itself, without a sum over the keys.

    ``out_i = sum_j sigmoid(s_ij + b) v_j`` over the visible keys, with the model's own scores s, softcapped and biased
    as they come. ``b = -log n`` keeps the sum of the weights near 1: softmax attention divides ``exp(s_ij)`` by n times
    the mean of ``exp(s_i.)``, this by n alone while weights are small. The published n is the length; here it is the
    number of keys that query i sees, so that cached decoding equals one pass and padding changes nothing.

    Nothing is learned. It starts from the pretrained scores, and differs from softmax attention by what a query's
    scores have in common, which softmax takes out and this doesn't.

    Time is quadratic in N, memory isn't: weights are formed a tile at a time, and again in the backward.

    Limit case: none.
    """

    family = "dense"
    cost = "O(N^2 D), memory O(N D)"
    paper = "Ramapuram et al. 2024, Theory, Analysis, and Best Practices for Sigmoid Self-Attention, arXiv:2409.04431"
    when = "Where tokens shouldn't compete for weight, with training."
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = dropout = True
    symbolic_length = True
    convex = False
    examples = ({}, {"bias": -2.0})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        bias: float | None = None
        """b, the same for every query; None is minus the logarithm of the number of keys that a query sees."""

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return dense_sigmoid_attention(q_BHQD, k_BGKD, v_BGKV, mask, offset=self.config.bias, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return sigmoid_attention(q_BHQD, k_BGKD, v_BGKV, mask, offset=self.config.bias, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return batched_sigmoid_attention(q_BHQD, k_BGKD, v_BGKV, mask, offset=self.config.bias, **options)
