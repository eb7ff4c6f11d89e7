from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.parts.gathered import with_all_keys
from attn_plugins.ops.reference import accumulation_dtype, dense_attention
from attn_plugins.ops.softmax.whole import whole_attention


@register_attention("gated_softmax")
class GatedSoftmaxAttention(Attention):
    """Gated attention: softmax attention whose output is gated by what the query's token is, head by head.

    ``out_i = g_i * sum_j softmax_j(scale q_i . k_j) v_j`` over the visible keys, with ``g_i = 2 sigmoid(W_h x_i)`` of
    each query head and x_i the token's hidden state, the layer's input. With ``gate="head"`` g_i is one number, with
    ``gate="element"`` one for each entry of the head's output, as the paper found best. A gate near 0 lets a head add
    nothing, which a model without gates does by attending to its first token.

    Starts from W = 0, where all gates are 1, so that it computes what the model was pretrained with, and W has a
    gradient. The factor 2 is for that alone: the paper's gates are half of these, which its output projection, that is
    trained with them, makes up for.

    It runs torch's scaled_dot_product_attention wherever that supports the call, as softmax attention does.

    Limit case: equals softmax attention at its start, before training.
    """

    family = "dense"
    cost = "O(N^2 D)"
    paper = "Qiu et al. 2025, Gated Attention for Large Language Models, arXiv:2505.06708, eq. 5, position G1"
    when = "To fine-tune from exactly what the model computes, against attention sinks and large activations."
    variants = "a head, an element"
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = sinks = dropout = True
    wants_hidden = unwritten_keys = in_parts = True
    symbolic_length = True
    convex = False
    subquadratic = False
    head_weights = ("*",)
    limit: ClassVar = {}
    examples = ({}, {"gate": "element"})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        gate: Literal["head", "element"] = "head"
        """What has a gate of its own: a head, or each entry of its output, of which weights then say nothing."""

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'gated_softmax' has weights a head and needs the sizes of the heads, got None")
        self.linear_in_values = config.gate == "head"
        gates = 1 if config.gate == "head" else heads.value_dim
        self.gate_weight = nn.Parameter(torch.empty(heads.num_heads, heads.known_hidden_size(self.name), gates))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.gate_weight)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, hidden_BQE, **options):
        out_BHQV, weights_BHQK = dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), **options)
        gate = self._gate(hidden_BQE)
        if self.config.gate == "head":
            weights_BHQK = weights_BHQK * gate.to(weights_BHQK.dtype)
        return (out_BHQV * gate).to(v_BGKV.dtype), weights_BHQK

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, hidden_BQE, **options):
        out_BHQV = whole_attention(q_BHQD, k_BGKD, v_BGKV, **options)
        return (out_BHQV * self._gate(hidden_BQE)).to(v_BGKV.dtype)

    def attend_part(self, q_BHTD, k_BGTD, v_BGTV, *, part, mask, **options):
        k_BGKD, v_BGKV, mask = with_all_keys(k_BGTD, v_BGTV, part)
        return self.attend(q_BHTD, k_BGKD, v_BGKV, mask=mask, **options)

    def _gate(self, hidden_BQE):
        """(B, H, Q, V or 1), in at least float32."""
        dtype = accumulation_dtype(hidden_BQE)
        return 2 * torch.sigmoid(hidden_BQE.to(dtype).unsqueeze(1) @ self.gate_weight.to(dtype))
