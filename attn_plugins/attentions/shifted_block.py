from dataclasses import dataclass, field

from attn_plugins.core.attention import AttentionConfig, sink_tokens
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.band import BlockBand
from attn_plugins.ops.softmax.patterns.with_first import with_first


@register_attention("shifted_block")
class ShiftedBlockAttention(PatternAttention):
    """LongLoRA's S2 attention: blocks in half of the heads, shifted by half a block in the others, and sink tokens.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j that the mask shows and that are in the query's
    group: ``floor(j / group_size) == floor(i / group_size)`` in the first half of the heads, and the same of
    ``j + group_size // 2`` and ``i + group_size // 2`` in the second half, and over those among the first
    ``num_sink_tokens``. Positions count from the first real token of a row or packed segment. Information passes from
    group to group through the heads that are shifted.

    Deviations from the published code: it has no sinks, which keep a pretrained model usable untrained; the shifted
    heads' first group is half a group, where the code rolls the sequence around, so that its first tokens see the last
    ones; ``group_size`` is a number of tokens (2048 in the paper's training on 8192, ``group_size_ratio`` 1/4), since
    with a ratio each generated token would move the groups.
    The paper trains with it and decodes with full attention: give the trained model no flag for that.

    Limit case: none, the second half of the heads splits every group.
    """

    family = "local"
    cost = "O(N (group_size + num_sink_tokens) D)"
    paper = "Chen et al. 2023, LongLoRA, arXiv:2309.12307"
    when = "For fine-tuning to a longer context at little cost, going back to full attention afterwards."
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    symbolic_length = True
    heads_alike, head_weights = False, ()
    examples = ({"group_size": 6, "num_sink_tokens": 0}, {"group_size": 5, "num_sink_tokens": 2})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        group_size: int = 512
        """Tokens of a group."""
        num_sink_tokens: int | None = field(default=None, metadata={"settled": sink_tokens, "before": 0})
        """First real tokens of a row or packed segment that every later query sees too; None is 4 in causal models, and
        elsewhere as many as stand first, such as [CLS] and registers."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.group_size >= 2, "group_size", "an integer from 2 on")
            self.require((self.num_sink_tokens or 0) >= 0, "num_sink_tokens", "None or an integer from 0 on")

    def patterns(self, heads, mask, grid_size=None):
        size, first, total = self.config.group_size, 0, heads
        if self.heads is not None and self.heads.all_heads is not None:
            first, total = self.heads.first_head, self.heads.all_heads
        half = min(max(total // 2 - first, 0), heads)
        halves = [(slice(0, half), BlockBand(size)), (slice(half, heads), BlockBand(size, shift=size // 2))]
        return [
            (part, with_first(band, self.config.num_sink_tokens)) for part, band in halves if part.stop > part.start
        ]
