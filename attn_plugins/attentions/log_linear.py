import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.core.options import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.recurrent import log_linear


@register_attention("log_linear")
class LogLinearAttention(Attention):
    """Log-linear attention: a gated linear attention that keeps the near and the far past in sums of their own.

    ``out_t = 1 / n_t sum_l lambda_t^(l) S_t^(l)^T q_t``: S^(l) is the sum of ``k_j v_j^T`` over the keys of level l,
    each faded by ``e^(g_{j+1} + ... + g_t)``, and ``n_t = e^g_t n_{t-1} + 1``. A token is of level 0 to itself, and of
    level l to a query where bit l - 1 of their positions is the highest that differs: levels of 1, 1, 2, 4, ... tokens.
    ``lambda_t = softplus(W x_t + b)`` of a query head, ``g_t = -exp(A_log) softplus(u . x_t + dt_bias)`` of a key/value
    head, x_t as ``gate_input`` says; for a query head, ``q = [a scale q, b]`` and ``k = [k, 1]``. Positions are counted
    from the first token of a text, without padding. Sums are in float32 whatever the model's dtype.

    A cache holds a sum for each level that there is, and grows with the logarithm of the length.

    Differs from the paper: lambdas and gates are made from the token's value, where the paper takes the layer's input,
    as ``gate_input="hidden"`` does; levels from ``num_levels`` on share the last lambda; the decayed number of tokens n
    takes the place of the norm over a head's output, which the output projection of a pretrained model does not expect;
    the last channel adds a decayed average (``b = 0`` leaves it out). ``a`` and ``b`` are learned for each query head.
    The paper's convolutions and output gate are left out. Attention dropout isn't applied, weights may be negative.

    Starts equal to ``gated_linear``: all lambdas are 1 (``W = 0``), ``a = 1/32``, ``b = 1/2``, and gates that depend on
    no token (``u = 0``) fade to 1/e over ``initial_memory`` tokens. What is measured of that start holds of this one.

    Limit case: none. An untrained swap is far from softmax attention; it needs training.
    """

    family = "linear"
    cost = "O(N D (chunk_size + D log N))"
    keeps = "(D + 1) V log2 N sums"
    paper = "Guo et al. 2025, Log-Linear Attention, arXiv:2506.04761, eq. 4 and section 3"
    when = "With much training: as gated_linear, where how far back a token lies should count by itself."
    causal = segments = True
    convex = False
    head_weights = ("*",)
    examples = (
        {"chunk_size": 4, "initial_memory": 6.0},
        {"chunk_size": 4, "initial_memory": 6.0, "num_levels": 3, "gate_input": "hidden"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        num_levels: int = 16
        """Levels that have a lambda of their own; farther ones share the last. 16 reach over 32,768 tokens."""
        gate_input: Literal["value", "hidden"] = "value"
        """What lambdas and gates are made of: the token's value in its head, or its hidden state, the layer's input."""
        initial_memory: float = 32.0
        """Tokens over which a head fades to 1/e before training."""
        chunk_size: int = 32
        """Tokens whose weights are formed outright, a power of two; changes the speed and not the result."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.num_levels >= 1, "num_levels", "an integer from 1 on")
            self.require(self.initial_memory > 0, "initial_memory", "a number above 0")
            power = self.chunk_size >= 1 and self.chunk_size & (self.chunk_size - 1) == 0
            self.require(power, "chunk_size", "a power of two from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'log_linear' has weights a head and needs the sizes of the heads, got None")
        self.wants_hidden = self.wants_hidden_of_keys = config.gate_input == "hidden"
        self.gated_by_values = not self.wants_hidden
        size = heads.known_hidden_size(self.name) if self.wants_hidden else heads.value_dim
        self.score_weight, self.average_weight = (nn.Parameter(torch.empty(heads.num_heads)) for _ in range(2))
        self.level_weight = nn.Parameter(torch.empty(heads.num_heads, config.num_levels, size))
        self.level_bias = nn.Parameter(torch.empty(heads.num_heads, config.num_levels))
        self.gate_weight = nn.Parameter(torch.empty(heads.num_key_value_heads, size))
        self.dt_bias, self.A_log = (nn.Parameter(torch.empty(heads.num_key_value_heads)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.score_weight, 1 / 32)
        nn.init.constant_(self.average_weight, 0.5)
        for weight in (self.level_weight, self.gate_weight, self.A_log):
            nn.init.zeros_(weight)
        # softplus of them is 1, and 1 / memory
        nn.init.constant_(self.level_bias, math.log(math.e - 1))
        fade = 1 / self.config.initial_memory
        nn.init.constant_(self.dt_bias, fade + math.log(-math.expm1(-fade)))

    def _given(self, k_BGKD, v_BGKV, mask, scale, hidden_BKE, gates_of_BGKV=None):
        beside = [gates_of_BGKV] if hidden_BKE is None else [hidden_BKE.unsqueeze(1)]
        new = [k_BGKD, v_BGKV, *(x for x in beside if x is not None)]
        weights = [self.score_weight, self.average_weight, self.level_weight, self.level_bias, self.gate_weight]
        prepare = functools.partial(log_linear.level_tokens, scale=scale)
        return new, mask, prepare, [*weights, self.dt_bias, self.A_log]

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, hidden_BQE=None, gates_of_BGKV=None):
        given = self._given(k_BGKD, v_BGKV, mask, scale, hidden_BQE, gates_of_BGKV)
        return log_linear.dense_log_linear_attention(q_BHQD, *given)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, hidden_BQE=None, gates_of_BGKV=None, **options):
        given = self._given(k_BGKD, v_BGKV, mask, scale, hidden_BQE, gates_of_BGKV)
        how = {"chunk_size": self.config.chunk_size, "batched": options.get("batched", False)}
        return log_linear.log_linear_attention(q_BHQD, *given, **how)

    def attend_batched(self, *tensors, **options):
        return self.attend(*tensors, batched=True, **options)

    def new_state(self, fixed_length=None):
        return log_linear.level_sums(fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, scale, dropout, hidden_BKE=None):
        new, mask, *recurrence = self._given(k_BGKD, v_BGKV, mask, scale, hidden_BKE)
        how = {"chunk_size": self.config.chunk_size, "batched": self.prefers_batched(q_BHQD)}
        return log_linear.log_linear_attention_from(q_BHQD, new, mask, state, *recurrence, **how)
