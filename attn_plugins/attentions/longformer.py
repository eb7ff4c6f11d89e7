import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import AttentionConfig, sink_tokens
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.decode.ring_buffer import KeyWindow, window_attention
from attn_plugins.ops.parts.halo import Reach
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.band import Band


@register_attention("longformer")
class LongformerAttention(PatternAttention):
    """Longformer: a sliding window, and global tokens that see everything and are seen from everywhere.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j that the mask shows and that have
    ``|i - j| < window_size``, or where i or j is among the first ``num_global_tokens`` real tokens of the row or packed
    segment (such as [CLS]). Where the mask is causal, global tokens see what is before them as every token does, and
    the pattern is that of ``local`` with as many sinks.

    Deviations from the paper: global tokens are the first ones, not chosen by the task, and go through the model's own
    projections, not through a second set; so it starts from the pretrained model's weights as they are. The paper's
    window of w counts both sides: it is ``window_size = w / 2 + 1`` here. In Longformer and LED models it is the
    pretrained function: the window is that of each layer, global tokens are those of ``global_attention_mask``, and
    these attend through the model's second set of projections.

    Limit case: equals softmax attention when window_size >= K.
    """

    family = "local"
    cost = "O(N (window_size + num_global_tokens) D)"
    keeps = "num_global_tokens + window_size keys and values"
    paper = "Beltagy et al. 2020, Longformer, arXiv:2004.05150"
    when = "For encoders of long documents with a few tokens, such as the first, that have to see and be seen by all."
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    symbolic_length = in_parts = True
    limit: ClassVar = {"window_size": 50}
    examples = (
        {"window_size": 4, "num_global_tokens": 1},
        {"window_size": 2, "num_global_tokens": 5},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        window_size: int | None = field(default=None, metadata={"settled": lambda prefix: 257})
        """Keys that a query sees up to and including itself; as many after it where the mask is not causal. None is
        257, and in Longformer and LED models each layer's own."""
        num_global_tokens: int | None = field(
            default=None, metadata={"settled": lambda prefix: max(1, sink_tokens(prefix))}
        )
        """First real tokens of a row or packed segment that see, and are seen by, all others; None is 4 in causal
        models, in Longformer and LED models 0, and elsewhere as many as stand first, such as [CLS] and registers, at
        least 1."""

        def __post_init__(self):
            super().__post_init__()
            self.require(
                self.window_size is None or self.window_size >= 1, "window_size", "None or an integer from 1 on"
            )
            self.require((self.num_global_tokens or 0) >= 0, "num_global_tokens", "None or an integer from 0 on")

    def reach(self, causal):
        window = self.config.window_size - 1
        return Reach(window, 0 if causal else window, self.config.num_global_tokens, first_see_all=not causal)

    def patterns(self, heads, mask, grid_size=None):
        marked = mask.own is not None and mask.own.marked_BK is not None
        return [(slice(0, heads), dataclasses.replace(self._pattern(), marked=marked))]

    def new_state(self, fixed_length=None):
        return KeyWindow(self.config.num_global_tokens, self.config.window_size - 1, fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, **options):
        return window_attention(q_BHQD, k_BGKD, v_BGKV, mask, self._pattern(), state, **options)

    def _pattern(self) -> Band:
        number = self.config.num_global_tokens
        return Band(self.config.window_size, self.config.window_size - 1, num_first=number, first_see_all=number > 0)
