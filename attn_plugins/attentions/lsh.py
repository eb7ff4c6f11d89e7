from dataclasses import dataclass, field

import torch

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.options import LARGEST_SEED
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.blocks.lsh import batched_lsh_attention, dense_visible, lsh_attention
from attn_plugins.ops.reference import dense_attention


@register_attention("lsh")
class LSHAttention(Attention):
    """Locality-sensitive hashing, as Reformer has it, in a form in which each pair decides for itself.

    In each of ``num_hashes`` rounds queries and keys fall into ``num_buckets`` buckets, ``argmax [R x; -R x]`` for a
    fixed random R: vectors of similar direction often into the same. A query sees the last ``bucket_size`` keys of its
    bucket, itself included, and as many that follow where attention is not causal; over the keys that it sees in any
    round, and its own, it is softmax attention. The choice has no gradient.

    Reformer differs: it cuts the sorted sequence into chunks, whose limits depend on all tokens, later ones as well, so
    that decoding with a cache gives something else; it takes the number of buckets from the length; it makes keys equal
    to queries, counts a pair once a round and divides by its count, and sees its own position only where it has to.
    Here nothing depends on the length, and queries and keys are hashed separately, as a pretrained model has them.

    The rotations are a buffer, drawn from ``seed`` and saved with the model. Nothing is learned; it starts as softmax
    attention without the keys that hash elsewhere. Sorting costs O(N log N) beside.

    Limit case: none.
    """

    family = "sparse"
    cost = "O(N num_hashes (bucket_size + num_buckets) D)"
    paper = "Kitaev et al. 2020, Reformer: The Efficient Transformer, arXiv:2001.04451, section 2"
    when = "Where similar keys lie far apart and anywhere, and enough rounds of hashing can be paid for."
    causal = bidirectional = segments = dropout = True
    clean_padding = True
    symbolic_length = True
    examples = (
        {"num_buckets": 4, "num_hashes": 2, "bucket_size": 3},
        {"num_buckets": 2, "num_hashes": 1, "bucket_size": 40},
    )

    rotations: torch.Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        num_hashes: int = 4
        """Rounds of hashing; more find more of the similar keys."""
        num_buckets: int = 64
        """Buckets of a round, half as many random directions."""
        bucket_size: int = 64
        """Keys of its bucket that a query sees in a round, the nearest; to each side where attention is not causal."""
        seed: int = field(default=0, metadata={"largest": LARGEST_SEED})
        """Of the random directions."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.num_hashes >= 1, "num_hashes", "an integer from 1 on")
            self.require(
                self.num_buckets >= 2 and self.num_buckets % 2 == 0, "num_buckets", "an even integer from 2 on"
            )
            self.require(self.bucket_size >= 1, "bucket_size", "an integer from 1 on")
            self.require(self.seed >= 0, "seed", "an integer from 0 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'lsh' has rotations and needs the sizes of the heads, got None")
        self.register_buffer("rotations", torch.empty(config.num_hashes, config.num_buckets // 2, heads.head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        generator = torch.Generator().manual_seed(self.config.seed)
        self.rotations.copy_(torch.randn(self.rotations.shape, generator=generator))

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        visible = dense_visible(q_BHQD, k_BGKD, mask, self.rotations, self.config.bucket_size)
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, visible, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        bucket_size = self.config.bucket_size
        return lsh_attention(q_BHQD, k_BGKD, v_BGKV, mask, self.rotations, bucket_size=bucket_size, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        bucket_size = self.config.bucket_size
        return batched_lsh_attention(q_BHQD, k_BGKD, v_BGKV, mask, self.rotations, bucket_size=bucket_size, **options)
