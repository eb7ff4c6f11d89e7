import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from attn_plugins.core.options import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.recurrent.attention import RecurrentAttention
from attn_plugins.ops.recurrent.chunked import Tokens, with_average


@register_attention("gated_linear")
class GatedLinearAttention(RecurrentAttention):
    """Gated linear attention: each channel of the key forgets at a rate that is learned and depends on the token.

    ``S_t = diag(e^g_t) S_{t-1} + k_t v_t^T``, ``n_t = e^g_t n_{t-1} + 1``, ``out_t = S_t^T (q_t / n_t)`` with ``g_t =
    logsigmoid(W_2 W_1 x_t + bias) / gate_logit_normalizer``, x_t as ``gate_input`` says, and, for a query head, ``q
    = [a scale q, b]`` and ``k = [k, 1]``. Gates are of a key/value head, and so is the state of (D + 1) x V
    numbers, in float32 whatever the model's dtype. Decays within a chunk never have an exponent above 0.

    Differs from the paper: gates are made from the token's value, where the paper takes the layer's input, as
    ``gate_input="hidden"`` does; the decayed number of tokens n takes the place of the norm over a head's output,
    which the output projection of a pretrained model does not expect; the last channel adds a decayed average (``b
    = 0`` leaves it out). ``a`` and ``b`` are learned for each query head. The paper's output gate is left out.
    Attention dropout isn't applied, weights may be negative.

    Starts from ``a = 1/32``, ``b = 1/2`` and gates that depend on no token (``W_2 = 0``) and fade to 1/e over
    ``initial_memory`` tokens: half an average, as half of softmax or more goes to a sink that brings next to nothing,
    and little of scores, which are large. In all layers of SmolLM2-135M-Instruct, untrained, the squared error of a
    layer's output is 0.71 of the output's own square (zeros have 1, ``a = b = 1``, softmax to first order in small
    scores, and a memory of 4096 tokens 35), and perplexity 6452, where the model's is 14.7.

    ``gate_input``: with the new weights of layers 3, 14 and 26 of SmolLM2-135M-Instruct trained to imitate these layers
    (60 steps of 512 tokens of Python's documentation, Adam, 1e-2, two seeds, from the latter), perplexity was 31.6 and
    32.0 with "hidden" and 32.1 and 33.6 with "value", 14.35 unswapped. The default stays "value", with which any cache
    can be gone on from, and models saved before there was a choice are what they were.

    Limit case: none. An untrained swap is far from softmax attention; it needs training.
    """

    family = "linear"
    cost = "O(N D (chunk_size + D))"
    keeps = "(D + 1) (V + 1) sums"
    paper = (
        "Yang et al. 2023, Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635, "
        "eq. 3 and section 4"
    )
    when = "With much training: as retention, but what to forget depends on the data."
    causal = segments = True
    convex = False
    examples = (
        {"chunk_size": 4, "gate_low_rank_dim": 2, "initial_memory": 3.0},
        {"chunk_size": 4, "gate_low_rank_dim": 2, "initial_memory": 3.0, "gate_input": "hidden"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        gate_low_rank_dim: int = 16
        """Rank of the map to gates."""
        gate_input: Literal["value", "hidden"] = "value"
        """What gates are made of: the token's value in its head, or its hidden state, the layer's input."""
        gate_logit_normalizer: float = 16.0
        """Divides the log gates: the larger, the slower a gate can forget."""
        initial_memory: float = 32.0
        """Tokens over which a channel fades to 1/e before training."""
        chunk_size: int = 32
        """Tokens whose weights are formed outright, a power of two; changes the speed and not the result."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.gate_low_rank_dim >= 1, "gate_low_rank_dim", "an integer from 1 on")
            self.require(self.gate_logit_normalizer > 0, "gate_logit_normalizer", "a number above 0")
            self.require(self.initial_memory > 0, "initial_memory", "a number above 0")
            power = self.chunk_size >= 1 and self.chunk_size & (self.chunk_size - 1) == 0
            self.require(power, "chunk_size", "a power of two from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'gated_linear' has weights a head and needs the sizes of the heads, got None")
        groups, rank, channels = heads.num_key_value_heads, config.gate_low_rank_dim, heads.head_dim + 1
        self.score_weight = nn.Parameter(torch.empty(heads.num_heads))
        self.average_weight = nn.Parameter(torch.empty(heads.num_heads))
        self.gate_down_weight = nn.Parameter(torch.empty(groups, rank, self.gate_size(heads)))
        self.gate_up_weight = nn.Parameter(torch.empty(groups, channels, rank))
        self.gate_bias = nn.Parameter(torch.empty(groups, channels))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.score_weight, 1 / 32)
        nn.init.constant_(self.average_weight, 0.5)
        nn.init.normal_(self.gate_down_weight, std=self.gate_down_weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.gate_up_weight)
        # logsigmoid(bias) / normalizer = -1 / memory
        fade = self.config.gate_logit_normalizer / self.config.initial_memory
        nn.init.constant_(self.gate_bias, -fade - math.log(-math.expm1(-fade)))

    def weights(self):
        return [self.score_weight, self.average_weight, self.gate_down_weight, self.gate_up_weight, self.gate_bias]

    def prepare(self, scale):
        return functools.partial(tokens, scale=scale, normalizer=self.config.gate_logit_normalizer)


def tokens(q_BHTD, k_BGTD, v_BGTV, *hidden_and_weights, scale, normalizer):
    *hidden, score_weight, average_weight, down, up, bias = hidden_and_weights
    q, k = with_average(q_BHTD, k_BGTD, v_BGTV, score_weight, average_weight, scale=scale)
    v = v_BGTV.to(q.dtype)
    x = hidden[0].to(q.dtype) if hidden else v
    logits = x @ down.to(q.dtype).mT @ up.to(q.dtype).mT + bias.to(q.dtype).unsqueeze(1)
    return Tokens(q, k, v, logsigmoid(logits) / normalizer, None)
