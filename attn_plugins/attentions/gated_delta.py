import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import softplus

from attn_plugins.core.options import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.recurrent.attention import RecurrentAttention
from attn_plugins.ops.recurrent.chunked import Tokens, by_token, unit


@register_attention("gated_delta")
class GatedDeltaAttention(RecurrentAttention):
    """Gated DeltaNet: the delta rule's memory, which corrects what it recalls for a key and can also forget at once.

    ``S = e^g_t S_{t-1}``, ``S_t = S - beta_t k_t (k_t^T S - v_t^T)``, ``out_t = a scale S_t^T q_t + b mean_t`` with
    queries and keys of unit length, ``beta_t = sigmoid(w . x_t + bias)``,
    ``g_t = -exp(A_log) softplus(u . x_t + dt_bias)``, x_t as ``gate_input`` says, and ``mean_t`` the average of the
    values so far, decayed by the same gates. Rates and gates are of a key/value head, and so is the state of D x V
    numbers, in float32 whatever the model's dtype. Chunks solve one triangular system each; decays within one never
    have an exponent above 0.

    Differs from the paper: rates and gates are made from the token's value, where the paper takes the layer's input, as
    ``gate_input="hidden"`` does; queries and keys are normalised as they come, rotary positions applied, without
    the paper's convolutions and SiLU; the output has neither its gate nor its norm over a head, which the output
    projection of a pretrained model does not expect, and the average beside it. ``a`` and ``b`` are learned for
    each query head; ``b = 0`` leaves the paper's sum. Attention dropout isn't applied, weights may be negative.

    Starts from ``a = sqrt(D)``, ``b = 1/2``, ``beta = initial_beta`` and gates that fade to 1/e over ``initial_memory``
    tokens, the same for all tokens (``w = u = 0``): half the average, as half of softmax or more goes to a sink that
    brings next to nothing, and what S, a linear fit of values to keys, recalls for the query. In all layers of
    SmolLM2-135M-Instruct, untrained, the squared error of a layer's output is 0.60 of the output's own square (zeros
    have 1, ``a = b = 1``, ``beta = 0.1`` and a memory of 4096 tokens 1.12), and perplexity 398, where the model's is
    14.7.

    ``gate_input``: with the new weights of layers 3, 14 and 26 of SmolLM2-135M-Instruct trained to imitate these layers
    (60 steps of 512 tokens of Python's documentation, Adam, 1e-2, two seeds, from the latter), perplexity was 18.33 and
    18.45 with "hidden" and 18.57 and 18.58 with "value", 14.35 unswapped. The default stays "value", with which any
    cache can be gone on from, and models saved before there was a choice are what they were.

    Limit case: none. An untrained swap is far from softmax attention; it needs training.
    """

    family = "linear"
    cost = "O(N (chunk_size^2 + D chunk_size + D^2))"
    keeps = "(D + 1) (V + 1) sums"
    paper = "Yang et al. 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464, eq. 10"
    when = "With much training: the most capable of the recurrent ones, which forgets and replaces."
    causal = segments = True
    convex = False
    examples = (
        {"chunk_size": 4, "initial_beta": 0.8, "initial_memory": 3.0},
        {"chunk_size": 4, "initial_memory": 3.0, "gate_input": "hidden"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        initial_beta: float = 0.3
        """Share of a value that is corrected at once, before training."""
        initial_memory: float = 32.0
        """Tokens over which a head fades to 1/e before training."""
        gate_input: Literal["value", "hidden"] = "value"
        """What rates and gates are made of: the token's value in its head, or its hidden state, the layer's input."""
        chunk_size: int = 32
        """Tokens whose corrections are solved for at once, a power of two; changes the speed and not the result."""

        def __post_init__(self):
            super().__post_init__()
            self.require(0 < self.initial_beta < 1, "initial_beta", "a number between 0 and 1")
            self.require(self.initial_memory > 0, "initial_memory", "a number above 0")
            power = self.chunk_size >= 1 and self.chunk_size & (self.chunk_size - 1) == 0
            self.require(power, "chunk_size", "a power of two from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'gated_delta' has weights a head and needs the sizes of the heads, got None")
        groups, size = heads.num_key_value_heads, self.gate_size(heads)
        self.score_weight = nn.Parameter(torch.empty(heads.num_heads))
        self.average_weight = nn.Parameter(torch.empty(heads.num_heads))
        self.beta_weight = nn.Parameter(torch.empty(groups, size))
        self.beta_bias = nn.Parameter(torch.empty(groups))
        self.gate_weight = nn.Parameter(torch.empty(groups, size))
        self.dt_bias = nn.Parameter(torch.empty(groups))
        self.A_log = nn.Parameter(torch.empty(groups))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.score_weight, self.root_of_size)
        nn.init.constant_(self.average_weight, 0.5)
        nn.init.zeros_(self.beta_weight)
        nn.init.constant_(self.beta_bias, math.log(self.config.initial_beta / (1 - self.config.initial_beta)))
        nn.init.zeros_(self.gate_weight)
        nn.init.zeros_(self.A_log)
        # softplus(bias) = 1 / memory
        fade = 1 / self.config.initial_memory
        nn.init.constant_(self.dt_bias, fade + math.log(-math.expm1(-fade)))

    def prepare(self, scale):
        return functools.partial(tokens, scale=scale)

    def weights(self):
        averages = [self.score_weight, self.average_weight]
        return [*averages, self.beta_weight, self.beta_bias, self.gate_weight, self.dt_bias, self.A_log]


def tokens(q_BHTD, k_BGTD, v_BGTV, *hidden_and_weights, scale):
    *hidden, score_weight_H, average_weight_H, w_GX, bias_G, u_GX, dt_bias_G, a_log_G = hidden_and_weights
    q = unit(q_BHTD)
    q = q * (scale * score_weight_H.to(q.dtype)).view(-1, 1, 1)
    k, v = unit(k_BGTD).to(q.dtype), v_BGTV.to(q.dtype)
    w, bias, u, dt_bias, a_log = (x.to(q.dtype) for x in (w_GX, bias_G, u_GX, dt_bias_G, a_log_G))
    x = hidden[0].to(q.dtype) if hidden else v
    beta = torch.sigmoid(by_token(x, w) + bias.view(-1, 1, 1))
    log_gate = -a_log.exp().view(-1, 1, 1) * softplus(by_token(x, u) + dt_bias.view(-1, 1, 1))
    return Tokens(q, k, v, log_gate, beta, average_weight_H.to(q.dtype))
