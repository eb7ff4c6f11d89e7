import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from attn_plugins.core.options import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.recurrent.attention import RecurrentAttention
from attn_plugins.ops.recurrent.chunked import Tokens, with_average
from attn_plugins.ops.reference import expand_heads


@register_attention("retention")
class RetentionAttention(RecurrentAttention):
    """RetNet's retention: dot products without softmax, that fade with distance at a rate of each head.

    ``out_t = sum_j gamma_h^(t - j) (a scale q_t . k_j + b) v_j / sum_j gamma_h^(t - j)`` over the visible keys j, with
    ``gamma_h = 1 - 2^(-5 - h)`` for query head h = 0, 1, ... Sums run in chunks that carry a state of (D + 1) x V
    numbers a query head, in float32 whatever the model's dtype. Padding has no place in the distance t - j.

    ``decay="lightning"`` fades as MiniMax-01 does (arXiv:2501.08313), the more slowly the later a layer:
    ``gamma_h = exp(-2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5))`` in layer l of L, as transformers has it.
    Heads that are of no model fade as in a first layer.

    Differs from the paper, whose output is normalised to unit size for each head and token, which the output projection
    of a pretrained model does not expect. Here the decayed number of tokens takes that place, and ``b`` adds their
    decayed average; ``a`` and ``b`` are learned for each query head, and ``b = 0`` leaves the paper's sum. Queries and
    keys come with the model's own rotary positions. Attention dropout isn't applied, weights may be negative.

    Starts from ``a = 1/32`` and ``b = 1/2``: half an average of a fading past, as half of softmax or more goes to a
    sink that brings next to nothing, and little of scores, which are large. In all layers of SmolLM2-135M-Instruct,
    untrained, the squared error of a layer's output is 0.75 of the output's own square (zeros have 1, ``a = b = 1``,
    softmax to first order in small scores, 33), and perplexity 7072, where the model's is 14.7.

    Limit case: none. An untrained swap is far from softmax attention; it needs training.
    """

    family = "linear"
    cost = "O(N D (chunk_size + D))"
    keeps = "(D + 1) (V + 1) sums for a query head"
    paper = "Sun et al. 2023, Retentive Network: A Successor to Transformer for Large Language Models, arXiv:2307.08621"
    when = (
        "With much training, where a fixed decay by distance is wanted: two numbers a head to learn, constant memory "
        "at decoding."
    )
    causal = segments = True
    convex = False
    examples = ({"chunk_size": 4}, {"chunk_size": 4, "decay": "lightning"})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        decay: Literal["retnet", "lightning"] = "retnet"
        """What a head fades by: its number, or its number and that of its layer."""
        chunk_size: int = 64
        """Tokens whose weights are formed outright, a power of two; changes the speed and not the result."""

        def __post_init__(self):
            super().__post_init__()
            power = self.chunk_size >= 1 and self.chunk_size & (self.chunk_size - 1) == 0
            self.require(power, "chunk_size", "a power of two from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'retention' has weights a head and needs the sizes of the heads, got None")
        self.score_weight = nn.Parameter(torch.empty(heads.num_heads))
        self.average_weight = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.score_weight, 1 / 32)
        nn.init.constant_(self.average_weight, 0.5)

    def prepare(self, scale):
        assert self.heads is not None
        heads, lightning = self.heads, None
        if self.config.decay == "lightning":
            layer, layers = (0, 1) if heads.layer is None or heads.layers is None else (heads.layer, heads.layers)
            share = 1 - layer / (layers - 1 + 1e-5) + 1e-5
            lightning = (heads.all_heads or heads.num_heads, share)
        return functools.partial(tokens, scale=scale, first_head=heads.first_head, lightning=lightning)

    def weights(self):
        return [self.score_weight, self.average_weight]


def tokens(q_BHTD, k_BGTD, v_BGTV, score_weight_H, average_weight_H, *, scale, first_head=0, lightning=None):
    q, k = with_average(q_BHTD, k_BGTD, v_BGTV, score_weight_H, average_weight_H, scale=scale)
    heads = q.shape[1]
    number = torch.arange(first_head, first_head + heads, dtype=q.dtype, device=q.device)
    if lightning is None:
        log_gate = torch.log1p(-number.add(5).neg().exp2())
    else:
        all_heads, share = lightning
        log_gate = -share * number.add(1).mul(-8 / all_heads).exp2()
    k, v = (expand_heads(x, heads) for x in (k, v_BGTV.to(q.dtype)))
    return Tokens(q, k, v, log_gate.view(1, heads, 1, 1), None)
