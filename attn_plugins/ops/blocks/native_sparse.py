"""Native sparse attention: compressed blocks of keys, the choice that they make, and the sum of its three branches.

Letter beside the legend's: M compressed blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks.gather import PLAIN, BlockLayout, SoftmaxForms, block_layout, chosen_keys
from attn_plugins.ops.decode.block_cache import (
    KeyBlocks,
    attention_from_blocks,
    chosen_attention,
    grouped_attention,
    own_blocks,
)
from attn_plugins.ops.reference import (
    accumulation_dtype,
    dense_attention,
    expand_heads,
    masked_softmax,
    outside_autocast,
    scores,
    with_dropout,
)
from attn_plugins.ops.softmax.patterns.band import Band
from attn_plugins.ops.softmax.tile_engine import Tile, attend_tiles, slices, visible_tile
from attn_plugins.ops.softmax.tiles import dense_pattern
from attn_plugins.ops.softmax.topk import round_up

SCORES_AT_ONCE = 2**19
"""Scores with compressed blocks that are worked on at a time."""


@dataclass(frozen=True)
class NativeSparseWeights:
    """What a call brings of what is learned, for a query head or a key/value head."""

    gates_BHQ3: torch.Tensor
    """Of the compressed, the selected and the window branch: :func:`gates_of`."""
    key_weight_GC: torch.Tensor
    value_weight_GC: torch.Tensor
    """How keys and values of a compressed block are summed."""


def gates_of(x_BHQX: torch.Tensor, weight_H3X: torch.Tensor, bias_H3: torch.Tensor) -> torch.Tensor:
    """sigmoid(weight . x + bias), (B, H, Q, 3), of each query's own x; x may be the same for all heads."""
    dtype = accumulation_dtype(x_BHQX, weight_H3X)
    return torch.sigmoid(x_BHQX.to(dtype) @ weight_H3X.to(dtype).mT + bias_H3[:, None].to(dtype))


@dataclass(frozen=True)
class NativeSparseSizes:
    """Sizes of the three branches in keys and blocks, as the attention's options say them."""

    kernel_size: int
    kernel_stride: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int
    window_size: int = 0
    dense_len: int = 0
    """Tokens from the start of a row or segment that select all blocks before them."""
    largest: bool = False
    """Whether a block's score is the largest of the weights of what it shares keys with, else what these give to it."""

    @classmethod
    def of(cls, config: Any, **others: Any) -> "NativeSparseSizes":
        """From an object with attributes of these names, as far as it has them, and others."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(config, name) for name in names if hasattr(config, name)}, **others)

    @property
    def width(self) -> int:
        """The most blocks that a query selects."""
        return max(self.topk, -(-self.dense_len // self.block_size))


@dataclass(frozen=True)
class Compression:
    """Where the compressed blocks of a mask's keys lie: all of real keys of one row or segment, in order."""

    keys_BMC: torch.Tensor
    """(B, M, kernel_size): the keys of each, 0 where a row has fewer blocks."""
    exists_BM: torch.Tensor
    """(B, M): whether there is such a block."""
    last_BM: torch.Tensor
    """(B, M): its last key."""
    start_BM: torch.Tensor
    """(B, M): the first real key of its row or segment."""
    over_BNW: torch.Tensor
    """(B, N, W): which of them share keys with a block of the selection, 0 where there are fewer than W."""
    share_BNW: torch.Tensor
    """(B, N, W): which share of its keys."""
    blocks: BlockLayout
    """The blocks of the selection."""


