from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import AttentionConfig, sink_tokens
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.strided import Fixed
from attn_plugins.ops.softmax.patterns.with_first import with_first


@register_attention("fixed")
class FixedAttention(PatternAttention):
    """Sparse Transformer, fixed: a query's own block, and the last few positions of every block, which sum it up.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j that the mask shows and that have
    ``floor(j / stride) == floor(i / stride)`` or ``j % stride >= stride - num_summary_columns`` or ``j <
    num_sink_tokens``. With ``num_local_blocks`` above 1 the blocks before the query's own are seen whole too, and as
    many after it where the mask is not causal. Positions count from the first real token of a row or packed segment.

    The paper has no sinks, which keep a pretrained model usable untrained. It lets heads or layers alternate between
    the two sets of keys, or merges them, and may give each head summary columns of its own; here every head sees both,
    and the same columns.

    Limit case: equals softmax attention when stride >= K.
    """

    family = "sparse"
    cost = "O(N (stride num_local_blocks + N num_summary_columns / stride + num_sink_tokens) D)"
    paper = "Child et al. 2019, Generating Long Sequences with Sparse Transformers, arXiv:1904.10509"
    when = "For text without a period, where the ends of blocks can learn to sum up what came before."
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    symbolic_length = True
    limit: ClassVar = {"stride": 50}
    examples = (
        {"stride": 5, "num_summary_columns": 1, "num_sink_tokens": 0},
        {"stride": 4, "num_summary_columns": 2, "num_local_blocks": 2, "num_sink_tokens": 3},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        stride: int = 128
        """Tokens of a block."""
        num_local_blocks: int = 1
        """Blocks that a query sees whole, up to and including its own."""
        num_summary_columns: int = 8
        """Last positions of each block that are seen from everywhere."""
        num_sink_tokens: int | None = field(default=None, metadata={"settled": sink_tokens, "before": 0})
        """First real tokens of a row or packed segment that every later query sees too; None is 4 in causal models, and
        elsewhere as many as stand first, such as [CLS] and registers."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.stride >= 1, "stride", "an integer from 1 on")
            self.require(self.num_local_blocks >= 1, "num_local_blocks", "an integer from 1 on")
            self.require(
                1 <= self.num_summary_columns <= self.stride, "num_summary_columns", "an integer from 1 to stride"
            )
            self.require((self.num_sink_tokens or 0) >= 0, "num_sink_tokens", "None or an integer from 0 on")

    def patterns(self, heads, mask, grid_size=None):
        config = self.config
        pattern = Fixed(config.stride, config.num_local_blocks - 1, config.num_summary_columns)
        return [(slice(0, heads), with_first(pattern, config.num_sink_tokens))]
