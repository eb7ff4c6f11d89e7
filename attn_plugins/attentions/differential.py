import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import rms_norm

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, masked_softmax, scores
from attn_plugins.ops.softmax.differential import attention_of_pairs


@register_attention("differential")
class DifferentialAttention(Attention):
    """Differential attention: heads in pairs, one subtracts the other's attention map, so that what both see cancels.

    With the maps ``A_h = softmax(scale Q_h K_h^T)`` of neighbouring heads 0 and 1 and
    ``lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init``, learned for a layer:

    - ``form="paper"``: ``(A_0 - lambda A_1) V_h`` from both heads, then over both outputs an RMS norm with a learned
      weight, times ``1 - lambda_init``, with ``lambda_init = 0.8 - 0.6 exp(-0.3 layer)`` and layers counted from 0.
    - ``form="pretrained"``: ``(A_0 - lambda A_1) V_0`` and ``(A_1 - lambda A_0) V_1``, and ``lambda_init = 0``.

    The second is this package's, for models that expect of a second head what it has learned to attend to, and no norm.
    There lambda_q1 starts equal to lambda_q2, and lambda_k1 to lambda_k2: lambda starts at 0 exactly, and all four have
    a gradient. The paper draws each; here they are as long as its draws are on average. It gives a pair of heads one
    value of twice the size, which computes the same.

    Time is quadratic in N, memory isn't: queries are treated ``chunk_size`` at a time, and again in backward. No
    attention dropout.

    Limit case: equals softmax attention at its start, before training.
    """

    family = "dense"
    cost = "O(N^2 D), memory O(chunk_size N)"
    paper = "Ye et al. 2024, Differential Transformer, arXiv:2410.05258, eq. 1 to 3"
    when = "To fine-tune against attention noise, from exactly what the model computes; the paper's form to train anew."
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = sinks = True
    symbolic_length = True
    convex = False
    heads_multiple_of = 2
    head_weights = ()
    limit: ClassVar = {}
    examples = ({"chunk_size": 8}, {"form": "paper", "chunk_size": 8})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        form: Literal["pretrained", "paper"] = "pretrained"
        """What a pair computes, and where it starts: as the model was trained, or as the paper has it."""
        chunk_size: int = 128
        """Queries treated at a time on a CPU; memory grows with it and the result does not change."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.chunk_size >= 1, "chunk_size", "an integer from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'differential' has weights of a head's size and needs the sizes, got None")
        self.lambda_q1, self.lambda_k1 = (nn.Parameter(torch.empty(heads.head_dim)) for _ in range(2))
        self.lambda_q2, self.lambda_k2 = (nn.Parameter(torch.empty(heads.head_dim)) for _ in range(2))
        self.lambda_init, self.linear_in_values = 0.0, config.form != "paper"
        if config.form == "paper":
            self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (heads.layer or 0))
            self.norm_weight = nn.Parameter(torch.empty(2 * heads.value_dim))
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            for weight in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
                nn.init.normal_(weight).mul_(0.1 * math.sqrt(weight.numel()) / weight.norm())
            if self.config.form == "paper":
                nn.init.ones_(self.norm_weight)
            else:
                self.lambda_q2.copy_(self.lambda_q1)
                self.lambda_k2.copy_(self.lambda_k1)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, dropout, sinks=None, **options):
        maps_BHQK = masked_softmax(scores(q_BHQD, k_BGKD, **options), mask.dense(), sinks)
        first_BPQK, second_BPQK = maps_BHQK.unflatten(1, (-1, 2)).unbind(2)
        weight = self._weight(maps_BHQK.dtype)
        one_BPQK = first_BPQK - weight * second_BPQK
        other_BPQK = one_BPQK if self.config.form == "paper" else second_BPQK - weight * first_BPQK
        weights_BHQK = torch.stack([one_BPQK, other_BPQK], dim=2).flatten(1, 2)
        out_BHQV = weights_BHQK @ expand_heads(v_BGKV, q_BHQD.shape[1]).to(maps_BHQK.dtype)
        pairs_BPQW = out_BHQV.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
        return self._normed(pairs_BPQW).to(v_BGKV.dtype), weights_BHQK

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, dropout, **options):
        return self._attend(q_BHQD, k_BGKD, v_BGKV, chunk_size=self.config.chunk_size, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, dropout, **options):
        return self._attend(q_BHQD, k_BGKD, v_BGKV, chunk_size=None, **options)

    def _attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        combine = functools.partial(self._combined, self._weight(accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)))
        return attention_of_pairs(q_BHQD, k_BGKD, v_BGKV, mask, combine, **options)

    def _combined(self, weight, first_BPQW, second_BPQW):
        size = first_BPQW.shape[3] // 2
        one_BPQW = first_BPQW - weight * second_BPQW
        other_BPQW = one_BPQW if self.config.form == "paper" else second_BPQW - weight * first_BPQW
        return self._normed(torch.cat([one_BPQW[..., :size], other_BPQW[..., size:]], dim=3))

    def _weight(self, dtype):
        """lambda."""
        q1, k1, q2, k2 = (x.to(dtype) for x in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + self.lambda_init

    def _normed(self, pairs_BPQW):
        """out_BHQV of the outputs of pairs, those of the two heads beside each other."""
        if self.config.form == "paper":
            size, weight = pairs_BPQW.shape[3:], self.norm_weight.to(pairs_BPQW.dtype)
            pairs_BPQW = (1 - self.lambda_init) * rms_norm(pairs_BPQW, size, weight, eps=1e-5)
        return pairs_BPQW.unflatten(3, (2, -1)).transpose(2, 3).flatten(1, 2)