def compression_of(mask: AttentionMask, sizes: NativeSparseSizes) -> Compression:
    """Compressed blocks at multiples of the stride from where a row or segment starts; made once a forward pass."""
    kernel_size, kernel_stride = sizes.kernel_size, sizes.kernel_stride
    block_size = min(sizes.block_size, mask.kv_length)

    def build() -> Compression:
        blocks, device, length = block_layout(mask, block_size), mask.device, mask.kv_length
        starts_BK = mask.starts_BK().expand(mask.batch_size, -1)
        index = torch.arange(length, device=device)
        not_padding_BK = torch.ones_like(starts_BK, dtype=torch.bool)
        if mask.padding_BK is not None:
            not_padding_BK = mask.padding_BK.expand(mask.batch_size, -1)
        until_BK = torch.nn.functional.pad(not_padding_BK.long().cumsum(dim=1), (1, 0))
        end = (index + kernel_size).clamp(max=length)
        whole_BK = until_BK[:, end] - until_BK[:, :-1] == kernel_size
        whole_BK = whole_BK & (starts_BK[:, end - 1] == starts_BK) & ((index - starts_BK) % kernel_stride == 0)
        # The first keys of whole blocks, in order; rows with fewer end with keys that begin none. A packed text may
        # begin one as soon as the last block is over.
        step = kernel_stride if mask.segments_BK is None else min(kernel_stride, kernel_size)
        most = max(0, length - kernel_size) // step + 1
        first_BM = torch.where(whole_BK, index, length).sort(dim=1).values[:, :most]
        exists_BM = first_BM < length
        first_BM = first_BM.masked_fill(~exists_BM, 0)
        keys_BMC = (first_BM.unsqueeze(-1) + torch.arange(kernel_size, device=device)) * exists_BM.unsqueeze(-1)
        # Of blocks that share keys with [low, low + block_size), the first begins after low - kernel_size.
        low_BN = blocks.keys_BNC[..., 0]
        reach = (block_size + kernel_size - 2) // kernel_stride + 1
        from_BN = torch.searchsorted(torch.where(exists_BM, first_BM, length), low_BN - kernel_size + 1)
        over_BNW = from_BN.unsqueeze(-1) + torch.arange(reach, device=device)
        there = over_BNW < first_BM.shape[1]
        over_BNW = over_BNW.masked_fill(~there, 0)
        begin_BNW = first_BM.gather(1, over_BNW.flatten(1)).view(over_BNW.shape)
        there &= exists_BM.gather(1, over_BNW.flatten(1)).view(over_BNW.shape)
        low = low_BN.unsqueeze(-1)
        shared = torch.minimum(begin_BNW + kernel_size, low + block_size) - torch.maximum(begin_BNW, low)
        share_BNW = shared.clamp(min=0).masked_fill(~there, 0) / kernel_size
        start_BM = starts_BK.gather(1, first_BM)
        return Compression(
            keys_BMC,
            exists_BM,
            first_BM + kernel_size - 1,
            start_BM,
            over_BNW,
            share_BNW.to(torch.float64),
            blocks,
        )

    return mask.cached(("compression", kernel_size, kernel_stride, block_size), build)


@torch.compiler.disable(reason="its loop over the positions of a block would be unrolled")
def compress(x_BGKD: torch.Tensor, weight_GC: torch.Tensor, keys_BMC: torch.Tensor) -> torch.Tensor:
    """(B, G, M, D): sums of the keys or values of each compressed block by ``weight_GC``, in at least float32."""
    return _Compress.apply(x_BGKD, weight_GC, keys_BMC)


class _Compress(torch.autograd.Function):
    """One position of the blocks after the other: as blocks overlap, their keys would be more than all keys."""

    @staticmethod
    def forward(ctx, x_BGKD, weight_GC, keys_BMC):
        ctx.save_for_backward(x_BGKD, weight_GC, keys_BMC)
        groups, size = x_BGKD.shape[1], x_BGKD.shape[3]
        out_BMGD = torch.zeros(
            *keys_BMC.shape[:2], groups, size, dtype=accumulation_dtype(x_BGKD), device=x_BGKD.device
        )
        for picked_BMGD, weight_G1, _ in _positions(x_BGKD, weight_GC.to(out_BMGD.dtype), keys_BMC):
            out_BMGD.addcmul_(picked_BMGD, weight_G1)
        return out_BMGD.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BGMD):
        x_BGKD, weight_GC, keys_BMC = ctx.saved_tensors
        grad_BMGD = grad_BGMD.transpose(1, 2).contiguous()
        batch, groups, length, size = x_BGKD.shape
        dx = torch.zeros(batch * length, groups, size, dtype=grad_BMGD.dtype, device=x_BGKD.device)
        d_weight = []
        for picked_BMGD, weight_G1, index in _positions(x_BGKD, weight_GC.to(grad_BMGD.dtype), keys_BMC):
            dx.index_add_(0, index, (grad_BMGD * weight_G1).flatten(0, 1))
            d_weight.append((picked_BMGD * grad_BMGD).sum(dim=(0, 1, 3)))
        # autograd casts each gradient to the dtype of its input.
        return dx.view(batch, length, groups, size).transpose(1, 2), torch.stack(d_weight, dim=1), None


