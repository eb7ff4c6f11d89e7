"""Native sparse attention on devices that are not a CPU: as :mod:`.native_sparse`, in operations of a fixed number.

The compressed branch is torch's own attention with a table of who sees whom, a large piece of queries at a time. Its
weights, from which blocks are chosen, are computed beside it: torch does not give them away.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks.batched import batched_block_attention, operand_dtype, product_with_sums
from attn_plugins.ops.blocks.native_sparse import (
    Compression,
    NativeSparseSizes,
    NativeSparseWeights,
    block_scores,
    choose_by_scores,
    compression_of,
    gated_sum,
    visible_blocks,
)
from attn_plugins.ops.query_chunks import in_query_chunks
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, outside_autocast
from attn_plugins.ops.sizes import scores_at_once
from attn_plugins.ops.softmax.batched import batched_pattern_attention
from attn_plugins.ops.softmax.patterns.band import Band
from attn_plugins.ops.softmax.tile_engine import slices

COLUMNS = 16
"""Compressed blocks come as a multiple of this, which torch's attention would otherwise copy its table for."""


def native_sparse_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    weights: NativeSparseWeights,
    sizes: NativeSparseSizes,
    *,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """As :func:`attn_plugins.ops.blocks.native_sparse.native_sparse_attention`; may be traced."""
    compression = compression_of(mask, sizes)
    k_BGMD = compress_at_once(k_BGKD, weights.key_weight_GC, compression)
    v_BGMV = compress_at_once(v_BGKV, weights.value_weight_GC, compression)
    options: dict[str, Any] = {"scale": scale, "dropout": dropout}
    seen = Seen(mask, compression, k_BGMD.shape[2])
    chosen_BGQT = choose_at_once(q_BHQD, k_BGMD.detach(), seen, sizes, scale)
    compressed = compressed_attention(q_BHQD, k_BGMD, v_BGMV, mask, seen, **options)
    own = {"block_size": sizes.block_size, "out_dtype": weights.gates_BHQ3.dtype, **options}
    selected = batched_block_attention(q_BHQD, k_BGKD, v_BGKV, mask, chosen_BGQT, **own)
    band = Band(sizes.window_size, sizes.window_size - 1)
    window = batched_pattern_attention(q_BHQD, k_BGKD, v_BGKV, mask, band, **options)
    return gated_sum(weights.gates_BHQ3, (compressed, selected, window)).to(v_BGKV.dtype)


