from dataclasses import dataclass

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.additive.fastformer import FastformerWeights, dense_fastformer, fastformer, fastformer_from
from attn_plugins.ops.decode.running_sums import Sums

LEAST_CHUNK = 128
"""Of the batched form: prefixes of up to 16k tokens are pooled in two rounds."""


@register_attention("fastformer")
class FastformerAttention(Attention):
    """Fastformer: additive pooling of queries and of keys to global vectors, which tokens meet element by element.

    ``g = sum_j softmax_j(scale w_q . q_j) q_j``, ``p_j = g * k_j``, ``c = sum_j softmax_j(scale w_k . p_j) p_j``,
    ``out_i = W (c * v_i) + r q_i``, each weight a query head's own. Where the sizes of keys and values differ, c and q
    are mapped to the values' by a learned matrix.

    Causal attention pools over prefixes, ``g_i`` and ``c_i`` from tokens up to i, ``p_j = g_j * k_j``. There g is
    pooled from keys instead of queries, with w_q: a cache keeps keys and no queries, and what is generated with a cache
    has to be what one pass over the whole text gives. This and the factor r, 1 in the paper, are the deviations.

    It starts from plain averages (w_q and w_k zero), W close to zero and r zero, that is, from an attention that adds
    next to nothing to the residual stream; nothing of the method resembles what softmax attention computes, and with
    r = 1 and W the identity the start is several times further off. It needs training. Effective weights are those of
    the keys in c; out isn't an average of values by them. Attention dropout isn't applied.

    Limit case: none.
    """

    family = "additive"
    cost = "O(N D^2), causal O(N D (chunk_size + D))"
    keeps = "2 (D + 2) sums for a query head"
    paper = "Wu et al. 2021, Fastformer: Additive Attention Can Be All You Need, arXiv:2108.09084, eq. 3 to 6"
    when = "For training an encoder at linear cost where pooling to global vectors is enough, such as classification."
    causal = bidirectional = segments = True
    head_weights = ("*",)
    symbolic_length = True
    convex = linear_in_values = False
    examples = ({"chunk_size": 4},)

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        chunk_size: int = 16
        """Tokens that causal attention pools outright, not fewer than 128 on devices other than CPUs; changes the speed
        and not the result."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.chunk_size >= 2, "chunk_size", "an integer from 2 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'fastformer' has weights a head and needs the sizes of the heads, got None")
        num_heads, head_dim, value_dim = heads.num_heads, heads.head_dim, heads.value_dim
        self.query_weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.key_weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.transform_weight = nn.Parameter(torch.empty(num_heads, value_dim, value_dim))
        self.residual = nn.Parameter(torch.empty(num_heads))
        self.resize_weight = None
        if value_dim != head_dim:
            self.resize_weight = nn.Parameter(torch.empty(num_heads, value_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self):
        for weight in (self.query_weight, self.key_weight, self.residual):
            nn.init.zeros_(weight)
        nn.init.normal_(self.transform_weight, std=1e-3)
        if self.resize_weight is not None:
            nn.init.normal_(self.resize_weight, std=self.resize_weight.shape[-1] ** -0.5)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout):
        return dense_fastformer(q_BHQD, k_BGKD, v_BGKV, mask, weights=self._weights(), scale=scale)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, least_chunk=0):
        options = {"scale": scale, "chunk_size": max(self.config.chunk_size, least_chunk)}
        return fastformer(q_BHQD, k_BGKD, v_BGKV, mask, weights=self._weights(), **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, **options):
        return self.attend(q_BHQD, k_BGKD, v_BGKV, **options, least_chunk=LEAST_CHUNK)

    def new_state(self, fixed_length=None):
        return Sums(fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, scale, dropout):
        options = {"weights": self._weights(), "scale": scale, "chunk_size": self.config.chunk_size}
        return fastformer_from(q_BHQD, k_BGKD, v_BGKV, mask, state, **options)

    def _weights(self):
        return FastformerWeights(
            self.query_weight, self.key_weight, self.transform_weight, self.residual, self.resize_weight
        )
