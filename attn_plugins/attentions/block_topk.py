from dataclasses import dataclass, field
from typing import ClassVar

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.blocks.batched import batched_block_attention
from attn_plugins.ops.blocks.gather import PLAIN, block_layout, choose_blocks, chosen_keys
from attn_plugins.ops.decode.block_cache import KeyBlocks, attention_from_blocks, choose_by_means, chosen_attention
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.sizes import scores_at_once


@register_attention("block_topk")
class BlockTopkAttention(Attention):
    """Mixture of block attention (MoBA): each query of each head attends to the blocks of keys that look most like it.

    Keys are cut into blocks of ``block_size``, counted from the first real token of a row or packed segment. A query
    keeps its own block, causally masked where attention is causal, and the ``topk - 1`` others of highest
    ``q . mean(k)``, the mean taken over a block's real keys; where attention is causal only past blocks, which are
    complete, are candidates. The ``init_blocks`` first blocks of the row are chosen before all others, which the paper
    does not do: pretrained models look at their first tokens from everywhere, and a block's mean does not show that.
    Over the keys of these blocks it is softmax attention. The choice itself has no gradient, queries and keys learn
    through the scores inside the chosen blocks.

    A causal query's choice depends on its own past alone, so cached decoding, padding and packing change nothing. With
    grouped heads each query head chooses for itself. Comparing each query with all means costs N^2 D / block_size.

    Limit case: equals softmax attention when topk * block_size >= K.
    """

    family = "sparse"
    cost = "O(N (topk block_size + N / block_size) D)"
    keeps = "all keys and values, of which it reads topk blocks; a mean of each block"
    paper = "Lu et al. 2025, MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv:2502.13189"
    when = "For decoders with long contexts: every query finds its own far blocks, without new weights."
    causal = bidirectional = segments = dropout = True
    clean_padding = chooses_blocks = True
    limit: ClassVar = {"block_size": 10, "topk": 5}
    examples = (
        {"block_size": 4, "topk": 2, "init_blocks": 0},
        {"block_size": 3, "topk": 4},
        {"block_size": 3, "topk": 4, "init_blocks": 2},
        {"block_size": 5, "topk": 1},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        block_size: int = 64
        """Keys a block."""
        topk: int = 4
        """Blocks that a query sees, its own included."""
        init_blocks: int = field(default=1, metadata={"before": 0})
        """First blocks of a row or packed segment among them, as far as topk goes."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.block_size >= 1, "block_size", "an integer from 1 on")
            self.require(self.topk >= 1, "topk", "an integer from 1 on")
            self.require(self.init_blocks >= 0, "init_blocks", "an integer from 0 on")

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        chosen, blocks = self._choose(q_BHQD, k_BGKD, mask), block_layout(mask, self.config.block_size)
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense() & chosen_keys(chosen, blocks), **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, forms=PLAIN, **options):
        options |= {"block_size": self.config.block_size}
        return forms.over_blocks(q_BHQD, k_BGKD, v_BGKV, mask, self._choose(q_BHQD, k_BGKD, mask), **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        chosen = self._choose(q_BHQD, k_BGKD, mask, at_once=scores_at_once(q_BHQD.device), look=False)
        options |= {"block_size": self.config.block_size}
        return batched_block_attention(q_BHQD, k_BGKD, v_BGKV, mask, chosen, **options)

    def new_state(self, fixed_length=None):
        return KeyBlocks(self.config.block_size, fixed_length=fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, **options):
        attend = self.attend if self.chosen(q_BHQD) == "torch" else self.attend_batched
        return attention_from_blocks(q_BHQD, k_BGKD, v_BGKV, mask, state, attend, self._attend_few, **options)

    def _choose(self, q_BHQD, k_BGKD, mask, **options):
        config, blocks = self.config, block_layout(mask, self.config.block_size)
        return choose_blocks(q_BHQD, k_BGKD, blocks, config.topk, init_blocks=config.init_blocks, **options)

    def _attend_few(self, q_BHQD, position_Q, state, **options):
        chosen_BHQT = choose_by_means(q_BHQD, position_Q, state, self.config.topk, self.config.init_blocks)
        return chosen_attention(q_BHQD, position_Q, state, chosen_BHQT, **options)
