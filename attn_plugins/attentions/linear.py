from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from attn_plugins.core.options import LARGEST_SEED, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.decode.running_sums import Sums
from attn_plugins.ops.linear import features
from attn_plugins.ops.linear.attention import FeatureAttention


@register_attention("linear")
class LinearAttention(FeatureAttention):
    """Linear attention: the softmax's exp(q.k) becomes a product of features, so that keys can be summed up in a state.

    ``out_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps)`` over the visible keys j. Causal attention
    runs in chunks that carry the state of all keys before; bidirectional and cross-attention sum all keys once. States
    and denominators are float32 whatever the model's dtype. Queries and keys come with rotary positions applied.

    - ``elu``: elu(x) + 1. ``relu``: max(x, 0). ``relu2``: its square. They learn nothing.
    - ``hedgehog``: [softmax(W x); softmax(-W x)]. ``t2r``: relu(W x + b). One W (and b) a query head for queries and
      one a key/value head for keys, kept as ``W = I + weight``; they start from the identity and no bias.
    - ``taylor``: [1, x', x'_i x'_j], so that weights are 1 + s + s^2 / 2, with x' a learned projection to
      ``feature_dim``. It starts orthogonal, from the same W for queries and keys, and s on average at ``scale q.k``.
    - ``favor``: exp(w.x' - |x'|^2 / 2), x' = sqrt(scale) x, for ``num_features`` fixed random w: an unbiased estimate
      of softmax's exp(scale q.k). Published code subtracts a maximum over all keys, which depends on the future, and
      adds a small number to each feature; here each feature's maximum so far is carried with the state, and nothing
      is added. A key more than 87 (in exponents) below that of its block counts as nothing in float32.
    - ``cosformer``: relu(x) [cos(a t); sin(a t)], a = pi / (2 max_length): weights fall with the distance. Positions t
      count from a row's or segment's first token. Not for cross-attention, which has no distances.

    All but ``taylor`` and ``favor`` take queries and keys as they are, without ``scale``. No attention dropout.

    Limit case: none. An untrained swap is far from softmax attention; it needs training, best transfer first, for which
    the default is a map that learns.
    """

    family, variants = "linear", "elu, relu, relu2, t2r, hedgehog, favor, cosformer, taylor"
    cost = "O(N F (chunk_size + D)), F = D, 2 D (hedgehog, cosformer), num_features, feature_dim^2 / 2 (taylor)"
    keeps = "F (V + 1) sums"
    paper = (
        "Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236, eq. 4 to 12; "
        "hedgehog: Zhang et al. 2024, arXiv:2402.04347, eq. 3 and 6; t2r: Kasai et al. 2021, arXiv:2103.13076; "
        "favor: Choromanski et al. 2021, arXiv:2009.14794; cosformer: Qin et al. 2022, arXiv:2202.08791; "
        "taylor: Arora et al. 2024, arXiv:2402.18668; relu2: So et al. 2021, arXiv:2109.08668"
    )
    when = "With training, for constant memory at decoding and the longest contexts; hedgehog imitates softmax best."
    causal = bidirectional = cross = segments = in_parts = True
    head_weights = ("*",)
    examples = (
        {"feature_map": "taylor", "feature_dim": 3, "chunk_size": 5},
        {"feature_map": "hedgehog", "chunk_size": 8},
        {"feature_map": "elu", "chunk_size": 16},
        {"feature_map": "favor", "num_features": 12, "chunk_size": 4},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        feature_map: Literal["elu", "relu", "relu2", "t2r", "hedgehog", "favor", "cosformer", "taylor"] = "hedgehog"
        """phi; hedgehog and t2r learn to imitate softmax, taylor and favor approximate it."""
        chunk_size: int = 64
        """Tokens whose weights are formed outright; changes the speed and not the result."""
        eps: float = 1e-6
        """Added to the denominator; matters where phi is zero. favor has no use for it."""
        feature_dim: int = 16
        """Dimensions that taylor projects to."""
        num_features: int = 256
        """Random directions of favor."""
        seed: int = field(default=0, metadata={"largest": LARGEST_SEED})
        """Of favor's directions, which are also saved."""
        max_length: int = 8192
        """Longest sequence that cosformer will ever see; longer ones are refused."""

        def __post_init__(self):
            super().__post_init__()
            for option in ("chunk_size", "feature_dim", "num_features", "max_length"):
                self.require(getattr(self, option) >= 1, option, "an integer from 1 on")
            self.require(self.eps > 0, "eps", "a number above 0")
            self.require(self.seed >= 0, "seed", "an integer from 0 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        self.symbolic_length = (feature_map := config.feature_map) != "cosformer"  # which has a longest sequence
        self.in_parts = feature_map not in ("cosformer", "favor")  # positions, and a maximum over all keys
        if feature_map not in (*features.LEARNED, "favor"):
            return
        if heads is None:
            raise ValueError(
                f"feature_map={feature_map!r} has weights a head and needs the sizes of the heads, got None"
            )
        sizes = (heads.num_heads, heads.num_key_value_heads, heads.head_dim, config.feature_dim)
        for name, shape in features.weight_shapes(feature_map, *sizes).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if feature_map == "favor":
            self.register_buffer("projection", torch.empty(config.num_features, heads.head_dim))
        self.reset_parameters()

    def reset_parameters(self):
        features.reset_weights(self.config.feature_map, dict(self.named_parameters()))
        if self.config.feature_map == "favor":
            projection = self.get_buffer("projection")
            projection.copy_(features.orthogonal_features(projection.shape[0], projection.shape[1], self.config.seed))

    @property
    def phi(self):
        return features.FEATURE_MAPS[features.MAP_OF.get(self.config.feature_map, self.config.feature_map)]

    def new_state(self, fixed_length=None):
        return Sums(fixed_length, max_length=self.config.max_length if self.config.feature_map == "cosformer" else None)

    def prepare(self, q_BHQD, k_BGKD, mask, scale, since=None):
        options = {"scale": scale, "eps": self.config.eps, "max_length": self.config.max_length, "since": since}
        return features.prepare(self.config.feature_map, q_BHQD, k_BGKD, mask, features.weights(self), **options)
