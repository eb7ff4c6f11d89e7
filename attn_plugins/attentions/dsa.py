from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from attn_plugins.core.learned_choice import LearnsChoice
from attn_plugins.core.options import AttentionConfig
from attn_plugins.core.registry import register_attention
from attn_plugins.ops.blocks import lightning_index
from attn_plugins.ops.blocks.chosen_keys import ON_CPU, attention_by_index, attention_from_index, chosen_by_index
from attn_plugins.ops.decode.indexed_keys import IndexedKeys
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.sizes import scores_at_once


@register_attention("dsa")
class DeepseekSparseAttention(LearnsChoice):
    """DeepSeek Sparse Attention: a small learned index chooses the keys that a query sees, the same for all heads.

    ``I_ts = sum_j w_tj relu(scale q_tj . k_s + c_j)`` with ``index_heads`` index queries and weights w of the token t,
    and one index key a token, of size ``index_dim``; softmax attention over the ``topk`` visible keys s of highest I,
    of equal ones the earlier. They are linear maps of what ``index_input`` says. Scores I are of all pairs.

    Differs from the paper: there the index is made of hidden states, with a norm and rotary positions, without c. The
    choice has no gradient: fine-tuning leaves the index as it is, with gradients of zero. ``transfer_attention``
    teaches it by the paper's loss, cross-entropy of softmax(I) to the model's own weights, the mean over heads.

    Starts, with "query", from the mean score of all heads: index keys are all keys of a token, by a random orthogonal
    projection where ``index_dim`` is less, and c = 8 lets relu pass nearly all. "hidden" starts from random maps.

    Limit case: equals softmax attention when topk >= K.
    """

    family = "sparse"
    cost = "O(N (topk D + N index_heads index_dim / H))"
    keeps = "all keys and values, and the token's index key"
    paper = "DeepSeek-AI 2025, DeepSeek-V3.2, arXiv:2512.02556, eq. 1 to 3"
    when = (
        "For long contexts with a short transfer: which keys a query needs is learned from the model's own attention."
    )
    causal = bidirectional = segments = dropout = True
    limit: ClassVar = {"topk": 50}
    examples = (
        {"topk": 5, "index_heads": 2, "index_dim": 8},
        {"topk": 1, "index_heads": 1, "index_dim": 24},
        {"topk": 6, "index_heads": 3, "index_dim": 4, "index_input": "hidden"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        topk: int = 512
        """Keys that a query sees."""
        index_heads: int = 4
        """Index queries a token."""
        index_dim: int = 128
        """Size of an index query or key."""
        index_input: Literal["query", "hidden"] = "query"
        """What the index is made of: queries and keys of all heads, or hidden states, the layer's input."""

        def __post_init__(self):
            super().__post_init__()
            for option in ("topk", "index_heads", "index_dim"):
                self.require(getattr(self, option) >= 1, option, "an integer from 1 on")

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        if heads is None:
            raise ValueError("attention 'dsa' has weights of all heads and needs the sizes of the heads, got None")
        self.wants_hidden = self.wants_hidden_of_keys = config.index_input == "hidden"
        sizes = heads.num_heads * heads.head_dim, heads.num_key_value_heads * heads.head_dim
        query_size, key_size = (heads.known_hidden_size(self.name),) * 2 if self.wants_hidden else sizes
        self.index_query_weight = nn.Parameter(torch.empty(config.index_heads, config.index_dim, query_size))
        self.index_key_weight = nn.Parameter(torch.empty(config.index_dim, key_size))
        self.head_weight = nn.Parameter(torch.empty(config.index_heads, query_size))
        self.head_bias, self.index_bias = (nn.Parameter(torch.empty(config.index_heads)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.head_weight)
        nn.init.constant_(self.head_bias, 1 / self.config.index_heads)
        nn.init.constant_(self.index_bias, 8.0)
        start_from = None if self.wants_hidden else self.heads
        lightning_index.start_projections(self.index_query_weight, self.index_key_weight, start_from)

    def choice_scores(self, q_BHQD, k_BGKD, *, mask, scale, hidden_BQE=None, **options):
        scores_BQK = self._index(q_BHQD, k_BGKD, scale, hidden_BQE).scores()
        return scores_BQK.masked_fill(~mask.dense().squeeze(1), -torch.inf)

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, scale, dropout, hidden_BQE=None):
        with torch.no_grad():
            chosen = chosen_by_index(self._index(q_BHQD, k_BGKD, scale, hidden_BQE), mask.dense(), self.config.topk)
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, chosen, scale=scale, dropout=dropout)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, hidden_BQE=None, at_once=ON_CPU, **options):
        with torch.no_grad():
            index = self._index(q_BHQD, k_BGKD, options["scale"], hidden_BQE)
        options |= {"topk": self.config.topk, "at_once": at_once}
        return attention_by_index(q_BHQD, k_BGKD, v_BGKV, mask, index, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, **options):
        return self.attend(q_BHQD, k_BGKD, v_BGKV, at_once=scores_at_once(q_BHQD.device), **options)

    def new_state(self, fixed_length=None):
        return IndexedKeys(fixed_length)

    def attend_from(self, q_BHQD, k_BGKD, v_BGKV, *, state, mask, hidden_BKE=None, **options):
        with torch.no_grad():
            index = self._index(q_BHQD, k_BGKD, options["scale"], hidden_BKE)
        state.append(k_BGKD, v_BGKV, index.key_BKI.unsqueeze(1))
        index = index._replace(key_BKI=state.tensors["index"].squeeze(1))
        at_once = scores_at_once(q_BHQD.device) if self.prefers_batched(q_BHQD) else ON_CPU
        return attention_from_index(q_BHQD, state, mask, index, topk=self.config.topk, at_once=at_once, **options)

    def _index(self, q_BHQD, k_BGKD, scale, hidden_BKE):
        of_query, of_key = hidden_BKE, hidden_BKE
        if hidden_BKE is None:
            of_query, of_key = lightning_index.by_token(q_BHQD), lightning_index.by_token(k_BGKD)
        weights = [self.index_query_weight, self.index_key_weight, self.head_weight, self.head_bias, self.index_bias]
        return lightning_index.index_of(of_query[:, -q_BHQD.shape[2] :], of_key, weights, scale=scale)
