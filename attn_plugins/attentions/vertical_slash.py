import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.blocks.vertical_slash import (
    batched_vertical_slash_attention,
    choose,
    dense_visible,
    vertical_slash_attention,
)
from attn_plugins.ops.reference import dense_attention


@register_attention("vertical_slash")
class VerticalSlashAttention(Attention):
    """Vertical and slash lines (MInference): the keys and the diagonals that a sample of queries gives most weight.

    ``last_q`` real queries of a row are compared with all its keys. Each head then keeps the ``vertical_size`` keys of
    highest weight, summed over the sample, which all queries see, and the ``slash_size`` distances ``j - i`` of highest
    summed weight, 0 always among them. Over the union it is softmax attention, exactly. The choice has no gradient;
    what no query of the sample gives any weight is not chosen.

    The sample is spread evenly over the row where the paper takes the last queries, which serve there because all that
    is to be computed is the prompt of a causal model. In a causal model that is no attention to train or decode with:
    the choice for early tokens would depend on later ones, and for a token decoded with a cache, where no queries of
    the past are kept, it would be another than in one pass. So this is for encoders only. Blocks of 64 on the GPU,
    which see a little more than the lines, are left out as well.

    It learns nothing and starts as softmax attention on the lines.

    Limit case: equals softmax attention when vertical_size >= K.
    """

    family = "sparse"
    cost = "O(N (vertical_size + slash_size + last_q) D)"
    paper = "Jiang et al. 2024, MInference 1.0, arXiv:2407.02490, algorithm 2"
    when = "For encoders whose weights gather on a few keys and a few distances."
    bidirectional = dropout = True
    clean_padding = True
    limit: ClassVar = {"vertical_size": 50}
    examples = (
        {"vertical_size": 3, "slash_size": 4, "last_q": 7},
        {"vertical_size": 0, "slash_size": 1},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        vertical_size: int = 64
        """Keys that all queries of a head see."""
        slash_size: int = 64
        """Diagonals that a head sees, the main one included."""
        last_q: int = 64
        """Queries in the sample."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.vertical_size >= 0, "vertical_size", "an integer from 0 on")
            self.require(self.slash_size >= 1, "slash_size", "an integer from 1 on")
            self.require(self.last_q >= 1, "last_q", "an integer from 1 on")

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, **options):
        chosen = choose(q_BHQD, k_BGKD, mask, scale=scale, **dataclasses.asdict(self.config))
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense() & dense_visible(*chosen), scale=scale, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return vertical_slash_attention(q_BHQD, k_BGKD, v_BGKV, mask, **dataclasses.asdict(self.config), **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        sizes = dataclasses.asdict(self.config)
        return batched_vertical_slash_attention(q_BHQD, k_BGKD, v_BGKV, mask, **sizes, **options)
