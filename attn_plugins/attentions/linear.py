from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from attn_plugins.attention import Attention, AttentionConfig
from attn_plugins.ops.linear import dense_linear_attention, linear_attention
from attn_plugins.registry import register_attention


@register_attention("linear")
class LinearAttention(Attention):
    """Linear attention: the softmax's exp(q.k) becomes a product of features, so that keys can be summed up in a state.

    ``out_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps)`` over the visible keys j, with
    ``phi(x) = elu(x) + 1``, ``relu(x)`` or Hedgehog's ``[softmax(W x); softmax(-W x)]``. Causal attention runs in
    chunks that carry the state of all keys before; bidirectional and cross-attention sum all keys once. States and
    denominators are float32 whatever the model's dtype.

    Hedgehog learns one W a query head for queries and one a key/value head for keys; it is kept as ``W = I + weight``
    and starts from the identity. The other maps learn nothing.

    As published, the feature maps take queries and keys as they are, rotary positions applied: ``scale`` has no part in
    it. Attention dropout isn't applied, there are no weights to drop.

    Limit case: none. An untrained swap is far from softmax attention; it needs training.
    """

    family = "linear"
    cost = "O(N F (chunk_size + D)), F = D features, 2 D for hedgehog"
    paper = (
        "Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236, eq. 4 to 12; "
        "hedgehog: Zhang et al. 2024, arXiv:2402.04347, eq. 3 and 6"
    )
    causal = bidirectional = cross = segments = True
    examples = (
        {"chunk_size": 4},
        {"feature_map": "relu", "chunk_size": 5},
        {"feature_map": "hedgehog", "chunk_size": 8},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        feature_map: Literal["elu", "relu", "hedgehog"] = "elu"
        """phi; hedgehog is the one that learns to imitate softmax."""
        chunk_size: int = 64
        """Tokens whose weights are formed outright; changes the speed and not the result."""
        eps: float = 1e-6
        """Added to the denominator; matters where phi is zero."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.chunk_size >= 1, "chunk_size", "an integer from 1 on")
            self.require(self.eps > 0, "eps", "a number above 0")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if config.feature_map == "hedgehog":
            if heads is None:
                raise ValueError("feature_map='hedgehog' has weights a head and needs the sizes of the heads, got None")
            self.query_weight = nn.Parameter(torch.empty(heads.num_heads, heads.head_dim, heads.head_dim))
            self.key_weight = nn.Parameter(torch.empty(heads.num_key_value_heads, heads.head_dim, heads.head_dim))
            self.reset_parameters()

    def reset_parameters(self):
        if self.config.feature_map == "hedgehog":
            nn.init.zeros_(self.query_weight)
            nn.init.zeros_(self.key_weight)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout):
        options = {"feature_map": self.config.feature_map, "eps": self.config.eps, **self._projections()}
        return dense_linear_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout):
        options = {"feature_map": self.config.feature_map, "eps": self.config.eps, **self._projections()}
        return linear_attention(q_BHQD, k_BGKD, v_BGKV, mask, chunk_size=self.config.chunk_size, **options)

    def _projections(self):
        if self.config.feature_map != "hedgehog":
            return {}
        # Added in float32: steps of bfloat16 near 1 are 1/128, which would swallow what is learned.
        dtype = torch.promote_types(self.query_weight.dtype, torch.float32)
        identity = torch.eye(self.query_weight.shape[-1], dtype=dtype, device=self.query_weight.device)
        return {"query_projection": identity + self.query_weight, "key_projection": identity + self.key_weight}
