import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.decode.cache_positions import unrotated
from attn_plugins.ops.decode.gated_keys import GatedKeys
from attn_plugins.ops.reference import accumulation_dtype, dense_attention
from attn_plugins.ops.softmax.patterns.band import query_in_row
from attn_plugins.ops.softmax.whole import whole_attention


@register_attention("length_scaled")
class LengthScaledAttention(Attention):
    """Softmax attention whose scores grow with the logarithm of the position, without rotary positions if asked.

    ``out_i = sum_j softmax_j(scale q_i . k_j log(t_i + a) / log(a)) v_j`` over the visible keys, with t_i the place of
    the query, counted from the first token of its row or packed segment that is not padding, from 0, and a as
    ``log_base``: the more keys, the sharper. The factor is 1 at the start of a text.

    With ``positions="none"`` queries and keys are rotated back by their rotary positions first. These are HyPE's dense
    layers; its linear ones keep rotary positions, as they do here: HyPE is a list of two rules. A pretrained model has
    not learned to do without, so that needs training; scores that are scaled alone start near the model.

    Limit case: equals softmax attention as log_base grows.
    """

    family = "dense"
    cost = "O(N^2 D)"
    keeps = "all keys, without rotary positions if asked, and values"
    paper = "Chen et al. 2026, Hybrid Linear Attention Done Right, arXiv:2601.22156, section 4.1 (HyPE)"
    when = "For the dense layers of a hybrid that is to serve longer texts than it was trained on."
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    subquadratic = False
    limit: ClassVar = {"log_base": 1e30}
    examples = ({"log_base": 4.0}, {})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        log_base: float = 362.0
        """a, above 1: the smaller, the faster scores grow."""
        positions: Literal["rotary", "none"] = "rotary"
        """Rotary positions of queries and keys: as the model has them, or none."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.log_base > 1, "log_base", "a number above 1")

    @property
    def wants_rotary(self):
        return self.config.positions == "none"

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, rotary=None, **options):
        q_BHQD, k_BGKD = self._placed(q_BHQD, k_BGKD, mask, rotary)
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, rotary=None, **options):
        q_BHQD, k_BGKD = self._placed(q_BHQD, k_BGKD, mask, rotary)
        return self._attend(q_BHQD, k_BGKD, v_BGKV, mask=mask, **options)

    def new_state(self, fixed_length=None):
        return GatedKeys(fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, rotary=None, **options):
        q_BHQD, k_BGKD = self._placed(q_BHQD, k_BGKD, mask, rotary)
        state.append(k_BGKD, v_BGKV, v_BGKV.new_zeros(len(v_BGKV), 0, v_BGKV.shape[2]), mask)
        k_BGKD, v_BGKV, _, mask = state.seen_by(mask)
        return self._attend(q_BHQD, k_BGKD, v_BGKV, mask=mask, **options)

    def _attend(self, q_BHQD, k_BGKD, v_BGKV, **options):
        """On a CPU in float32 at least; elsewhere what is scaled is rounded once more in half precision."""
        dtype = accumulation_dtype(q_BHQD) if q_BHQD.device.type == "cpu" else v_BGKV.dtype
        q_BHQD, k_BGKD, wide_BGKV = (x.to(dtype) for x in (q_BHQD, k_BGKD, v_BGKV))
        return whole_attention(q_BHQD, k_BGKD, wide_BGKV, **options).to(v_BGKV.dtype)

    def _placed(self, q_BHQD, k_BGKD, mask, rotary):
        """Queries, scaled, and keys, both without their rotary positions where these are given."""
        if rotary is not None:
            q_BHQD, k_BGKD = unrotated(q_BHQD, k_BGKD, rotary)
        place_BQ = query_in_row(mask, torch.arange(mask.q_length, device=mask.device).unsqueeze(0))
        base = self.config.log_base
        factor_BQ = (place_BQ.clamp(min=0).to(accumulation_dtype(q_BHQD)) + base).log() / math.log(base)
        return q_BHQD * factor_BQ[:, None, :, None], k_BGKD
