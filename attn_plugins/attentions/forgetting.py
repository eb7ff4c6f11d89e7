import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.decode.gated_keys import GatedKeys
from attn_plugins.ops.reference import accumulation_dtype
from attn_plugins.ops.softmax.forgetting import (
    batched_forgetting_attention,
    dense_forgetting_attention,
    forgetting_attention,
    log_gates,
    of_tokens,
)


@register_attention("forgetting")
class ForgettingAttention(Attention):
    """Forgetting attention (FoX): softmax attention whose scores fade by a forget gate of every token in between.

    ``out_i = sum_j softmax_j(s_ij + sum_{j < l <= i} log f_l) v_j`` over the visible keys, with the model's own
    scores s and a gate ``f_t <= 1`` of each query head, made of ``z_t = w . x_t + b``, x_t as ``gate_input`` says:

    - ``form="pretrained"``: ``log f_t = -max(z_t, 0)``. With ``w = b = 0`` all gates are 1 exactly, so that it starts
      at what the model computes, and the gradient at 0 is that from above: w and b learn from the first step.
    - ``form="paper"``: ``log f_t = -log(1 + exp(-z_t))``, a sigmoid, which is 1 for no z; w starts at 0, and b where a
      head fades to 1/e over ``initial_memory`` tokens.

    Tokens that are padding have no gate; those that a mask of the model's own hides have. The paper's gates are of the
    layer's input, as with ``gate_input="hidden"``; it has no rotary positions, which stay here, and a block around it
    with norms and an output gate, which is not part of it.

    Time is quadratic in N, memory isn't: weights are formed a tile at a time, and again in the backward.

    Limit case: equals softmax attention at its start, before training.
    """

    family = "dense"
    cost = "O(N^2 D), memory O(N D)"
    keeps = "all keys and values, and a log gate of each for every query head"
    paper = (
        "Lin et al. 2025, Forgetting Transformer: Softmax Attention with a Forget Gate, arXiv:2503.02130, eq. 4 to 8"
    )
    when = "To fine-tune from exactly what the model computes, where old tokens should count less, or for longer texts."
    causal = any_mask = segments = position_bias = softcap = sinks = dropout = True
    head_weights = ("*",)
    symbolic_length = True
    limit: ClassVar = {}
    examples = ({}, {"gate_input": "hidden"}, {"form": "paper", "initial_memory": 3.0})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        form: Literal["pretrained", "paper"] = "pretrained"
        """How a gate is made, and where it starts: at 1, as the model was trained, or as the paper has it."""
        gate_input: Literal["value", "hidden"] = "value"
        """What gates are made of: the token's value in its head, or its hidden state, the layer's input, which only a
        cache of the attention's own has: where a model needs an ordinary one (T5), it generates without a cache."""
        initial_memory: float = 32.0
        """Tokens over which a head fades to 1/e before training, with ``form="paper"``."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.initial_memory > 0, "initial_memory", "a number above 0")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'forgetting' has weights a head and needs the sizes of the heads, got None")
        self.wants_hidden = self.wants_hidden_of_keys = config.gate_input == "hidden"
        self.gated_by_values = not self.wants_hidden
        size = heads.known_hidden_size(self.name) if self.wants_hidden else heads.value_dim
        self.gate_weight = nn.Parameter(torch.empty(heads.num_heads, size))
        self.gate_bias = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.gate_weight)
        # sigmoid(bias) = exp(-1 / memory)
        fade = 1 / self.config.initial_memory
        paper = self.config.form == "paper"
        nn.init.constant_(self.gate_bias, -fade - math.log(-math.expm1(-fade)) if paper else 0.0)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, hidden_BQE=None, gates_of_BGKV=None, **options):
        gates = self._gates(v_BGKV, hidden_BQE, gates_of_BGKV)
        return dense_forgetting_attention(q_BHQD, k_BGKD, v_BGKV, mask, gates, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, hidden_BQE=None, gates_of_BGKV=None, **options):
        gates = self._gates(v_BGKV, hidden_BQE, gates_of_BGKV)
        return forgetting_attention(q_BHQD, k_BGKD, v_BGKV, mask, gates, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, hidden_BQE=None, gates_of_BGKV=None, **options):
        gates = self._gates(v_BGKV, hidden_BQE, gates_of_BGKV)
        return batched_forgetting_attention(q_BHQD, k_BGKD, v_BGKV, mask, gates, **options)

    def new_state(self, fixed_length=None):
        return GatedKeys(fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, hidden_BKE=None, **options):
        first, gates = not state.begun, self._gates(v_BGKV, hidden_BKE)
        state.append(k_BGKD, v_BGKV, gates, mask)
        if not first:
            k_BGKD, v_BGKV, gates, mask = state.seen_by(mask)
        many = first or (q_BHQD.shape[2] > 1 and mask.positions_BK is None)
        form = forgetting_attention if many and not self.prefers_batched(q_BHQD) else batched_forgetting_attention
        return form(q_BHQD, k_BGKD, v_BGKV, mask, gates, **options)

    def _gates(self, v_BGKV, hidden_BKE=None, gates_of_BGKV=None):
        """log f, (B, H, K), in at least float32."""
        x = next(one for one in (hidden_BKE, gates_of_BGKV, v_BGKV) if one is not None)
        z_BHK = of_tokens(x, self.gate_weight, self.gate_bias, accumulation_dtype(x))
        return log_gates(z_BHK, paper=self.config.form == "paper")
