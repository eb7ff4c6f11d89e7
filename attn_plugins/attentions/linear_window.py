import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from attn_plugins.core.attention import AttentionConfig, sink_tokens
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.linear.features import FEATURE_MAPS, MAP_OF, prepare, reset_weights, weight_shapes, weights
from attn_plugins.ops.linear.window import BEFORE_SINKS
from attn_plugins.ops.linear.window_attention import WindowAndSumsAttention


@register_attention("linear_window")
class LinearWindowAttention(WindowAndSumsAttention):
    """Softmax over sinks and a window, linear attention over what has left it, under one denominator (LoLCATs).

    ``out_i = (sum_near e^(s_ij - c_i) v_j + e^b sum_far phi(q_i).phi(k_j) v_j) / (the same without v)``: near are the
    visible keys with ``i - window_size < j <= i`` (``|i - j| < window_size`` where the mask is not causal) or among the
    first ``num_sink_tokens`` real tokens of their row or packed segment, far are all other visible ones, ``s_ij = scale
    q_i.k_j``, c_i is the largest near s_ij and b is learned a head. A key is in one of the sums and never in both: it
    enters the state when it leaves the window, and a sink never does.

    The feature maps are those of ``linear``. Starts from ``e^b = 0.01`` and hedgehog's W at the identity: as ``local``
    with these sinks, and a hundredth of what is far. Untrained in all layers of SmolLM2-135M-Instruct, perplexity is
    19.15 on Python's documentation in blocks of 512 tokens, where ``local`` has 19.30 and the model itself 14.68.
    Hybrids tend to leave the work to the window: evaluation also reports each half alone, and the attribute ``branch``
    of a built module, "window" or "linear", leaves out the other. Linear alone gives zeros to tokens that see none far.
    Differs from the paper, whose window has a factor of 0.1 and no sinks: sums over hundreds of far keys drown it. Of
    its variants this is the one that is exact for each token. Attention dropout isn't applied.

    Limit case: equals softmax attention when window_size >= K.
    """

    family = "linear"
    cost = "O(N ((num_sink_tokens + window_size) D + F (chunk_size + D))), F = D features, 2 D for hedgehog"
    keeps = "num_sink_tokens + window_size keys and values, F (V + 1) sums"
    paper = "Zhang et al. 2024, LoLCATs, arXiv:2410.10254, eq. 6"
    when = "The linear attention to start with: sinks and window keep a model usable, training adds the rest."
    causal = bidirectional = segments = symbolic_length = in_parts = True
    head_weights = ("*",)
    limit: ClassVar = {"window_size": 50}
    branches = ("window", "linear")
    examples = (
        {"window_size": 5, "chunk_size": 4},
        {"window_size": 1, "num_sink_tokens": 0, "feature_map": "elu", "chunk_size": 8},
        {"window_size": 9, "feature_map": "taylor", "feature_dim": 3, "chunk_size": 8},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        window_size: int = 64
        """Keys with softmax weights up to and including the query's own; as many after it where not causal."""
        num_sink_tokens: int | None = field(default=None, metadata={"settled": sink_tokens})
        """First real tokens of a row or segment in every later window; None is 4, in encoders [CLS] and registers."""
        feature_map: Literal["hedgehog", "elu", "relu", "relu2", "t2r", "taylor"] = "hedgehog"
        """phi, for keys outside the window."""
        branch: Literal["both", "window", "linear"] = "both"
        """Which sums take part; one alone shows what that half has learned."""
        chunk_size: int = 64
        """Tokens whose linear weights are formed outright; changes the speed and not the result."""
        eps: float = 1e-6
        """Added to the denominator where the linear sum is alone."""
        feature_dim: int = 16
        """Dimensions that taylor projects to."""
        since: ClassVar = {"num_sink_tokens": BEFORE_SINKS}

        def __post_init__(self):
            super().__post_init__()
            for option in ("window_size", "chunk_size", "feature_dim"):
                self.require(getattr(self, option) >= 1, option, "an integer from 1 on")
            self.require((self.num_sink_tokens or 0) >= 0, "num_sink_tokens", "None or an integer from 0 on")
            self.require(self.eps > 0, "eps", "a number above 0")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'linear_window' has weights a head and needs the sizes of the heads, got None")
        self.branch = config.branch
        sizes = (heads.num_heads, heads.num_key_value_heads, heads.head_dim, config.feature_dim)
        for name, shape in weight_shapes(config.feature_map, *sizes).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.log_linear_factor = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.log_linear_factor, math.log(0.01))
        reset_weights(self.config.feature_map, weights(self))

    @property
    def phi(self):
        return FEATURE_MAPS[MAP_OF.get(self.config.feature_map, self.config.feature_map)]

    def prepare(self, q_BHQD, k_BGKD, mask, scale, since=None):
        if self.branch not in ("both", *self.branches):
            raise ValueError(f"branch={self.branch!r}; allowed: 'both', {', '.join(map(repr, self.branches))}")
        how = {"scale": scale, "eps": self.config.eps, "since": since}
        made = prepare(self.config.feature_map, q_BHQD, k_BGKD, mask, weights(self), **how)
        sizes = {"window_size": self.config.window_size, "num_sink_tokens": self.config.num_sink_tokens}
        return made, {**sizes, "log_factor_H": self.log_linear_factor, "branch": self.branch, "scale": scale}
