import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.decode.gated_keys import GatedKeys
from attn_plugins.ops.softmax.path import dense_path_attention, path_attention, steps_of


@register_attention("path")
class PathAttention(Attention):
    """PaTH attention: softmax attention in which every token on the path from a key to a query changes the key.

    ``s_ij = scale q_i^T H_i H_{i-1} ... H_{j+1} k_j``, ``H_t = I - beta_t w_t w_t^T``, ``out_i = sum_j softmax_j(s_ij)
    v_j`` over the visible keys; ``w_t = W x_t`` of unit length and ``beta_t`` of 0 to 2, both of a key/value head, with
    ``z_t = u . x_t + b`` and x_t as ``gate_input`` says:

    - ``form="pretrained"``: ``beta_t = 2 min(max(z_t, 0), 1)``. With ``u = b = 0`` no key is changed, so that it starts
      at what the model computes, and the gradient at 0 is that from above: u and b learn from the first step.
    - ``form="paper"``: ``beta_t = 2 sigmoid(z_t)``, which is 0 for no z; u starts at 0, b at ``initial_beta``.

    ``forget_gate`` adds the forget gates of FoX, made and started as ``forgetting`` has them (over 32 tokens in the
    paper's form). Padding changes nothing. The paper's position is in H alone; here rotary positions stay as they
    come, as the model knows them. Its w go through two small layers and a short convolution over three tokens.

    Chunks solve a triangular system each, then blocks are joined by halves, which is quadratic in N for the scores
    alone. A cache holds keys as the tokens so far have left them, in float32.

    Limit case: equals softmax attention at its start, before training.
    """

    family = "dense"
    cost = "O(N^2 D + N D^2 log N), memory O(N D log N)"
    keeps = "all keys, in float32, and values; with forget_gate a log gate of each for every query head"
    paper = "Yang et al. 2025, PaTH Attention, arXiv:2505.16381, eq. 2 to 7"
    when = "To fine-tune from exactly what the model computes, where what a token means depends on what came between."
    causal = any_mask = segments = softcap = sinks = dropout = True
    head_weights = ("*",)
    limit: ClassVar = {}
    examples = (
        {"chunk_size": 4},
        {"chunk_size": 4, "gate_input": "hidden"},
        {"chunk_size": 4, "form": "paper", "initial_beta": 0.5, "forget_gate": True},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        form: Literal["pretrained", "paper"] = "pretrained"
        """How beta is made, and where it starts: at 0, as the model was trained, or as the paper has it."""
        gate_input: Literal["value", "hidden"] = "value"
        """What w, beta and gates are made of: the token's value in its head, or its hidden state, the layer's input."""
        forget_gate: bool = False
        """Whether scores fade too, by a gate of each query head and token (PaTH-FoX)."""
        initial_beta: float = 1.0
        """Where beta starts with ``form="paper"``, between 0 and 2."""
        chunk_size: int = 32
        """Tokens of a triangular system; changes the speed and not the result."""

        def __post_init__(self):
            super().__post_init__()
            self.require(0 < self.initial_beta < 2, "initial_beta", "a number between 0 and 2")
            self.require(self.chunk_size >= 1, "chunk_size", "an integer from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'path' has weights a head and needs the sizes of the heads, got None")
        self.wants_hidden = self.wants_hidden_of_keys = config.gate_input == "hidden"
        self.gated_by_values = not self.wants_hidden
        size, groups = (
            heads.known_hidden_size(self.name) if self.wants_hidden else heads.value_dim,
            heads.num_key_value_heads,
        )
        self.direction_weight = nn.Parameter(torch.empty(groups, heads.head_dim, size))
        self.beta_weight, self.beta_bias = nn.Parameter(torch.empty(groups, size)), nn.Parameter(torch.empty(groups))
        if config.forget_gate:
            self.gate_weight = nn.Parameter(torch.empty(heads.num_heads, size))
            self.gate_bias = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters()

    def reset_parameters(self):
        paper, share = self.config.form == "paper", self.config.initial_beta / 2
        nn.init.normal_(self.direction_weight, std=self.direction_weight.shape[2] ** -0.5)
        nn.init.zeros_(self.beta_weight)
        nn.init.constant_(self.beta_bias, math.log(share / (1 - share)) if paper else 0.0)
        if self.config.forget_gate:
            nn.init.zeros_(self.gate_weight)
            nn.init.constant_(self.gate_bias, -math.log(math.expm1(1 / 32)) if paper else 0.0)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, hidden_BQE=None, gates_of_BGKV=None, **options):
        steps = self._steps(v_BGKV, hidden_BQE, gates_of_BGKV)
        return dense_path_attention(q_BHQD, k_BGKD, v_BGKV, mask, steps, **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, hidden_BQE=None, gates_of_BGKV=None, batched=False, **options):
        steps = self._steps(v_BGKV, hidden_BQE, gates_of_BGKV)
        how = {"chunk_size": self.config.chunk_size, "batched": batched}
        return path_attention(q_BHQD, k_BGKD, v_BGKV, mask, steps, **how, **options)

    def attend_batched(self, *tensors, **options):
        return self.attend(*tensors, batched=True, **options)

    def new_state(self, fixed_length=None):
        return GatedKeys(fixed_length, moving=True)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, hidden_BKE=None, **options):
        batched = self.prefers_batched(q_BHQD)
        return self.attend(q_BHQD, k_BGKD, v_BGKV, hidden_BQE=hidden_BKE, batched=batched, **options)

    def _steps(self, v_BGKV, hidden_BKE, gates_of_BGKV):
        x = next(one for one in (hidden_BKE, gates_of_BGKV, v_BGKV) if one is not None)
        gate = (self.gate_weight, self.gate_bias) if self.config.forget_gate else None
        beta = (self.beta_weight, self.beta_bias)
        return steps_of(x, self.direction_weight, beta, gate, paper=self.config.form == "paper")
