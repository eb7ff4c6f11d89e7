import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.blocks import batched_native_sparse, native_sparse
from attn_plugins.ops.decode.block_cache import KeyBlocks


@register_attention("native_sparse")
class NativeSparseAttention(Attention):
    """Native sparse attention (NSA): compressed, selected and window branches, summed by gates.

    ``out_i = sum_b sigmoid(w_b . x_i + c_b) out_b,i``, w and c a query head's own, x_i as ``gate_input`` says, over:

    - compressed: over blocks of ``kernel_size`` keys at every ``kernel_stride``-th token, each a weighted sum of its
      keys and of its values; a causal query sees those that end no later than itself.
    - selected: over the keys of ``topk`` blocks of ``block_size``: its own, causally masked, the ``local_blocks``
      nearest (its own counted; on both sides where attention is not causal), the ``init_blocks`` first, and those to
      whose keys the compressed branch gives most, summed over the query heads of a key/value head, which share the
      choice. It has no gradient; a block to which nothing is given is not chosen.
    - window: over the ``window_size`` nearest keys, itself included, before it (and after, if not causal).

    All three are softmax attentions. Blocks count from the first real token of a row or packed segment; incomplete ones
    are not compressed. Deviations: gates are of the query, or of the hidden state as in the paper; keys and values are
    the same for all branches; compression weighs the positions in a block where the paper has an MLP. Starts from means
    and gates of 0.02, 0.96 and 0.02, w = 0, close to the selected branch: in SmolLM2-135M-Instruct with 4 of 16 blocks
    and a window of 128, the squared error of outputs is 0.05 of their square, and perplexity 16.2 (its own is 14.7).

    Limit case: none; as block_size * topk grows to K the start comes within 4 % of softmax attention.
    """

    family = "sparse"
    cost = "O(N (topk block_size + window_size + N / kernel_stride) D)"
    keeps = "all keys and values, of which it reads topk blocks and a window; compressed blocks"
    paper = "Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089, eq. 5 to 12"
    when = "For long contexts with training: a summary of everything, the best blocks in full, and a window."
    causal = bidirectional = segments = dropout = chooses_blocks = True
    convex, head_weights = False, ("*",)
    examples = (
        {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 4, "local_blocks": 1, "window_size": 5},
        {"kernel_size": 3, "kernel_stride": 5, "block_size": 2, "topk": 6, "init_blocks": 0, "window_size": 1},
        {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 4, "window_size": 5, "gate_input": "hidden"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        kernel_size: int = 32
        """Tokens that are compressed to one."""
        kernel_stride: int = 16
        """Tokens from one compressed block to the next."""
        block_size: int = 64
        """Keys a block of the selection."""
        topk: int = 16
        """Blocks that a query selects, its own and all that it has in any case included."""
        init_blocks: int = 1
        """First blocks of a row or segment that every query selects."""
        local_blocks: int = 2
        """Nearest blocks that a query selects, its own included; to both sides where attention is not causal."""
        window_size: int = 512
        """Keys that the window shows up to and including the query; as many after it where not causal."""
        gate_input: Literal["query", "hidden"] = "query"
        """What gates are made of: the head's query, or the token's hidden state, which is the layer's input."""

        def __post_init__(self):
            super().__post_init__()
            for option in ("kernel_size", "kernel_stride", "block_size", "local_blocks", "window_size"):
                self.require(getattr(self, option) >= 1, option, "an integer from 1 on")
            self.require(self.init_blocks >= 0, "init_blocks", "an integer from 0 on")
            least = self.init_blocks + 2 * self.local_blocks - 1
            self.require(self.topk >= least, "topk", f"init_blocks + 2 local_blocks - 1 = {least} or more")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'native_sparse' has weights a head and needs the sizes of the heads, got None")
        self.wants_hidden, self.sizes = config.gate_input == "hidden", native_sparse.NativeSparseSizes.of(config)
        size = heads.known_hidden_size(self.name) if self.wants_hidden else heads.head_dim
        self.gate_weight = nn.Parameter(torch.empty(heads.num_heads, 3, size))
        gates = (nn.Parameter(torch.empty(heads.num_heads)) for _ in range(3))
        self.compressed_gate, self.selected_gate, self.window_gate = gates
        kernel = (heads.num_key_value_heads, config.kernel_size)
        self.key_weight, self.value_weight = (nn.Parameter(torch.empty(kernel)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.gate_weight)
        for bias, gate in ((self.compressed_gate, 0.02), (self.selected_gate, 0.96), (self.window_gate, 0.02)):
            nn.init.constant_(bias, math.log(gate / (1 - gate)))
        for weight in (self.key_weight, self.value_weight):
            nn.init.constant_(weight, 1 / self.config.kernel_size)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, hidden_BQE=None, **options):
        return self._by(native_sparse.dense_native_sparse_attention, q_BHQD, k_BGKD, v_BGKV, hidden_BQE, options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, hidden_BQE=None, **options):
        return self._by(native_sparse.native_sparse_attention, q_BHQD, k_BGKD, v_BGKV, hidden_BQE, options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, hidden_BQE=None, **options):
        return self._by(batched_native_sparse.native_sparse_attention, q_BHQD, k_BGKD, v_BGKV, hidden_BQE, options)

    def new_state(self, fixed_length=None):
        return KeyBlocks(self.config.block_size, (self.config.kernel_size, self.config.kernel_stride), fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, hidden_BKE=None, **options):
        form = native_sparse if self.chosen(q_BHQD) == "torch" else batched_native_sparse
        options["attend"] = form.native_sparse_attention
        return self._by(native_sparse.native_sparse_from, q_BHQD, k_BGKD, v_BGKV, hidden_BKE, options)

    def _by(self, form, q_BHQD, k_BGKD, v_BGKV, hidden_BKE, options):
        """A form, given the weights of this call, and sizes."""
        x_BHQX = q_BHQD if hidden_BKE is None else hidden_BKE[:, None, -q_BHQD.shape[2] :]
        bias_H3 = torch.stack([self.compressed_gate, self.selected_gate, self.window_gate], dim=1)
        gates_BHQ3 = native_sparse.gates_of(x_BHQX, self.gate_weight, bias_H3)
        weights = native_sparse.NativeSparseWeights(gates_BHQ3, self.key_weight, self.value_weight)
        return form(q_BHQD, k_BGKD, v_BGKV, weights=weights, sizes=self.sizes, **options)
