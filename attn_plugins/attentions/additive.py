from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.additive.additive import additive_attention, dense_additive_attention


@register_attention("additive")
class AdditiveAttention(Attention):
    """Bahdanau's additive attention, entered from the dot products of a pretrained model.

    ``s_ij = (1 - g) scale q_i . k_j + v^T tanh(W_q q_i + W_k k_j)``, ``out_i = sum_j softmax_j(s_ij) v_j`` over the
    visible keys. Queries and keys come with their rotary positions. ``W_q``, ``v`` and the gate ``g`` are learned for
    each query head, ``W_k`` for each key/value head. ``g = 0`` is the pretrained end, ``g = 1`` purely additive; g is
    not limited.

    Units come in pairs of twins: same weights at the start, v of opposite sign. So the additive score starts at exactly
    zero and the whole at softmax attention, while every weight, gate included, has a gradient from the first step.
    Projections are limited to -20..20, where tanh is flat.

    Time is quadratic in N. Queries are treated ``tile_size`` at a time, forward and backward, so memory is not.

    Limit case: equals softmax attention at its start, before training.
    """

    family = "additive"
    cost = "O(N^2 (hidden_dim + D)), memory O(tile_size N)"
    paper = (
        "Bahdanau et al. 2014, Neural Machine Translation by Jointly Learning to Align and Translate, arXiv:1409.0473"
    )
    when = (
        "To fine-tune with additive scores from exactly what the model computes; for interpretable weights, "
        "not for speed."
    )
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = sinks = dropout = True
    head_weights = ("*",)
    symbolic_length = True
    limit: ClassVar = {"hidden_dim": 8, "tile_size": 8}
    examples = ({"hidden_dim": 4, "tile_size": 8}, {"hidden_dim": 4, "initial_gate": 1.0})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        hidden_dim: int = 16
        """Units of the additive score a head, twins counted, so an even number."""
        tile_size: int = 128
        """Queries treated at a time on a CPU; memory grows with it and the result does not change."""
        initial_gate: float = 0.0
        """Where g starts: 0 is what the model was pretrained with, 1 leaves the dot product out."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.hidden_dim >= 2 and self.hidden_dim % 2 == 0, "hidden_dim", "an even integer from 2 on")
            self.require(self.tile_size >= 1, "tile_size", "an integer from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'additive' has weights a head and needs the sizes of the heads, got None")
        units, head_dim = config.hidden_dim // 2, heads.head_dim
        self.query_weight = nn.Parameter(torch.empty(heads.num_heads, units, head_dim))
        self.query_weight_twin = nn.Parameter(torch.empty(heads.num_heads, units, head_dim))
        self.key_weight = nn.Parameter(torch.empty(heads.num_key_value_heads, units, head_dim))
        self.key_weight_twin = nn.Parameter(torch.empty(heads.num_key_value_heads, units, head_dim))
        self.score_weight = nn.Parameter(torch.empty(heads.num_heads, units))
        self.score_weight_twin = nn.Parameter(torch.empty(heads.num_heads, units))
        self.gate = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.gate, self.config.initial_gate)
        for weight, twin in (
            (self.query_weight, self.query_weight_twin),
            (self.key_weight, self.key_weight_twin),
            (self.score_weight, self.score_weight_twin),
        ):
            std = weight.shape[-1] ** -0.5
            with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
                nn.init.normal_(weight, std=std)
            nn.init.normal_(twin, std=std)  # the same numbers again: the fork has put the generator back

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return dense_additive_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), **self._weights(), **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        tile_size = self.config.tile_size
        return additive_attention(q_BHQD, k_BGKD, v_BGKV, mask, **self._weights(), tile_size=tile_size, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return additive_attention(q_BHQD, k_BGKD, v_BGKV, mask, **self._weights(), tile_size=None, **options)

    def _weights(self):
        """Twins side by side: unit 2 n and unit 2 n + 1, the second with its sign turned."""
        w_q_HED = torch.stack([self.query_weight, self.query_weight_twin], dim=2).flatten(1, 2)
        w_k_GED = torch.stack([self.key_weight, self.key_weight_twin], dim=2).flatten(1, 2)
        w_HE = torch.stack([self.score_weight, -self.score_weight_twin], dim=2).flatten(1, 2)
        return {"w_q_HED": w_q_HED, "w_k_GED": w_k_GED, "w_HE": w_HE, "gate_H": self.gate}
