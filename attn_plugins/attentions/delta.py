import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from attn_plugins.core.options import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.recurrent.attention import RecurrentAttention
from attn_plugins.ops.recurrent.chunked import Tokens, by_token, unit


@register_attention("delta")
class DeltaAttention(RecurrentAttention):
    """DeltaNet: a linear memory that corrects what it recalls for a key, instead of adding to it.

    ``S_t = S_{t-1} - beta_t k_t (k_t^T S_{t-1} - v_t^T)``, ``out_t = a scale S_t^T q_t + b mean(v_1 .. v_t)`` with
    queries and keys of unit length and ``beta_t = sigmoid(w . x_t + bias)``, x_t as ``gate_input`` says. Rates are
    of a key/value head, and so is the state of D x V numbers, in float32 whatever the model's dtype. Chunks solve
    one triangular system each for all their corrections.

    Differs from the paper: beta is made from the token's value, where the paper takes the layer's input, as
    ``gate_input="hidden"`` does; queries and keys are normalised as they come, rotary positions applied, without
    the paper's convolutions and SiLU; the output has no norm over a head, which the output projection of a
    pretrained model does not expect, and the average of the values beside it. ``a`` and ``b`` are learned for each
    query head; ``b = 0`` leaves the paper's sum. Attention dropout isn't applied, weights may be negative.

    Starts from ``a = sqrt(D) / 2``, ``b = 1/2`` and ``beta = initial_beta`` for all tokens (``w = 0``): half the
    average, as half of softmax or more goes to a sink that brings next to nothing, and half of what S, a linear fit of
    values to keys, recalls for the query. A small beta fits the last D / beta tokens or so, a large one the latest. In
    all layers of SmolLM2-135M-Instruct, untrained, the squared error of a layer's output is 0.69 of the output's own
    square (zeros have 1, ``a = b = 1`` 1.12), and perplexity 720, where the model's is 14.7.

    ``gate_input``: with the new weights of layers 3, 14 and 26 of SmolLM2-135M-Instruct trained to imitate these layers
    (60 steps of 512 tokens of Python's documentation, Adam, 1e-2, two seeds, from ``a = b = 1``), perplexity was 18.50
    and 18.50 with "hidden" and 18.58 and 18.58 with "value", 14.35 unswapped. The default stays "value", with which any
    cache can be gone on from, and models saved before there was a choice are what they were.

    Limit case: none. An untrained swap is far from softmax attention; it needs training.
    """

    family = "linear"
    cost = "O(N (chunk_size^2 + D chunk_size + D^2))"
    keeps = "(D + 1) (V + 1) sums"
    paper = (
        "Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv:2406.06484"
    )
    when = "With much training, for recall: a key's old value is replaced instead of added to."
    causal = segments = True
    convex = False
    examples = (
        {"chunk_size": 4, "initial_beta": 0.8},
        {"chunk_size": 4, "gate_input": "hidden"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        initial_beta: float = 0.1
        """Share of a value that is corrected at once, before training."""
        gate_input: Literal["value", "hidden"] = "value"
        """What rates are made of: the token's value in its head, or its hidden state, the layer's input."""
        chunk_size: int = 32
        """Tokens whose corrections are solved for at once, a power of two; changes the speed and not the result."""

        def __post_init__(self):
            super().__post_init__()
            self.require(0 < self.initial_beta < 1, "initial_beta", "a number between 0 and 1")
            power = self.chunk_size >= 1 and self.chunk_size & (self.chunk_size - 1) == 0
            self.require(power, "chunk_size", "a power of two from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'delta' has weights a head and needs the sizes of the heads, got None")
        self.score_weight = nn.Parameter(torch.empty(heads.num_heads))
        self.average_weight = nn.Parameter(torch.empty(heads.num_heads))
        self.beta_weight = nn.Parameter(torch.empty(heads.num_key_value_heads, self.gate_size(heads)))
        self.beta_bias = nn.Parameter(torch.empty(heads.num_key_value_heads))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.score_weight, 0.5 * self.root_of_size)
        nn.init.constant_(self.average_weight, 0.5)
        nn.init.zeros_(self.beta_weight)
        nn.init.constant_(self.beta_bias, math.log(self.config.initial_beta / (1 - self.config.initial_beta)))

    def prepare(self, scale):
        return functools.partial(tokens, scale=scale)

    def weights(self):
        return [self.score_weight, self.average_weight, self.beta_weight, self.beta_bias]


def tokens(q_BHTD, k_BGTD, v_BGTV, *hidden_and_weights, scale):
    *hidden, score_weight_H, average_weight_H, beta_weight_GX, beta_bias_G = hidden_and_weights
    q = unit(q_BHTD)
    q = q * (scale * score_weight_H.to(q.dtype)).view(-1, 1, 1)
    k, v = unit(k_BGTD).to(q.dtype), v_BGTV.to(q.dtype)
    x = hidden[0].to(q.dtype) if hidden else v
    beta = torch.sigmoid(by_token(x, beta_weight_GX.to(q.dtype)) + beta_bias_G.to(q.dtype).view(-1, 1, 1))
    return Tokens(q, k, v, None, beta, average_weight_H.to(q.dtype))
