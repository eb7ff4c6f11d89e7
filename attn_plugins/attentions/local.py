from dataclasses import dataclass, field
from typing import ClassVar, Literal

from attn_plugins.core.attention import AttentionConfig, sink_tokens
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.decode.cache_positions import within_cache
from attn_plugins.ops.decode.ring_buffer import KeyWindow, window_attention
from attn_plugins.ops.parts.halo import Reach
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.band import Band


@register_attention("local")
class LocalAttention(PatternAttention):
    """Sliding window plus sink tokens: softmax attention over the nearest keys and the first few of the sequence.

    ``out_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the keys j that the mask shows and that have
    ``i - window_size < j <= i`` (up to ``i + look_forward`` where the mask is not causal) or are among the first
    ``num_sink_tokens`` real tokens of their row or packed segment. With ``dilation`` d the window holds as many keys,
    but only every d-th: those with ``(i - j) % d == 0``. Sinks are what keeps a model that was pretrained with full
    attention usable without training. A mask of the model's own (its sliding window, a prefix, image blocks) is
    evaluated on the band only.

    When text is generated, the window and the sinks are all that is kept. ``positions="cache"`` counts rotary positions
    within what is kept, as StreamingLLM does: to a query beyond position ``p = num_sink_tokens + (window_size - 1)
    dilation`` of its row, sinks seem as far away as they are from p, and never further; the window stays as it is.

    Limit case: equals softmax attention when window_size >= K.
    """

    family = "local"
    cost = "O(N (window_size + num_sink_tokens) D)"
    keeps = "num_sink_tokens + (window_size - 1) dilation + 1 keys and values"
    paper = "Beltagy et al. 2020, Longformer, arXiv:2004.05150; sinks: Xiao et al. 2023, arXiv:2309.17453"
    variants = "window, sinks, dilation"
    when = (
        "First of all: with a few sink tokens it needs no training, supports every mask, and its cost grows "
        "with the length alone."
    )
    causal = bidirectional = any_mask = segments = position_bias = softcap = sinks = dropout = True
    symbolic_length = True
    limit: ClassVar = {"window_size": 50}
    examples = (
        {"window_size": 5, "look_forward": 2, "num_sink_tokens": 0},
        {"window_size": 4, "num_sink_tokens": 3},
        {"window_size": 2, "num_sink_tokens": 6, "dilation": 3},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        window_size: int = 256
        """Keys that a query sees up to and including itself."""
        look_forward: int | None = None
        """Keys that it sees after itself where the mask is not causal; None is window_size - 1."""
        dilation: int = 1
        """Distance from one key of the window to the next."""
        num_sink_tokens: int | None = field(default=None, metadata={"settled": sink_tokens})
        """First real tokens of a row or packed segment that every later query sees too; None is 4 in causal models, and
        elsewhere as many as stand first, such as [CLS] and registers."""
        positions: Literal["true", "cache"] = "true"
        """Rotary positions of the sinks: their own, or counted within what a cache keeps (causal attention only)."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.window_size >= 1, "window_size", "an integer from 1 on")
            self.require((self.look_forward or 0) >= 0, "look_forward", "None or an integer from 0 on")
            self.require(self.dilation >= 1, "dilation", "an integer from 1 on")
            self.require((self.num_sink_tokens or 0) >= 0, "num_sink_tokens", "None or an integer from 0 on")

    @property
    def wants_rotary(self):
        return self.config.positions == "cache"

    @property
    def in_parts(self):
        return self.config.positions == "true"

    def reach(self, causal):
        ahead = 0 if causal else self._ahead() * self.config.dilation
        return Reach(self._before(), ahead, self.config.num_sink_tokens)

    def patterns(self, heads, mask, grid_size=None):
        return [(slice(0, heads), self._pattern())]

    def place(self, q_BHQD, k_BGKD, mask, rotary):
        if rotary is None:
            return q_BHQD, k_BGKD
        sinks = self.config.num_sink_tokens
        return within_cache(q_BHQD, k_BGKD, mask, rotary, sinks, sinks + self._before())

    def new_state(self, fixed_length=None):
        return KeyWindow(self.config.num_sink_tokens, self._before(), fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, rotary=None, **options):
        return window_attention(q_BHQD, k_BGKD, v_BGKV, mask, self._pattern(), state, rotary=rotary, **options)

    def _before(self):
        return (self.config.window_size - 1) * self.config.dilation

    def _ahead(self):
        return self.config.window_size - 1 if self.config.look_forward is None else self.config.look_forward

    def _pattern(self) -> Band:
        return Band(self.config.window_size, self._ahead(), self.config.dilation, self.config.num_sink_tokens)
