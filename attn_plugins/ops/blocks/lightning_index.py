"""The index scores of DeepSeek Sparse Attention: few heads of small queries that share one small key a token.

Letters beside the legend's: J index heads, I size of an index query or key, X size of what they are made of.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear, pad

from attn_plugins.core.heads import HeadShape
from attn_plugins.ops.reference import accumulation_dtype
from attn_plugins.ops.softmax.topk import MULTIPLE


class Index(NamedTuple):
    """What scores are made of, in at least float32."""

    query_BQJI: torch.Tensor
    key_BKI: torch.Tensor
    weight_BQJ: torch.Tensor
    bias_J: torch.Tensor

    def of(self, queries: slice, keys: slice) -> "Index":
        """That of some queries and keys."""
        return Index(self.query_BQJI[:, queries], self.key_BKI[:, keys], self.weight_BQJ[:, queries], self.bias_J)

    def scores(self) -> torch.Tensor:
        """``sum_j w_j relu(q_j . k + c_j)``, (B, Q, K), the same to the bit for equal keys, so that ties are ties."""
        keys = self.key_BKI.shape[1]
        # Zeros keep the ragged end of the matrix product off the keys.
        key = pad(self.key_BKI, (0, 0, 0, -keys % MULTIPLE))
        met = self.query_BQJI.flatten(1, 2) @ key.mT
        met = met.unflatten(1, self.query_BQJI.shape[1:3]) + self.bias_J.unsqueeze(1)
        return (self.weight_BQJ.unsqueeze(2) @ met.relu()).squeeze(2)[..., :keys]


def index_of(
    of_query_BQX: torch.Tensor, of_key_BKY: torch.Tensor, weights: Sequence[torch.Tensor], *, scale: float
) -> Index:
    """What scores are made of.

    Args:
        of_query_BQX, of_key_BKY: what index queries and index keys are linear maps of.
        weights: query_weight_JIX, key_weight_IY, head_weight_JX, head_bias_J, bias_J.
    """
    dtype = accumulation_dtype(of_query_BQX, of_key_BKY, *weights)
    x, y, w, key_w, head, head_bias, bias = (tensor.to(dtype) for tensor in (of_query_BQX, of_key_BKY, *weights))
    query = linear(x, w.flatten(0, 1)).unflatten(2, w.shape[:2]) * scale
    return Index(query, linear(y, key_w), linear(x, head, head_bias), bias)


def by_token(x_BHND: torch.Tensor) -> torch.Tensor:
    """(B, N, H D): what all heads have of a token."""
    return x_BHND.transpose(1, 2).flatten(2)


@torch.no_grad()
def start_projections(query_weight_JIX: torch.Tensor, key_weight_IY: torch.Tensor, heads: HeadShape | None) -> None:
    """Write, in place, weights by which index heads on average have the mean score of all query heads.

    Index keys are an orthogonal map of a token's keys, exact where they are as large as these together and a random
    projection where smaller; index head j has the queries j, j + J, ... of the heads, each mapped as the key of its
    group is.

    Args:
        heads: whose queries and keys the index is made of; None where of something else: random maps, then.
    """
    if heads is None:
        for weight in (query_weight_JIX, key_weight_IY):
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        return
    number, size, _ = query_weight_JIX.shape
    projection = torch.empty_like(key_weight_IY, dtype=torch.float32)
    torch.nn.init.orthogonal_(projection)
    projection *= max(1.0, projection.shape[1] / size) ** 0.5
    key_weight_IY.copy_(projection)
    of_group = projection.unflatten(1, (heads.num_key_value_heads, -1)).unbind(1)
    query_weight_JIX.zero_()
    of_head = query_weight_JIX.unflatten(2, (heads.num_heads, -1))
    for head in range(heads.num_heads):
        group = head // (heads.num_heads // heads.num_key_value_heads)
        of_head[head % number, :, head] = of_group[group] * (number / heads.num_heads)
