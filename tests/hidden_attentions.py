"""Two attentions that want hidden states, for tests: of the queries, and of every key."""

import torch
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.core.decode_state import State
from attn_plugins.ops.reference import dense_attention, expand_heads


class GatedOutput(Attention):
    """Softmax attention times ``sigmoid(w_h . hidden_i)``. Limit case: none."""

    name, cost, paper = "gated_output", "O(N^2 D)", "none"
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = sinks = dropout = True
    convex = subquadratic = False
    wants_hidden = symbolic_length = True

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        self.gate_weight = nn.Parameter(torch.empty(heads.num_heads, heads.hidden_size))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.gate_weight)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, hidden_BQE, **options):
        out_BHQV, weights_BHQK = dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), **options)
        gate_BHQ1 = torch.sigmoid(hidden_BQE @ self.gate_weight.to(hidden_BQE.dtype).mT).mT.unsqueeze(3)
        return out_BHQV * gate_BHQ1.to(out_BHQV.dtype), weights_BHQK * gate_BHQ1

    def attend(self, *tensors, **options):
        return self.reference(*tensors, **options)[0]


class Total(State):
    """The sum of the gated values so far, (B, G, V) in float64."""

    supports_fixed_length = True

    def start(self, v_BGKV):
        if not self.tensors:
            self.tensors = {"total": v_BGKV.new_zeros(*v_BGKV.shape[:2], v_BGKV.shape[3], dtype=torch.float64)}
        return self.tensors["total"]

    def add(self, total_BGV, number):
        if self.fixed_length is None or total_BGV.requires_grad:
            self.tensors["total"] = total_BGV
        else:
            self.tensors["total"].copy_(total_BGV)
        self.advance(number)


class GatedSum(Attention):
    """``out_i = sum_{j <= i} sigmoid(w_g . hidden_j) v_j``, queries and keys unread. Limit case: none."""

    name, cost, paper, keeps = "gated_sum", "O(N V)", "none", "V sums"
    causal = segments = True
    convex = subquadratic = False
    wants_hidden = wants_hidden_of_keys = symbolic_length = True

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        self.gate_weight = nn.Parameter(torch.empty(heads.num_key_value_heads, heads.hidden_size))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.gate_weight)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, hidden_BQE):
        gate_BGK1 = torch.sigmoid(hidden_BQE.double() @ self.gate_weight.double().mT).mT.unsqueeze(3)
        weights_BHQK = expand_heads(gate_BGK1, q_BHQD.shape[1]).mT * mask.dense()
        return (weights_BHQK @ expand_heads(v_BGKV, q_BHQD.shape[1]).double()).to(v_BGKV.dtype), weights_BHQK

    def attend(self, *tensors, **options):
        return self.reference(*tensors, **options)[0]

    def new_state(self, fixed_length=None):
        return Total(fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, scale, dropout, hidden_BKE):
        new, before_BGV = k_BGKD.shape[2], state.start(v_BGKV)
        gate_BGK1 = torch.sigmoid(hidden_BKE.double() @ self.gate_weight.double().mT).mT.unsqueeze(3)
        if mask.padding_BK is not None:
            place = torch.arange(new) + state.position
            gate_BGK1 = gate_BGK1 * mask.padding_BK[:, place][:, None, :, None]
        totals_BGKV = before_BGV.unsqueeze(2) + (gate_BGK1 * v_BGKV.double()).cumsum(dim=2)
        state.add(totals_BGKV[:, :, -1], new)
        out_BGQV = totals_BGKV[:, :, new - q_BHQD.shape[2] :].to(v_BGKV.dtype)
        return expand_heads(out_BGQV, q_BHQD.shape[1])


class Pairs(Attention):
    """Softmax attention that serves heads in pairs only. Limit case: none."""

    name, cost, paper = "pairs", "O(N^2 D)", "none"
    causal = bidirectional = True
    heads_multiple_of = 2

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), **options)

    def attend(self, *tensors, **options):
        return self.reference(*tensors, **options)[0]