def _positions(x_BGKD, weight_GC, keys_BMC):
    """For each position of a block, what of x is there, its weight, and its index by row and key."""
    batch, groups, length, size = x_BGKD.shape
    by_token = x_BGKD.transpose(1, 2).reshape(batch * length, groups, size)
    first = torch.arange(batch, device=x_BGKD.device).unsqueeze(1) * length
    for position in range(keys_BMC.shape[2]):
        index = (keys_BMC[..., position] + first).flatten()
        picked = by_token.index_select(0, index).to(weight_GC.dtype)
        yield picked.view(batch, -1, groups, size), weight_GC[:, [position]], index


def visible_blocks(at: slice, number: int, compression: Compression) -> torch.Tensor:
    """(B, T, M): which of the first M compressed blocks queries see, causal ones those that end before or with them."""
    blocks, seen = compression.blocks, slice(number)
    position = blocks.position_Q[at]
    start_BT = blocks.start_BN.gather(1, blocks.block_BK[:, position])
    visible = compression.exists_BM[:, None, seen] & (compression.start_BM[:, None, seen] == start_BT.unsqueeze(2))
    if blocks.causal:
        visible = visible & (compression.last_BM[:, None, seen] <= position.view(1, -1, 1))
    return visible


@torch.no_grad()
def choose_by_weights(
    p_BHTM: torch.Tensor,
    groups: int,
    at: slice,
    compression: Compression,
    sizes: NativeSparseSizes,
) -> torch.Tensor:
    """The blocks that queries of one key/value head see, by the weights of the compressed branch: (B, G, T, topk).

    A block's score is what the compressed blocks' weights, summed over the heads, leave to its keys.
    """
    blocks = compression.blocks
    until = blocks.past(at.indices(len(blocks.position_Q))[1]) if blocks.causal else blocks.start_BN.shape[1]
    return choose_by_scores(block_scores(p_BHTM, groups, compression, until, sizes), at, compression, sizes)


def block_scores(
    p_BHTM: torch.Tensor, groups: int, compression: Compression, until: int, sizes: NativeSparseSizes
) -> torch.Tensor:
    """(B, G, T, N): the score of each of the first ``until`` blocks by the weights of queries."""
    number = p_BHTM.shape[3]
    p_BGTM = p_BHTM if p_BHTM.shape[1] == groups else p_BHTM.unflatten(1, (groups, -1)).sum(dim=2)
    over, share = compression.over_BNW[:, :until], compression.share_BNW[:, :until].to(p_BGTM.dtype)
    share = share.masked_fill(over >= number, 0.0)  # what no query of these sees
    index = over.clamp(max=number - 1).flatten(1)[:, None, None].expand(*p_BGTM.shape[:3], -1)
    given = p_BGTM.gather(-1, index).unflatten(-1, over.shape[1:])
    return _of_blocks(given, share[:, None, None], sizes)


def _of_blocks(given: torch.Tensor, share: torch.Tensor, sizes: NativeSparseSizes) -> torch.Tensor:
    """A block's score by what each compressed block is given, and the share of that one's keys that lies in it."""
    return given.mul_(share > 0).amax(dim=-1) if sizes.largest else given.mul_(share).sum(dim=-1)


