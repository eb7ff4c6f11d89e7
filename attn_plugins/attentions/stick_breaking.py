from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import logsigmoid, pad

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.query_chunks import bias_of, in_large_chunks, in_query_chunks, visible_pairs
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, scores, with_dropout

HIDDEN = -1e30
"""Score of a key that is not visible: finite, so that no gradient is NaN."""


@register_attention("stick_breaking")
class StickBreakingAttention(Attention):
    """Stick-breaking attention: from the nearest key back, each takes its share of what those after it have left.

    ``w_ij = beta_ij prod_{j < k <= i} (1 - beta_ik)``, ``out_i = sum_j w_ij v_j`` over the visible keys, with
    ``beta_ij = sigmoid(z_ij)``, ``z_ij = s_ij - (1 - g) log(1 + sum_{k < j} exp(s_ik))`` and the model's own scores s.
    Products are sums of logsigmoid, in at least float32. The gate g is learned for each query head:

    - ``g = 1`` is the paper's stick breaking, z = s: position follows from order, and a far key counts only where all
      nearer ones have passed.
    - ``g = 0`` is softmax attention with one more in the denominator (softmax_plus_one): broken with these logits, the
      stick falls into exactly those pieces.

    The gate is this package's, so that a pretrained model starts from about what it computes: its scores are large, and
    without the gate the nearest key above 0 takes all. ``initial_gate=1`` with ``attend_current=False`` is the paper,
    whose queries do not see their own key. Its keys and queries have no rotary positions; here they come as they are.

    Time is quadratic in N, memory isn't: queries are treated ``chunk_size`` at a time, and again in backward.

    Limit case: none.
    """

    family = "dense"
    cost = "O(N^2 D), memory O(chunk_size N)"
    paper = "Tan et al. 2024, Scaling Stick-Breaking Attention, arXiv:2410.17980, eq. 1 to 4"
    when = "With training: recency by content in place of position embeddings, for lengths beyond those trained on."
    causal = any_mask = segments = position_bias = softcap = dropout = True
    head_weights = ("*",)
    symbolic_length = True
    convex = False
    examples = ({"chunk_size": 8}, {"chunk_size": 8, "initial_gate": 1.0})

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        initial_gate: float = 0.0
        """Where g starts: 0 is near what the model was pretrained with, 1 is stick breaking alone."""
        attend_current: bool = True
        """Whether a query sees the key of its own token."""
        chunk_size: int = 128
        """Queries treated at a time on a CPU; memory grows with it and the result does not change."""

        def __post_init__(self):
            super().__post_init__()
            self.require(self.chunk_size >= 1, "chunk_size", "an integer from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'stick_breaking' has weights a head and needs the sizes of the heads, got None")
        self.gate = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.gate, self.config.initial_gate)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, **options):
        whole = slice(0, mask.q_length), slice(0, mask.kv_length)
        v_BHKV, gate_H = self._wide(q_BHQD, k_BGKD, v_BGKV)
        out_BHQV, weights_BHQK = _attend(q_BHQD, k_BGKD, v_BHKV, self._visible(mask, *whole), gate_H, **options)
        return out_BHQV.to(v_BGKV.dtype), weights_BHQK

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, dropout, **options):
        chunk = self._chunk(q_BHQD, k_BGKD, v_BGKV, mask=mask, dropout=dropout, **options)
        return in_query_chunks(chunk, mask, self.config.chunk_size, dropout=dropout).to(v_BGKV.dtype)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, dropout, **options):
        chunk = self._chunk(q_BHQD, k_BGKD, v_BGKV, mask=mask, dropout=dropout, **options)
        return in_large_chunks(chunk, mask, q_BHQD.shape[1], dropout=dropout).to(v_BGKV.dtype)

    def _chunk(self, q_BHQD, k_BGKD, v_BGKV, *, mask, dropout, position_bias=None, **options):
        v_BHKV, gate_H = self._wide(q_BHQD, k_BGKD, v_BGKV)
        q_BHQD, k_BGKD = q_BHQD.to(v_BHKV.dtype), k_BGKD.to(v_BHKV.dtype)

        def attend(queries, keys):
            options_of = {"position_bias": bias_of(position_bias, queries, keys), "dropout": dropout, **options}
            q, k, v = q_BHQD[:, :, queries], k_BGKD[:, :, keys], v_BHKV[:, :, keys]
            return _attend(q, k, v, self._visible(mask, queries, keys), gate_H, **options_of)[0]

        return attend

    def _wide(self, q_BHQD, k_BGKD, v_BGKV):
        """Values of each query head, and gates, in the dtype of sums."""
        dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
        return expand_heads(v_BGKV, q_BHQD.shape[1]).to(dtype), self.gate.to(dtype)

    def _visible(self, mask, queries, keys):
        visible = visible_pairs(mask, queries, keys)
        if self.config.attend_current:
            return visible
        q_index, k_index = (torch.arange(part.start, part.stop, device=visible.device) for part in (queries, keys))
        own = mask.key_positions(k_index.view(1, 1, -1)) == q_index.view(1, -1, 1) + mask.q_offset
        return visible & ~own.unsqueeze(1)


def _attend(q_BHQD, k_BGKD, v_BHKV, visible, gate_H, *, dropout, **options):
    """(out_BHQV, weights_BHQK)."""
    s_BHQK = scores(q_BHQD, k_BGKD, **options).masked_fill(~visible, HIDDEN)
    before_BHQK = torch.logcumsumexp(pad(s_BHQK, (1, 0)), dim=-1)[..., :-1]
    z_BHQK = s_BHQK - (1 - gate_H)[:, None, None] * before_BHQK
    passed_BHQK = logsigmoid(-z_BHQK).masked_fill(~visible, 0.0)
    after_BHQK = pad(passed_BHQK.flip(-1), (1, 0))[..., :-1].cumsum(dim=-1).flip(-1)
    weights_BHQK = torch.exp(logsigmoid(z_BHQK) + after_BHQK).masked_fill(~visible, 0.0)
    weights_BHQK = with_dropout(weights_BHQK, dropout)
    return weights_BHQK @ v_BHKV, weights_BHQK
