from typing import ClassVar

from attn_plugins.core.attention import Attention
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.parts.gathered import with_all_keys
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.softmax.whole import whole_attention


@register_attention("softmax")
class SoftmaxAttention(Attention):
    """Dense softmax attention through the slot: what a pretrained model computes, the baseline of every comparison.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the visible keys. It runs torch's scaled_dot_product_attention
    wherever that supports the call, and the dense oracle where it cannot (softcap, learned sinks). It supports every
    mask and extra, so it tells what going through the slot costs and changes by itself: nothing.

    Limit case: equals the model's own attention, always.
    """

    family = "dense"
    cost = "O(N^2 D)"
    paper = "Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762, eq. 1"
    when = "As the baseline of a comparison, and in a hybrid for the layers that have to stay exact."
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = sinks = dropout = True
    unwritten_keys = in_parts = True
    symbolic_length = True
    subquadratic = False
    limit: ClassVar = {}

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, **options):
        return whole_attention(q_BHQD, k_BGKD, v_BGKV, **options)

    def attend_part(self, q_BHTD, k_BGTD, v_BGTV, *, part, mask, **options):
        k_BGKD, v_BGKV, mask = with_all_keys(k_BGTD, v_BGTV, part)
        return self.attend(q_BHTD, k_BGKD, v_BGKV, mask=mask, **options)
