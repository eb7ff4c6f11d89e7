from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.query_chunks import visible_pairs
from attn_plugins.ops.reference import accumulation_dtype
from attn_plugins.ops.softmax.predicted_window import dense_window, spans, windowed


@register_attention("luong_local")
class LuongLocalAttention(Attention):
    """Luong's local attention: a window of keys around a place that each query predicts, weighed less far from it.

    ``p_i = S sigmoid(u^T tanh(W q_i))``, ``w_ij = softmax_j(s_ij) exp(-(j - p_i)^2 / (2 sigma^2))`` over the visible
    keys with ``|j - p_i| <= half_window``, ``sigma = half_window / 2``, ``out_i = sum_j w_ij v_j``, with the model's
    own scores s. Keys are counted from 0, at the first real one of their row or packed segment, and S is how many there
    are. W and u are learned for each query head; q is what the module makes of its hidden states, with rotary positions
    where it has some.

    ``center="monotonic"`` is the paper's local-m: ``p_i`` is the query's own place, without the Gaussian. What place a
    query has beside the keys of another sequence no cache tells, so there it is refused.

    A query's window is gathered, so that cost and memory go by it. p has its gradient through the Gaussian.

    Limit case: none.
    """

    family = "local"
    cost = "O(N half_window D)"
    paper = (
        "Luong et al. 2015, Effective Approaches to Attention-based Neural Machine Translation, arXiv:1508.04025, eq. "
        "9 and 10"
    )
    when = (
        "With training, in cross-attention of texts that say the same in about the same order: translation, speech, "
        "reading aloud."
    )
    bidirectional = cross = segments = position_bias = softcap = dropout = True
    head_weights = ("*",)
    convex = False
    examples = ({"half_window": 3, "hidden_dim": 4, "chunk_size": 8},)

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        half_window: int = 10
        """Keys on either side of the centre, the paper's D; the Gaussian's deviation is half of it."""
        center: Literal["predicted", "monotonic"] = "predicted"
        """Where a window lies: as the query predicts (local-p), or at the query's own place (local-m)."""
        hidden_dim: int = 32
        """Units of the prediction, for each query head."""
        chunk_size: int = 64
        """Queries treated at a time on a CPU; memory grows with it and the result does not change."""

        def __post_init__(self):
            super().__post_init__()
            for name in ("half_window", "hidden_dim", "chunk_size"):
                self.require(getattr(self, name) >= 1, name, "an integer from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        self.predicts = config.center == "predicted"
        if self.predicts:
            if heads is None:
                raise ValueError(
                    "attention 'luong_local' has weights a head and needs the sizes of the heads, got None"
                )
            self.place_weight = nn.Parameter(torch.empty(heads.num_heads, config.hidden_dim, heads.head_dim))
            self.place_vector = nn.Parameter(torch.empty(heads.num_heads, config.hidden_dim))
            self.reset_parameters()

    def reset_parameters(self):
        if self.predicts:
            for weight in (self.place_weight, self.place_vector):
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        visible = visible_pairs(mask, slice(0, mask.q_length), slice(0, mask.kv_length))
        return dense_window(q_BHQD, k_BGKD, v_BGKV, visible, self._centre(q_BHQD, mask), **self._shape(), **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return self._windowed(q_BHQD, k_BGKD, v_BGKV, mask, self.config.chunk_size, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return self._windowed(q_BHQD, k_BGKD, v_BGKV, mask, None, **options)

    def _windowed(self, q_BHQD, k_BGKD, v_BGKV, mask, chunk_size, **options):
        how = {**self._shape(), "chunk_size": chunk_size, **options}
        return windowed(q_BHQD, k_BGKD, v_BGKV, mask, self._centre(q_BHQD, mask), **how)

    def _shape(self):
        return {"half_window": self.config.half_window, "gaussian": self.predicts}

    def _centre(self, q_BHQD, mask):
        """p_BHQ, by the index of keys."""
        dtype = accumulation_dtype(q_BHQD)
        if not self.predicts:
            if mask.cross:
                raise ValueError(
                    "attention 'luong_local' with center='monotonic' needs the places of queries among the keys, which "
                    "nothing tells in cross-attention; allowed there: center='predicted'"
                )
            own = torch.arange(mask.q_length, device=q_BHQD.device, dtype=dtype) + mask.keys_before
            return own.expand(1, q_BHQD.shape[1], -1)
        first, size = (x.to(device=q_BHQD.device, dtype=dtype).unsqueeze(1) for x in spans(mask))
        made = torch.tanh(q_BHQD.to(dtype) @ self.place_weight.to(dtype).transpose(1, 2))
        return first + size * torch.sigmoid((made * self.place_vector.to(dtype).unsqueeze(1)).sum(dim=3))
