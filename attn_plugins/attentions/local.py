from dataclasses import dataclass
from typing import ClassVar

import torch

from attn_plugins.attention import Attention, AttentionConfig
from attn_plugins.ops.banded import banded_attention, in_window, is_sink
from attn_plugins.ops.dense import dense_attention
from attn_plugins.registry import register_attention


@register_attention("local")
class LocalAttention(Attention):
    """Sliding window plus sink tokens: softmax attention over the nearest keys and the first few of the sequence.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j that the mask shows and that have
    ``i - window_size < j <= i`` (``|i - j| < window_size`` where the mask is not causal) or are among the first
    ``num_sink_tokens`` real tokens of their row or packed segment. Sinks are what keeps a model that was pretrained
    with full attention usable without training. A mask of the model's own (its sliding window, a prefix, image
    blocks) is evaluated on the band only.

    Limit case: equals softmax attention when window_size >= K.
    """

    family = "local"
    cost = "O(N (window_size + num_sink_tokens) D)"
    paper = "Beltagy et al. 2020, Longformer, arXiv:2004.05150; sinks: Xiao et al. 2023, arXiv:2309.17453"
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = True
    limit: ClassVar = {"window_size": 50}
    examples = (
        {"window_size": 5},
        {"window_size": 1},
        {"window_size": 4, "num_sink_tokens": 3},
        {"window_size": 2, "num_sink_tokens": 6},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        window_size: int = 256
        """Keys that a query sees up to and including itself; as many after it where the mask is not causal."""
        num_sink_tokens: int = 0
        """First real tokens of a row or packed segment that every later query sees too."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.window_size >= 1, "window_size", "an integer from 1 on")
            self.require(self.num_sink_tokens >= 0, "num_sink_tokens", "an integer from 0 on")

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        i = torch.arange(mask.q_length, device=q_BHQD.device).view(1, -1, 1)
        j = torch.arange(mask.kv_length, device=q_BHQD.device).view(1, 1, -1)
        pattern = in_window(mask, i, j, self.config.window_size) | is_sink(mask, j, self.config.num_sink_tokens)
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense() & pattern.unsqueeze(1), **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        pattern = {"window_size": self.config.window_size, "num_sink_tokens": self.config.num_sink_tokens}
        return banded_attention(q_BHQD, k_BGKD, v_BGKV, mask, **pattern, **options)
