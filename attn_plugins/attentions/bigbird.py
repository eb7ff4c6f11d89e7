from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import AttentionConfig
from attn_plugins.core.options import LARGEST_SEED
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.planned_blocks import counted_blocks, planned_blocks
from attn_plugins.ops.softmax.patterns.random_blocks import RandomBlocks


@register_attention("bigbird")
class BigBirdAttention(PatternAttention):
    """BigBird: global blocks, a sliding window of blocks, and random blocks.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j that the mask shows and whose block is one of the
    first ``num_global_blocks``, one of ``num_sliding_window_blocks`` around the query's own, or one of
    ``num_random_blocks`` drawn for the query's block from the rest of the row. Queries of global blocks see everything.
    Where the mask is causal, the window ends with the query's own block and random blocks are drawn from those before
    it. Positions count from the first real token of a row or packed segment.

    What is drawn depends on ``seed``, the number of the query's block and, where not causal, the number of blocks of
    the row: it is the same in every layer and head, in every process, and after a reload.

    Deviations from the published code: the last block is not global (where it is depends on the length); heads share
    one draw; a row may have any length.

    In BigBird models it is the pretrained function: the last block is global too, the model draws the blocks, for each
    head in training and none in evaluation, where the first block counts once more for each of them, and rows that are
    so short that the model attends to all of them are attended to whole.

    Limit case: equals softmax attention when block_size >= K.
    """

    family = "sparse"
    cost = "O(N block_size (num_global_blocks + num_sliding_window_blocks + num_random_blocks) D)"
    paper = "Zaheer et al. 2020, Big Bird, arXiv:2007.14062"
    when = "For long documents where a window alone has too short a reach and no training is to choose the far keys."
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    limit: ClassVar = {"block_size": 50}
    examples = (
        {"block_size": 3, "num_random_blocks": 1, "num_sliding_window_blocks": 1},
        {"block_size": 2, "num_random_blocks": 2, "num_global_blocks": 2, "seed": 5},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        block_size: int | None = field(default=None, metadata={"settled": lambda prefix: 64})
        """Tokens of a block; None is 64, and in BigBird models their own."""
        num_random_blocks: int | None = field(default=None, metadata={"settled": lambda prefix: 3})
        """Blocks drawn for each block of queries; None is 3, and in BigBird models their own."""
        num_global_blocks: int = 1
        """First blocks of a row or packed segment that see, and are seen by, all others."""
        num_sliding_window_blocks: int = 3
        """Blocks of the window, the query's own in the middle; the last of them where the mask is causal."""
        seed: int = field(default=0, metadata={"largest": LARGEST_SEED})
        """Which blocks are drawn."""

        def __post_init__(self):
            super().__post_init__()
            window = self.num_sliding_window_blocks
            self.require(self.block_size is None or self.block_size >= 1, "block_size", "None or an integer from 1 on")
            self.require((self.num_random_blocks or 0) >= 0, "num_random_blocks", "None or an integer from 0 on")
            self.require(self.num_global_blocks >= 0, "num_global_blocks", "an integer from 0 on")
            self.require(window >= 1 and window % 2 == 1, "num_sliding_window_blocks", "an odd integer from 1 on")
            self.require(self.seed >= 0, "seed", "an integer from 0 to 2**63 - 1")

    def place(self, q_BHQD, k_BGKD, mask, rotary):
        own = self._own(mask)
        return (q_BHQD, k_BGKD) if own is None else counted_blocks(q_BHQD, k_BGKD, own)

    def patterns(self, heads, mask, grid_size=None):
        c, own = self.config, self._own(mask)
        if own is not None:
            return planned_blocks(own, heads, mask.kv_length)
        window, drawn = c.num_sliding_window_blocks, c.num_random_blocks
        return [(slice(0, heads), RandomBlocks(c.block_size, c.num_global_blocks, window, drawn, c.seed))]

    def _own(self, mask):
        """The blocks of a BigBird model, where the options are its own."""
        own, c = None if mask.own is None else mask.own.blocks, self.config
        its = own is not None and (own.block_size, own.num_random_blocks, 1, 3)
        return (
            own
            if its == (c.block_size, c.num_random_blocks, c.num_global_blocks, c.num_sliding_window_blocks)
            else None
        )