def choose_by_scores(
    score_BGTN: torch.Tensor, at: slice, compression: Compression, sizes: NativeSparseSizes
) -> torch.Tensor:
    """(B, G, T, topk) blocks of highest score, of the first N: own first, -1 where there are fewer.

    The first ``init_blocks`` of a row or segment and those less than ``local_blocks`` away are chosen in any case.
    """
    blocks, (batch, groups, queries, number) = compression.blocks, score_BGTN.shape
    own = blocks.block_BK[:, blocks.position_Q[at]].unsqueeze(2)
    start = blocks.start_BN.gather(1, own.squeeze(2)).unsqueeze(2)
    chosen = own.new_full((batch, groups, queries, min(sizes.width, blocks.start_BN.shape[1])), -1)
    chosen[..., 0] = own.squeeze(2).unsqueeze(1)
    if not number or chosen.shape[-1] == 1:
        return chosen
    seen = slice(number)
    block = torch.arange(number, device=own.device)
    there = blocks.not_padding_BNC[:, seen].any(dim=-1).unsqueeze(1) & (blocks.start_BN[:, None, seen] == start)
    there &= (block < own) if blocks.causal else (block != own)
    near = (own - block).abs() < sizes.local_blocks
    near |= (blocks.keys_BNC[:, None, seen, 0] - start) < sizes.init_blocks * blocks.keys_BNC.shape[-1]
    dense = blocks.position_Q[at].view(1, -1, 1) - start < sizes.dense_len
    score = score_BGTN.masked_fill((near | dense).unsqueeze(1), torch.inf).masked_fill(~there.unsqueeze(1), 0.0)
    best = _best(score, min(chosen.shape[-1] - 1, number), dense, sizes)
    chosen[..., 1 : 1 + best.shape[-1]] = best
    return chosen


