import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from attn_plugins.core.attention import Attention
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.reference import dense_attention, expand_heads
from attn_plugins.ops.softmax.patterns.all_pairs import AllPairs


@register_attention("softmax_plus_one")
class SoftmaxPlusOneAttention(Attention):
    """Softmax attention with one more in the denominator, so that a head may attend to nothing.

    ``w_ij = exp(s_ij) / (1 + sum_j exp(s_ij))``, ``out_i = sum_j w_ij v_j`` over the visible keys, with the model's own
    scores s, softcapped and biased as they come. It is a sink of logit 0 and no value, beside the model's own sinks
    where it has some (gpt-oss).

    In effect a key and a value of zero go first: with a query of zero before the others, torch's fused attention serves
    the causal and the bidirectional case without an N x N tensor. Padding, other masks, a bias, a softcap and sinks
    cost what they cost with softmax attention.

    Nothing is learned. It starts from the pretrained scores, each output shrunk by the share of the 1, which is small
    where many keys are visible or some scores are large; the model did not learn with it.

    Limit case: none.
    """

    family = "dense"
    cost = "O(N^2 D)"
    paper = "Miller 2023, Attention Is Off By One, https://www.evanmiller.org/attention-is-off-by-one.html"
    when = (
        "Where a head should be able to attend to nothing, such as against outliers before quantisation; near "
        "the model's own at the start."
    )
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = sinks = dropout = True
    unwritten_keys = True
    symbolic_length = True
    convex = False
    subquadratic = False

    def by_rules(self, q_BHQD, k_BGKD, mask, *, rotary=None, grid_size=None, sinks=None):
        return q_BHQD, k_BGKD, [(slice(0, q_BHQD.shape[1]), AllPairs())], self._with_one(q_BHQD, sinks)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, sinks=None, **options):
        sinks_H = self._with_one(q_BHQD, sinks)
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), sinks=sinks_H, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, position_bias=None, softcap=None, sinks=None):
        if softcap is not None or sinks is not None:
            options = {"scale": scale, "dropout": dropout, "position_bias": position_bias, "softcap": softcap}
            sinks_H = self._with_one(q_BHQD, sinks)
            return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), sinks=sinks_H, **options)[0]
        k_BGKD, v_BGKV = (pad(x, (0, 0, 1, 0)) for x in (k_BGKD, v_BGKV))
        dense_free = mask.plain and not mask.row_starts and position_bias is None
        if dense_free and (not mask.causal or mask.q_length == mask.kv_length or mask.q_length == 1):
            how = {"dropout_p": dropout, "scale": scale, "enable_gqa": q_BHQD.shape[1] != k_BGKD.shape[1]}
            if not mask.causal or mask.q_length == 1:
                return scaled_dot_product_attention(q_BHQD, k_BGKD, v_BGKV, **how)
            q_BHQD = pad(q_BHQD, (0, 0, 1, 0))
            return scaled_dot_product_attention(q_BHQD, k_BGKD, v_BGKV, is_causal=True, **how)[:, :, 1:]
        k_BHKD, v_BHKV = expand_heads(k_BGKD, q_BHQD.shape[1]), expand_heads(v_BGKV, q_BHQD.shape[1])
        bias = allowed = mask.dense()
        outside: float = True
        if position_bias is not None:
            bias = torch.where(allowed, position_bias.to(q_BHQD.dtype), torch.finfo(q_BHQD.dtype).min)
            outside = 0.0
        bias = pad(bias, (1, 0), value=outside)
        return scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKV, attn_mask=bias, dropout_p=dropout, scale=scale)

    @staticmethod
    def _with_one(q_BHQD, sinks):
        """Logits of the sinks, (H,): log(exp(sink) + 1), or log 1 where the model has none."""
        return q_BHQD.new_zeros(q_BHQD.shape[1]) if sinks is None else torch.nn.functional.softplus(sinks)
