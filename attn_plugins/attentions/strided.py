from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import AttentionConfig, sink_tokens
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.strided import Strided
from attn_plugins.ops.softmax.patterns.with_first import with_first


@register_attention("strided")
class StridedAttention(PatternAttention):
    """Sparse Transformer, strided: the nearest keys, and every ``stride``-th one from the query on.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j that the mask shows and that have
    ``|i - j| < stride num_local_blocks`` or ``(i - j) % stride == 0``, or are among the first ``num_sink_tokens`` real
    tokens of their row or packed segment. With a stride near the root of the length any two tokens are two layers
    apart. For data with a period, such as images (stride = width) or music.

    The paper has no sinks, which keep a pretrained model usable untrained. It lets heads or layers alternate between
    the two sets of keys, or merges them; here each head sees both.

    Limit case: equals softmax attention when stride >= K.
    """

    family = "sparse"
    cost = "O(N (stride num_local_blocks + N / stride + num_sink_tokens) D)"
    paper = "Child et al. 2019, Generating Long Sequences with Sparse Transformers, arXiv:1904.10509"
    when = "For data with a period, such as rows of pixels or beats of music."
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    symbolic_length = True
    limit: ClassVar = {"stride": 50}
    examples = ({"stride": 5, "num_sink_tokens": 0}, {"stride": 3, "num_local_blocks": 2, "num_sink_tokens": 2})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        stride: int = 128
        """Distance between the far keys, best near the root of the length."""
        num_local_blocks: int = 1
        """The near keys, in strides."""
        num_sink_tokens: int | None = field(default=None, metadata={"settled": sink_tokens, "before": 0})
        """First real tokens of a row or packed segment that every later query sees too; None is 4 in causal models, and
        elsewhere as many as stand first, such as [CLS] and registers."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.stride >= 1, "stride", "an integer from 1 on")
            self.require(self.num_local_blocks >= 1, "num_local_blocks", "an integer from 1 on")
            self.require((self.num_sink_tokens or 0) >= 0, "num_sink_tokens", "None or an integer from 0 on")

    def patterns(self, heads, mask, grid_size=None):
        config = self.config
        pattern = Strided(config.stride * config.num_local_blocks, config.stride)
        return [(slice(0, heads), with_first(pattern, config.num_sink_tokens))]