class Seen:
    """Which compressed blocks queries see, as a table that is added to scores."""

    def __init__(self, mask: AttentionMask, compression: Compression, columns: int):
        self.mask, self.compression, self.columns = mask, compression, columns
        self.queries_at_once = max(1, scores_at_once(mask.device) // (mask.batch_size * columns))
        """Queries of which there is a table at a time."""

    def bias(self, at: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(B or 1, 1, T, M) of 0 and -inf, all 0 for a query that sees none; (B or 1, 1, T, 1) whether it sees one."""
        if self.mask.q_length > self.queries_at_once:
            return self._table(at, dtype)
        number = self.compression.keys_BMC.shape[1]
        key = ("compressed blocks", number, self.columns, dtype)
        bias, some = self.mask.cached(key, lambda: self._table(slice(None), dtype))
        return bias[:, :, at], some[:, :, at]

    def _table(self, at: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        number = self.compression.keys_BMC.shape[1]
        visible = visible_blocks(at, number, self.compression)
        if not self.mask.row_starts:
            visible = visible[:1]
        some = visible.any(dim=2, keepdim=True)
        visible = torch.nn.functional.pad(visible, (0, self.columns - number)) | ~some
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
        return bias.unsqueeze(1), some.unsqueeze(1)


def compressed_attention(
    q_BHQD: torch.Tensor,
    k_BGMD: torch.Tensor,
    v_BGMV: torch.Tensor,
    mask: AttentionMask,
    seen: Seen,
    *,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """out_BHQV of softmax attention over compressed blocks, zero for a query that sees none."""
    heads, dtype = q_BHQD.shape[1], operand_dtype(q_BHQD)
    q, k, v = q_BHQD.to(dtype), expand_heads(k_BGMD, heads).to(dtype), expand_heads(v_BGMV, heads).to(dtype)

    def attend(queries: slice, _: slice) -> torch.Tensor:
        bias, some = seen.bias(queries, dtype)
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, queries], k, v, attn_mask=bias, dropout_p=dropout, scale=scale
        )
        return torch.where(some, out, 0.0)

    return in_query_chunks(attend, mask, seen.queries_at_once, dropout=dropout)


@torch.no_grad()
def choose_at_once(
    q_BHQD: torch.Tensor, k_BGMD: torch.Tensor, seen: Seen, sizes: NativeSparseSizes, scale: float
) -> torch.Tensor:
    """(B, G, Q, topk) blocks, as :func:`attn_plugins.ops.blocks.native_sparse.choose_by_weights` chooses them."""
    (batch, heads, queries, size), (groups, columns) = q_BHQD.shape, k_BGMD.shape[1:3]
    at_once, blocks, k = scores_at_once(q_BHQD.device), seen.compression.blocks, k_BGMD.flatten(0, 1).mT
    number = blocks.start_BN.shape[1]

    def scores(at: slice) -> torch.Tensor:
        bias, some = seen.bias(at, k_BGMD.dtype)
        q = q_BHQD[:, :, at].reshape(batch * groups, -1, size)
        p_BHTM = torch.softmax(
            torch.add(bias, product_with_sums(q, k).view(batch, heads, -1, columns), alpha=scale), dim=-1
        )
        return block_scores(p_BHTM, groups, seen.compression, number, sizes).masked_fill_(~some, 0.0)

    # Of a few queries the weights, of more the scores of blocks, which are fewer.
    few, more = (max(1, at_once // (batch * each)) for each in (2 * heads * columns, 3 * groups * number))
    chosen = []
    for low in range(0, queries, more):
        until = min(low + more, queries)
        score = torch.cat([scores(slice(at, min(at + few, until))) for at in range(low, until, few)], dim=2)
        chosen.append(choose_by_scores(score, slice(low, until), seen.compression, sizes))
    return torch.cat(chosen, dim=2)


def compress_at_once(x_BGKD: torch.Tensor, weight_GC: torch.Tensor, compression: Compression) -> torch.Tensor:
    """(B, G, M, D): sums of the keys or values of each compressed block by ``weight_GC``, in at least float32.

    M is a multiple of :data:`COLUMNS`: blocks that do not exist are zeros.
    """
    return _Compress.apply(x_BGKD, weight_GC, compression.keys_BMC, compression.exists_BM)


class _Compress(torch.autograd.Function):
    """A large piece of the blocks after the other: as blocks overlap, their keys are more than all keys."""

    @staticmethod
    def forward(ctx, x_BGKD, weight_GC, keys_BMC, exists_BM):
        ctx.save_for_backward(x_BGKD, weight_GC, keys_BMC, exists_BM)
        weight_CG1 = weight_GC.to(accumulation_dtype(x_BGKD)).mT.unsqueeze(2)
        pieces = [
            picked.mul_(weight_CG1).sum(dim=2).masked_fill_(~exists, 0.0)
            for _, _, picked, exists in _pieces(x_BGKD, keys_BMC, exists_BM)
        ]
        out_BMGD, more = torch.cat(pieces, dim=1), -keys_BMC.shape[1] % COLUMNS
        return torch.nn.functional.pad(out_BMGD.transpose(1, 2), (0, 0, 0, more))

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BGMD):
        x_BGKD, weight_GC, keys_BMC, exists_BM = ctx.saved_tensors
        batch, groups, length, size = x_BGKD.shape
        dx = grad_BGMD.new_zeros(batch * length, groups, size)
        d_weight = grad_BGMD.new_zeros(weight_GC.shape)
        weight_CG1 = weight_GC.to(grad_BGMD.dtype).mT.unsqueeze(2)
        for blocks, index, picked, exists in _pieces(x_BGKD, keys_BMC, exists_BM):
            grad = grad_BGMD[:, :, blocks].transpose(1, 2).masked_fill(~exists, 0.0).unsqueeze(2)
            d_weight += picked.mul_(grad).sum(dim=(0, 1, 4)).mT
            dx.index_add_(0, index, (grad * weight_CG1).flatten(0, 2))
        # autograd casts each gradient to the dtype of its input.
        return dx.view(batch, length, groups, size).transpose(1, 2), d_weight, None, None


def _pieces(x_BGKD, keys_BMC, exists_BM) -> Iterator[tuple[slice, Any, torch.Tensor, torch.Tensor]]:
    """Slices of the blocks, their keys' indices by row and key, these keys (B, M, C, G, D), whether blocks exist."""
    batch, groups, length, size = x_BGKD.shape
    by_token = x_BGKD.transpose(1, 2).reshape(batch * length, groups, size)
    first = torch.arange(batch, device=x_BGKD.device).view(-1, 1, 1) * length
    step = max(1, scores_at_once(x_BGKD.device) // (2 * batch * keys_BMC.shape[2] * groups * size))
    for blocks in slices(keys_BMC.shape[1], step):
        keys = keys_BMC[:, blocks]
        index = (keys + first).flatten()
        picked = by_token.index_select(0, index).to(accumulation_dtype(x_BGKD))
        yield blocks, index, picked.view(*keys.shape, groups, size), exists_BM[:, blocks, None, None]
