from dataclasses import dataclass
from typing import ClassVar

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.blocks import infllm
from attn_plugins.ops.blocks.native_sparse import NativeSparseSizes
from attn_plugins.ops.decode.block_cache import KeyBlocks, attention_from_blocks


@register_attention("infllm")
class InfllmAttention(Attention):
    """InfLLM-V2: softmax attention that is dense in short texts and over chosen blocks in long ones, without weights.

    The first ``dense_len`` tokens of a row or packed segment see all before them. Those that follow see ``topk`` blocks
    of ``block_size`` keys: their own, causally masked, the ``local_blocks`` nearest (its own counted), the
    ``init_blocks`` first, and those of highest score. Keys are averaged over ``kernel_size`` of them at every
    ``kernel_stride``-th; a query's softmax over the means that end no later than itself, summed over the query heads
    of a key/value head, which share the choice, is the weight of each mean; a block's score is the largest weight of
    the means that share keys with it, of equal ones the earlier first. The choice has no gradient; a block to which
    nothing is given is not chosen.

    Differs from the paper: whether a query is dense goes by its own place, not by the length of the text, so that what
    comes later changes nothing. Comparing each query with all means costs N^2 D / kernel_stride.

    Limit case: equals softmax attention when dense_len >= K.
    """

    family = "sparse"
    cost = "O(N (topk block_size + N / kernel_stride) D)"
    keeps = "all keys and values, of which it reads topk blocks; a mean of each kernel"
    paper = "Zhao et al. 2025, InfLLM-V2: Dense-Sparse Switchable Attention, arXiv:2509.24663, section 3"
    when = (
        "For pretrained decoders with long contexts: short texts are exact, long ones see their best blocks, untrained."
    )
    causal = segments = dropout = chooses_blocks = True
    limit: ClassVar = {"dense_len": 50, "topk": 3, "local_blocks": 1, "block_size": 8}
    examples = (
        {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 4, "local_blocks": 2, "dense_len": 0},
        {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 3, "local_blocks": 1, "dense_len": 22},
        {"kernel_size": 3, "kernel_stride": 5, "block_size": 2, "topk": 3, "local_blocks": 1, "init_blocks": 0}
        | {"dense_len": 9},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        kernel_size: int = 32
        """Keys of a mean."""
        kernel_stride: int = 16
        """Keys from one mean to the next."""
        block_size: int = 64
        """Keys a block."""
        topk: int = 64
        """Blocks that a query sees, its own and all that it has in any case included."""
        init_blocks: int = 1
        """First blocks of a row or segment that every query sees."""
        local_blocks: int = 32
        """Nearest blocks that a query sees, its own included."""
        dense_len: int = 4096
        """Tokens at the beginning of a row or segment that see all before them."""

        def __post_init__(self):
            super().__post_init__()
            for option in ("kernel_size", "kernel_stride", "block_size", "local_blocks"):
                self.require(getattr(self, option) >= 1, option, "an integer from 1 on")
            for option in ("init_blocks", "dense_len"):
                self.require(getattr(self, option) >= 0, option, "an integer from 0 on")
            least = self.init_blocks + self.local_blocks
            self.require(self.topk >= least, "topk", f"init_blocks + local_blocks = {least} or more")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        self.sizes = NativeSparseSizes.of(config, largest=True)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, **options):
        return infllm.dense_infllm_attention(q_BHQD, k_BGKD, v_BGKV, sizes=self.sizes, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, **options):
        return infllm.infllm_attention(q_BHQD, k_BGKD, v_BGKV, sizes=self.sizes, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, **options):
        return infllm.batched_infllm_attention(q_BHQD, k_BGKD, v_BGKV, sizes=self.sizes, **options)

    def new_state(self, fixed_length=None):
        return KeyBlocks(self.config.block_size, (self.config.kernel_size, self.config.kernel_stride), fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, **options):
        attend = self.attend if self.chosen(q_BHQD) == "torch" else self.attend_batched
        kernel = infllm.mean_kernel(k_BGKD, self.sizes)
        few = self._attend_few
        return attention_from_blocks(q_BHQD, k_BGKD, v_BGKV, mask, state, attend, few, (kernel, kernel), **options)

    def _attend_few(self, q_BHQD, position_Q, state, **options):
        return infllm.gather_infllm_attention(q_BHQD, position_Q, state, sizes=self.sizes, **options)
