from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import AttentionConfig, sink_tokens
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.decode.ring_buffer import KeyWindow, window_attention
from attn_plugins.ops.parts.halo import Reach
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.band import BlockBand
from attn_plugins.ops.softmax.patterns.with_first import with_first
from attn_plugins.ops.softmax.tiles import Pattern


@register_attention("block_local")
class BlockLocalAttention(PatternAttention):
    """Attention within blocks: softmax attention over a query's own block and those beside it, and sink tokens.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j that the mask shows and whose block
    ``floor(j / block_size)`` is the query's own, one of the ``look_backward`` before it or, where the mask is not
    causal, one of the ``look_forward`` after it, or which are among the first ``num_sink_tokens``. Positions count from
    the first real token of a row or packed segment.

    Without sinks, which keep a pretrained model usable untrained, it deviates from the local attention of the Routing
    Transformer in nothing that is causal; blocks there are cut from the left end of a padded row, here from its first
    real token.

    Limit case: equals softmax attention when block_size >= K.
    """

    family = "local"
    cost = "O(N (block_size (1 + look_backward + look_forward) + num_sink_tokens) D)"
    keeps = "num_sink_tokens + (1 + look_backward) block_size keys and values"
    paper = "Parmar et al. 2018, Image Transformer, arXiv:1802.05751; Roy et al. 2021, arXiv:2003.05997"
    when = (
        "Where whole blocks suit the data or the hardware better than a window that slides; a query at the "
        "start of a block sees least."
    )
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    symbolic_length = in_parts = True
    limit: ClassVar = {"block_size": 50}
    examples = (
        {"block_size": 5, "num_sink_tokens": 0},
        {"block_size": 3, "look_backward": 2, "look_forward": 0, "num_sink_tokens": 2},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        block_size: int = 128
        """Tokens of a block."""
        look_backward: int = 1
        """Blocks before its own that a query sees."""
        look_forward: int = 1
        """Blocks after its own that it sees where the mask is not causal."""
        num_sink_tokens: int | None = field(default=None, metadata={"settled": sink_tokens, "before": 0})
        """First real tokens of a row or packed segment that every later query sees too; None is 4 in causal models, and
        elsewhere as many as stand first, such as [CLS] and registers."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.block_size >= 1, "block_size", "an integer from 1 on")
            self.require(self.look_backward >= 0, "look_backward", "an integer from 0 on")
            self.require(self.look_forward >= 0, "look_forward", "an integer from 0 on")
            self.require((self.num_sink_tokens or 0) >= 0, "num_sink_tokens", "None or an integer from 0 on")

    def reach(self, causal):
        config = self.config
        ahead = 0 if causal else (1 + config.look_forward) * config.block_size - 1
        return Reach((1 + config.look_backward) * config.block_size - 1, ahead, config.num_sink_tokens)

    def patterns(self, heads, mask, grid_size=None):
        return [(slice(0, heads), self._pattern())]

    def new_state(self, fixed_length=None):
        before = (1 + self.config.look_backward) * self.config.block_size - 1
        return KeyWindow(self.config.num_sink_tokens, before, fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, **options):
        return window_attention(q_BHQD, k_BGKD, v_BGKV, mask, self._pattern(), state, **options)

    def _pattern(self) -> Pattern:
        blocks = BlockBand(self.config.block_size, self.config.look_backward, self.config.look_forward)
        return with_first(blocks, self.config.num_sink_tokens)