def _best(score_BGTN: torch.Tensor, number: int, dense_BT1: torch.Tensor, sizes: NativeSparseSizes) -> torch.Tensor:
    """The blocks of highest score beside a query's own, -1 for none: what dense queries may have, topk of others"""
    if sizes.largest:  # neighbours share means, so that scores are often equal: the earlier comes first
        value, index = (x[..., :number] for x in score_BGTN.sort(dim=-1, descending=True, stable=True))
    else:
        value, index = score_BGTN.topk(number, dim=-1)
    beyond_topk = torch.arange(number, device=value.device) >= sizes.topk - 1
    none = (value == 0) | (beyond_topk & ~dense_BT1.unsqueeze(1))
    return index.masked_fill(none, -1)


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def compressed_attention(
    q_BHQD: torch.Tensor,
    k_BGMD: torch.Tensor,
    v_BGMV: torch.Tensor,
    compression: Compression,
    sizes: NativeSparseSizes,
    *,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over compressed blocks, a tile of queries at a time, and the choice by its weights.

    Returns:
        (out_BHQV in the dtype of the compressed values, chosen_BGQT of :func:`choose_by_weights`).
    """
    batch, heads, queries = q_BHQD.shape[:3]
    groups, number = k_BGMD.shape[1:3]
    blocks = compression.blocks
    chosen_BGQT = torch.full(
        (batch, groups, queries, min(sizes.width, blocks.start_BN.shape[1])), -1, device=q_BHQD.device
    )

    def tiles() -> Iterator[Tile]:
        for at in slices(queries, max(1, SCORES_AT_ONCE // (batch * heads * number))):
            seen = number
            if blocks.causal:
                past = compression.exists_BM & (compression.last_BM <= blocks.position_Q[at][-1])
                seen = round_up(int(past.sum(dim=1).max()), number)
            yield visible_tile(visible_blocks(at, seen, compression), at, slice(0, seen))

    def choose(queries: slice, p_BHTM: torch.Tensor) -> None:
        chosen_BGQT[:, :, queries] = choose_by_weights(p_BHTM, groups, queries, compression, sizes)

    out_BHQV = attend_tiles(q_BHQD, k_BGMD, v_BGMV, tiles, look=choose, scale=scale, dropout=dropout)
    return out_BHQV, chosen_BGQT


def native_sparse_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    weights: NativeSparseWeights,
    sizes: NativeSparseSizes,
    *,
    forms: SoftmaxForms = PLAIN,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """The gated sum of the three branches, for masks of causality, padding and segments only.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32.
    """
    compression = compression_of(mask, sizes)
    k_BGMD = compress(k_BGKD, weights.key_weight_GC, compression.keys_BMC)
    v_BGMV = compress(v_BGKV, weights.value_weight_GC, compression.keys_BMC)
    options = {"scale": scale, "dropout": dropout}
    compressed, chosen_BGQT = compressed_attention(q_BHQD, k_BGMD, v_BGMV, compression, sizes, **options)
    tokens, near = (q_BHQD, k_BGKD, v_BGKV, mask), Band(sizes.window_size, sizes.window_size - 1)
    selected = forms.over_blocks(*tokens, chosen_BGQT, block_size=sizes.block_size, **options)
    window = forms.over_pattern(*tokens, near, **options)
    return gated_sum(weights.gates_BHQ3, (compressed, selected, window)).to(v_BGKV.dtype)


def gated_sum(gates_BHQ3: torch.Tensor, branches: Sequence[torch.Tensor]) -> torch.Tensor:
    """The outputs of the three branches by their gates, in the dtype of these."""
    parts = [gate * x.to(gate.dtype) for gate, x in zip(gates_BHQ3.split(1, dim=3), branches, strict=True)]
    return parts[0] + parts[1] + parts[2]


def native_sparse_from(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    state: KeyBlocks,
    attend: Callable[..., torch.Tensor],
    weights: NativeSparseWeights,
    sizes: NativeSparseSizes,
    **options: Any,
) -> torch.Tensor:
    """The same for the last Q of K new tokens and all before them, which ``state`` keeps; it takes the new ones in.

    Args:
        attend: :func:`native_sparse_attention`, or another form of it, for many queries.
    """
    attend = functools.partial(attend, weights=weights, sizes=sizes)
    gather_attend = functools.partial(gather_native_sparse_attention, weights=weights, sizes=sizes)
    kernels = (weights.key_weight_GC, weights.value_weight_GC)
    return attention_from_blocks(q_BHQD, k_BGKD, v_BGKV, mask, state, attend, gather_attend, kernels, **options)


def gather_native_sparse_attention(
    q_BHQD: torch.Tensor,
    position_Q: torch.Tensor,
    state: KeyBlocks,
    weights: NativeSparseWeights,
    sizes: NativeSparseSizes,
    *,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """The same for a few causal queries, the last tokens of ``state``, from what that keeps.

    It touches all compressed blocks and the keys of chosen blocks and of the window.

    Returns:
        out_BHQV in at least float32.
    """
    held, at_Q1, window_size = state.tensors, position_Q.unsqueeze(1), sizes.window_size
    options = {"scale": scale, "dropout": dropout}
    compressed, p_BHQM = gather_compressed_attention(q_BHQD, position_Q, state, sizes, **options)
    chosen_BGQT = gather_choose(p_BHQM, position_Q, state, sizes)
    selected = chosen_attention(q_BHQD, position_Q, state, chosen_BGQT, **options)
    k, v, near_K = state.last(window_size + len(position_Q) - 1)
    visible = (near_K <= at_Q1) & (near_K > at_Q1 - window_size) & (near_K >= 0)
    if state.padded:
        visible = visible & held["not_padding"].index_select(1, near_K.clamp(min=0))[:, None, None, None]
    window, _ = grouped_attention(q_BHQD, k, v, visible, **options)
    return gated_sum(weights.gates_BHQ3, (compressed, selected, window))


def gather_compressed_attention(
    q_BHQD: torch.Tensor, position_Q: torch.Tensor, state: KeyBlocks, sizes: NativeSparseSizes, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few queries to the compressed blocks of a state, and their weights."""
    held, at_Q1 = state.tensors, position_Q.unsqueeze(1)
    number = state.blocks_seen(sizes.kernel_stride, held["whole"].shape[1])
    k_BGMD, v_BGMV = (held[name][:, :, :number] for name in ("k_compressed", "v_compressed"))
    last_M = torch.arange(number, device=at_Q1.device) * sizes.kernel_stride + sizes.kernel_size - 1
    visible_BQM = held["whole"][:, None, :number] & (last_M + state.starts().view(-1, 1, 1) <= at_Q1)
    return grouped_attention(q_BHQD, k_BGMD, v_BGMV, visible_BQM[:, None, None], **options)


@torch.no_grad()
def gather_choose(
    p_BHQM: torch.Tensor,
    position_Q: torch.Tensor,
    state: KeyBlocks,
    sizes: NativeSparseSizes,
) -> torch.Tensor:
    """(B, G, Q, at most topk) blocks, as :func:`choose_by_weights` chooses them."""
    kernel_size, kernel_stride = sizes.kernel_size, sizes.kernel_stride
    groups, size, compressed = state.tensors["k"].shape[1], state.block_size, p_BHQM.shape[3]
    own_BQ1 = own_blocks(position_Q, state).unsqueeze(2)
    own_BGQ1 = own_BQ1.unsqueeze(1).expand(-1, groups, -1, -1)
    number = state.blocks_seen(size, state.tensors["filled"].shape[1])
    width = min(sizes.width - 1, number)
    if not width:
        return own_BGQ1
    # Blocks and compressed blocks count from the same start: which of them share keys is the same in every row.
    block = torch.arange(number, device=own_BQ1.device)
    low_N1 = block.unsqueeze(1) * size
    seen = state.length if state.fixed_length is None else state.fixed_length
    reach = (min(size, seen) + kernel_size - 2) // kernel_stride + 1
    first_N1 = (torch.div(low_N1 - kernel_size, kernel_stride, rounding_mode="floor") + 1).clamp(min=0)
    over_NW = first_N1 + torch.arange(reach, device=block.device)
    begin_NW = over_NW * kernel_stride
    shared = torch.minimum(begin_NW + kernel_size, low_N1 + size) - torch.maximum(begin_NW, low_N1)
    share_NW = shared.clamp(min=0).to(p_BHQM.dtype) / kernel_size
    p_BGQM = p_BHQM.unflatten(1, (groups, -1)).sum(dim=2)
    # What begins behind the last compressed block shares keys only with blocks that no query chooses.
    # As a matrix: index_select of its columns is ten times as fast as that of a last dimension.
    given = p_BGQM.flatten(0, 2).index_select(1, over_NW.clamp(max=compressed - 1).flatten())
    score = _of_blocks(given.view(*p_BGQM.shape[:3], *over_NW.shape), share_NW, sizes)
    there = state.tensors["filled"][:, None, :number] & (block < own_BQ1)
    near = (own_BQ1 - block < sizes.local_blocks) | (block < sizes.init_blocks)
    dense = (position_Q - state.starts().unsqueeze(1)).unsqueeze(2) < sizes.dense_len
    score = score.masked_fill((near | dense).unsqueeze(1), torch.inf).masked_fill(~there.unsqueeze(1), 0.0)
    return torch.cat([own_BGQ1, _best(score, width, dense, sizes)], dim=3)


def dense_native_sparse_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    weights: NativeSparseWeights,
    sizes: NativeSparseSizes,
    *,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through the whole matrix: (out_BHQV in the dtype of v, weights_BHQK in at least float32)."""
    compression, everywhere = compression_of(mask, sizes), slice(None)
    heads, groups = q_BHQD.shape[1], k_BGKD.shape[1]
    options: dict[str, Any] = {"scale": scale, "dropout": dropout}
    dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
    keys = compression.keys_BMC.unsqueeze(1).expand(-1, groups, -1, -1)

    def spread(weight_GC: torch.Tensor) -> torch.Tensor:
        """(B, G, M, K): the weight of each key in each compressed block."""
        weight_BGMC = weight_GC.to(dtype)[:, None] * compression.exists_BM[:, None, :, None]
        zeros = weight_BGMC.new_zeros(*weight_BGMC.shape[:3], k_BGKD.shape[2])
        return zeros.scatter_add(3, keys, weight_BGMC)

    k_BGMD = spread(weights.key_weight_GC) @ k_BGKD.to(dtype)
    visible = visible_blocks(everywhere, k_BGMD.shape[2], compression).unsqueeze(1)
    p_BHQM = masked_softmax(scores(q_BHQD, k_BGMD, scale=scale), visible)
    chosen_BGQT = choose_by_weights(p_BHQM, groups, everywhere, compression, sizes)
    # What a compressed block gets goes to its keys as its values are summed.
    spread_BGMK = spread(weights.value_weight_GC)
    compressed = with_dropout(p_BHQM, dropout) @ expand_heads(spread_BGMK, heads)
    chosen = chosen_keys(expand_heads(chosen_BGQT, heads), compression.blocks)
    selected = dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense() & chosen, **options)[1]
    near = dense_pattern(mask, Band(sizes.window_size, sizes.window_size - 1))
    window = dense_attention(q_BHQD, k_BGKD, v_BGKV, near, **options)[1]
    gates = weights.gates_BHQ3
    weights_BHQK = gates[..., [0]] * compressed + gates[..., [1]] * selected + gates[..., [2]] * window
    out_BHQV = weights_BHQK @ expand_heads(v_BGKV, heads).to(weights_BHQK.dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK
