from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.core.attention import Attention
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.parts.gathered import with_all_keys
from attn_plugins.ops.reference import dense_attention, expand_heads


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

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, position_bias=None, softcap=None, sinks=None):
        if softcap is not None or sinks is not None:
            options = {"scale": scale, "dropout": dropout, "position_bias": position_bias, "softcap": softcap}
            return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), sinks=sinks, **options)[0]
        dense_free = mask.plain and not mask.row_starts and position_bias is None
        if dense_free and (not mask.causal or mask.q_length == mask.kv_length or mask.q_length == 1):
            how = {"is_causal": mask.causal and mask.q_length > 1, "enable_gqa": q_BHQD.shape[1] != k_BGKD.shape[1]}
            return scaled_dot_product_attention(q_BHQD, k_BGKD, v_BGKV, dropout_p=dropout, scale=scale, **how)
        k_BHKD, v_BHKV = expand_heads(k_BGKD, q_BHQD.shape[1]), expand_heads(v_BGKV, q_BHQD.shape[1])
        allowed = mask.dense()
        if position_bias is None:
            return scaled_dot_product_attention(
                q_BHQD, k_BHKD, v_BHKV, attn_mask=allowed, dropout_p=dropout, scale=scale
            )
        bias = torch.where(allowed, position_bias.to(q_BHQD.dtype), torch.finfo(q_BHQD.dtype).min)
        out_BHQV = scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKV, attn_mask=bias, dropout_p=dropout, scale=scale)
        return out_BHQV * allowed.any(dim=-1, keepdim=True)

    def attend_part(self, q_BHTD, k_BGTD, v_BGTV, *, part, mask, **options):
        k_BGKD, v_BGKV, mask = with_all_keys(k_BGTD, v_BGTV, part)
        return self.attend(q_BHTD, k_BGKD, v_BGKV, mask=mask, **options)
