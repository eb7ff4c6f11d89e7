"""Block-sparse softmax attention over blocks of keys that each query selects: O(pairs) time, memory for their indices.

A gather of the selected keys for each query would be N x topk x block_size x D. Instead, as in MoBA, (query, block)
pairs are sorted by block and cut into tiles that share a block; a tile is two dense matrix products, and the partial
sums of a query are accumulated. Scores stay in the CPU's cache and are computed again in the backward.

A softmax subtracts a number from the scores before the exponential. The row maximum would take a pass of its own over
all scores; the query's score with its own key does as well, as long as no score is higher by more than floats can hold.
Where one is, the maximum is computed after all. Scores are in units of ln 2, as 2^x takes a third of the time of e^x on
CPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import readable
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, outside_autocast
from attn_plugins.ops.softmax.tiles import tiled_attention

LOG2_E = 1.4426950408889634
LARGEST_TILE = 128
"""Pairs that are multiplied with one block at a time."""
SCORES_AT_ONCE = 2**17
"""Scores worked on at a time, few enough for the CPU's cache and enough to hide what an operation costs by itself."""
LARGEST_TOTAL = 1e20
"""Sum of exponentials up to which no product with values overflows."""


class SoftmaxForms(NamedTuple):
    """What computes the softmax attention that an attention is made of, once it has chosen blocks."""

    over_blocks: Callable[..., torch.Tensor]
    """With the arguments of :func:`block_attention`."""
    over_pattern: Callable[..., torch.Tensor]
    """With those of :func:`attn_plugins.ops.softmax.tiles.tiled_attention`."""


@runtime_checkable
class ChoosesBlocks(Protocol):
    """An attention that is, or is in part, softmax attention over the visible keys of blocks that each query chooses.

    A capability, not a base: kernels that take numbers of blocks serve whatever has it. All else may be plain PyTorch.
    """

    chooses_blocks: bool
    """That it has it: its ``attend`` takes ``forms=``, which are :data:`PLAIN` else."""

    def attend(self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, **options: Any) -> torch.Tensor:
        """As :meth:`attn_plugins.core.attention.Attention.attend`."""


@dataclass(frozen=True)
class BlockLayout:
    """Where the blocks of a mask's keys lie. C is the block size, N the number of blocks of the longest row."""

    block_BK: torch.Tensor
    """(B, K): the block of each key, counted from the beginning of its row."""
    keys_BNC: torch.Tensor
    """(B, N, C): the keys of each block, 0 where it has fewer."""
    not_padding_BNC: torch.Tensor
    """(B, N, C): whether that key exists and is no padding."""
    start_BN: torch.Tensor
    """(B, N): the first real key of the row or segment that the block belongs to."""
    position_Q: torch.Tensor
    """(Q,): the queries' places among the keys."""
    causal: bool
    before_queries: int
    """Keys before the first query."""
    packed: bool

    def past(self, queries: int, *, look: bool = True) -> int:
        """The most blocks that lie before the own block of one of the first ``queries`` queries.

        Args:
            look: where that does not follow from shapes, it may be found in the values.
        """
        number, block_size = self.keys_BNC.shape[1:]
        last = self.before_queries + queries - 1
        if not self.packed:
            return min(number, -(-last // block_size))
        own_B = self.block_BK[:, last]
        return int(own_B.max()) if look and readable(own_B) else number


def block_layout(mask: AttentionMask, block_size: int) -> BlockLayout:
    """Blocks counted from the first real key of each row or segment; made once a forward pass."""
    block_size = min(block_size, mask.kv_length)  # no row has more keys, and a longer block would be filled up

    def build() -> BlockLayout:
        starts_BK = mask.starts_BK().expand(mask.batch_size, -1)
        index = torch.arange(mask.kv_length, device=mask.device)
        begins = (index - starts_BK) % block_size == 0
        begins[:, 0] = True
        block_BK = begins.long().cumsum(dim=1) - 1
        # The most that there can be: one more where the first is cut, before a row's first key, and a segment a key.
        number = -(-mask.kv_length // block_size) + int(mask.row_starts)
        if mask.segments_BK is not None:
            number = int(block_BK[:, -1].max()) + 1 if readable(block_BK) else mask.kv_length
        # Blocks that a row does not have begin behind its last key.
        first_BN = torch.full((mask.batch_size, number), mask.kv_length, device=mask.device)
        first_BN = first_BN.scatter_reduce(1, block_BK, index.expand_as(block_BK), "amin")
        keys_BNC = first_BN.unsqueeze(-1) + torch.arange(block_size, device=mask.device)
        rows = torch.arange(mask.batch_size, device=mask.device).view(-1, 1, 1)
        blocks = torch.arange(number, device=mask.device).view(1, -1, 1)
        inside = keys_BNC.clamp(max=mask.kv_length - 1)
        not_padding_BNC = (keys_BNC < mask.kv_length) & (block_BK[rows, inside] == blocks)
        keys_BNC = keys_BNC.masked_fill(~not_padding_BNC, 0)
        if mask.padding_BK is not None:
            not_padding_BNC = not_padding_BNC & mask.padding_BK.expand(mask.batch_size, -1)[rows, inside]
        start_BN = starts_BK.gather(1, first_BN.clamp(max=mask.kv_length - 1))
        before, packed = mask.q_offset - mask.kv_offset, mask.segments_BK is not None
        return BlockLayout(block_BK, keys_BNC, not_padding_BNC, start_BN, positions(mask), mask.causal, before, packed)

    return mask.cached(("blocks", block_size), build)


def positions(mask: AttentionMask) -> torch.Tensor:
    """(Q,): the queries' places among the keys."""
    return torch.arange(mask.q_length, device=mask.device) + (mask.q_offset - mask.kv_offset)


@torch.no_grad()
def choose_blocks(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    blocks: BlockLayout,
    topk: int,
    *,
    init_blocks: int = 0,
    at_once: int = SCORES_AT_ONCE,
    look: bool = True,
) -> torch.Tensor:
    """The blocks that each query of each head attends to.

    Its own block is always the first; the others are those of the same row or segment, complete and past where
    attention is causal, with the highest ``q . mean of the block's real keys``, the row's first ones before all.

    Args:
        init_blocks: first blocks of a row or segment that are chosen before others, as far as topk goes.
        at_once: scores of queries with blocks that are worked on at a time.
        look: values may be asked for that leave out work.

    Returns:
        (B, H, Q, at most topk) block numbers, -1 where there are fewer to choose from.
    """
    dtype = accumulation_dtype(q_BHQD, k_BGKD)
    batch, groups = k_BGKD.shape[:2]
    heads, queries = q_BHQD.shape[1:3]
    number = blocks.start_BN.shape[1]
    own_BQ = blocks.block_BK[:, blocks.position_Q]
    start_BQ = blocks.start_BN.gather(1, own_BQ)
    chosen = torch.full((batch, heads, queries, min(topk, number)), -1, device=q_BHQD.device)
    chosen[..., 0] = own_BQ.unsqueeze(1)
    if chosen.shape[-1] == 1:
        return chosen
    count = blocks.not_padding_BNC.sum(dim=-1).unsqueeze(1)
    keys = (
        k_BGKD.flatten(0, 1)
        .to(dtype)[
            torch.arange(batch * groups, device=k_BGKD.device)[:, None, None],
            blocks.keys_BNC.repeat_interleave(groups, dim=0),
        ]
        .view(batch, groups, number, -1, k_BGKD.shape[-1])
    )
    keys = keys.masked_fill_(~blocks.not_padding_BNC[:, None, ..., None], 0.0)  # padding may hold anything
    first_BN = blocks.keys_BNC[..., 0] - blocks.start_BN < min(init_blocks, topk - 1) * blocks.keys_BNC.shape[2]
    means_BGND = keys.sum(dim=3) / count.clamp(min=1).unsqueeze(-1)
    # A few queries at a time: the comparison of all queries with all blocks is the one thing here that is quadratic.
    step = max(1, at_once // (batch * heads * number))
    for low in range(0, queries, step):
        at = slice(low, low + step)
        own, start = own_BQ[:, at, None], start_BQ[:, at, None]
        # Where causal, the last query's own block and what follows it are no candidates.
        until = blocks.past(min(low + step, queries), look=look) if blocks.causal else number
        if not until:
            continue
        block = torch.arange(until, device=q_BHQD.device)
        candidate = (block < own) if blocks.causal else (block != own)
        candidate = candidate & (blocks.start_BN[:, None, block] == start) & (count[:, :, block] > 0)
        q = q_BHQD[:, :, at].to(dtype).reshape(batch, groups, -1, q_BHQD.shape[3])
        scores = (q @ means_BGND[:, :, block].transpose(-1, -2)).view(batch, heads, -1, len(block))
        if init_blocks:
            scores.masked_fill_(first_BN[:, None, None, block], torch.inf)
        scores.masked_fill_(~candidate.unsqueeze(1), -torch.inf)
        best = scores.topk(min(chosen.shape[-1] - 1, len(block)), dim=-1)
        chosen[:, :, at, 1 : 1 + best.indices.shape[-1]] = best.indices.masked_fill(best.values == -torch.inf, -1)
    return chosen


def chosen_keys(chosen_BHQT: torch.Tensor, blocks: BlockLayout) -> torch.Tensor:
    """(B, H, Q, K) bool: whether a key is in a chosen block. Dense, for the reference form."""
    number = blocks.start_BN.shape[1]
    member = torch.zeros((*chosen_BHQT.shape[:3], number + 1), dtype=torch.bool, device=chosen_BHQT.device)
    member.scatter_(-1, chosen_BHQT.masked_fill(chosen_BHQT < 0, number), 1)
    return member.gather(-1, blocks.block_BK[:, None, None].expand(*member.shape[:3], -1))


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def block_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    chosen_BHQT: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over the visible keys of chosen blocks.

    Args:
        mask: causal or bidirectional, padding, segments; no other rule.
        chosen_BHQT: blocks of :func:`block_layout`, each at most once a query, -1 for none. The first is the query's
            own, and where attention is causal the others lie before it. Of a key/value head, (B, G, Q, T), where the
            query heads that share it share the choice.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    blocks, chosen_BHQT = block_layout(mask, block_size), expand_heads(chosen_BHQT, q_BHQD.shape[1])
    batch, heads, queries, width = chosen_BHQT.shape
    groups, number = k_BGKD.shape[1], blocks.start_BN.shape[1]
    # Numbers of blocks, keys and queries go by row, head and position.
    group = torch.arange(batch * groups, device=q_BHQD.device)
    keys_XC = (blocks.keys_BNC.unsqueeze(1) + group.view(batch, groups, 1, 1) * mask.kv_length).flatten(0, 2)
    not_padding_XC = None
    if not blocks.not_padding_BNC.all():
        not_padding_XC = blocks.not_padding_BNC.unsqueeze(1).expand(-1, groups, -1, -1).flatten(0, 2)

    def ahead(rows_TR: torch.Tensor, keys_TC: torch.Tensor) -> torch.Tensor:
        position_TR = rows_TR % queries + (mask.q_offset - mask.kv_offset)
        return (keys_TC % mask.kv_length).unsqueeze(1) > position_TR.unsqueeze(2)

    chosen = chosen_BHQT.reshape(-1)
    first = torch.arange(len(chosen), device=chosen.device) % width == 0
    parts = []
    for members, hidden in ((first, ahead), (~first, None)) if blocks.causal else ((chosen >= 0, None),):
        pairs = (members & (chosen >= 0)).nonzero().squeeze(1)
        if len(pairs):
            rows = pairs // width
            rows_TR, block_T = tiles_by_block(rows, chosen[pairs] + rows // (queries * heads // groups) * number)
            parts.append(PairTiles(rows_TR, keys_XC, not_padding_XC, block_T, hidden))
    return gathered_attention(q_BHQD, k_BGKD, v_BGKV, mask, parts, scale=scale, dropout=dropout)


PLAIN = SoftmaxForms(block_attention, tiled_attention)
"""The forms for CPUs in plain PyTorch."""


def tiles_by_block(rows_P: torch.Tensor, block_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P pairs of query and block, sorted by block and cut into T tiles: (T, R) queries, -1 at free places; (T,) blocks.

    A tile has as many places as a block has pairs on average: one where a single token is decoded.
    """
    block, order = block_P.sort(stable=True)
    count = block.bincount()
    size = min(LARGEST_TILE, 1 << (len(block) // int((count > 0).sum()) - 1).bit_length())
    tiles = (count + size - 1) // size
    within = torch.arange(len(block), device=block.device) - (count.cumsum(0) - count)[block]
    rows = rows_P.new_full((int(tiles.sum()) * size,), -1)
    rows[(tiles.cumsum(0) - tiles)[block] * size + within] = rows_P[order]
    return rows.view(-1, size), torch.arange(len(tiles), device=block.device).repeat_interleave(tiles)


@dataclass(frozen=True)
class PairTiles:
    """T tiles of R queries and C keys each. Queries and keys are numbered by row, head and position."""

    rows_TR: torch.Tensor
    """The queries, -1 at free places."""
    keys_XC: torch.Tensor
    """The keys of X blocks, any number where there is none."""
    not_padding_XC: torch.Tensor | None
    """Whether there is a key, and no padding; None where all are."""
    block_T: torch.Tensor
    """Which of the X blocks a tile is about."""
    hidden: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    """(rows_TR, keys_TC) -> (T, R, C), True for pairs that are not to be counted; None where all are."""


def gathered_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    parts: list[PairTiles],
    *,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over the pairs of query and key in ``parts``, none twice, each query's own key among them.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    # The backward draws the same dropout again from this seed instead of keeping what was drawn.
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return _Gathered.apply(q_BHQD, k_BGKD, v_BGKV, positions(mask), parts, (scale, dropout, seed))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHQD, k_BGKD, v_BGKV, position_Q, parts, options):
        call = _Inputs(q_BHQD, k_BGKD, v_BGKV, options)
        own_BGQD = k_BGKD[:, :, position_Q].to(call.dtype)
        q_BGRQD = call.q.view(*own_BGQD.shape[:2], -1, *own_BGQD.shape[2:])
        shift = torch.einsum("bgrqd,bgqd->bgrq", q_BGRQD, own_BGQD).flatten()
        out, total = call.sums(parts, shift)
        if not bool(total.amax() < LARGEST_TOTAL):
            shift = call.max_scores(parts)
            out, total = call.sums(parts, shift)
        out = out.div_(total.clamp(min=torch.finfo(total.dtype).tiny).unsqueeze(-1))
        out_BHQV = out.to(v_BGKV.dtype).view(*q_BHQD.shape[:3], -1)
        ctx.save_for_backward(q_BHQD, k_BGKD, v_BGKV, out_BHQV, shift + total.log2())
        ctx.parts, ctx.options = parts, options
        return out_BHQV

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BHQV):
        q_BHQD, k_BGKD, v_BGKV, out_BHQV, lse = ctx.saved_tensors
        call = _Inputs(q_BHQD, k_BGKD, v_BGKV, ctx.options)
        grad = grad_BHQV.to(call.dtype).reshape(len(call.q), -1)
        delta = torch.einsum("nv,nv->n", grad, out_BHQV.to(call.dtype).view(grad.shape))
        # 2^(score - inf) = 0: what sees nothing has no weights.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        dq, dk, dv = (torch.zeros_like(x) for x in (call.q, call.k, call.v))
        for part in ctx.parts:
            k_XCD, v_XCV = call.blocks(part)
            in_order = call.in_order(part)
            dk_XCD, dv_XCV = (
                x.view(of.shape) if in_order else torch.zeros_like(of) for x, of in ((dk, k_XCD), (dv, v_XCV))
            )
            for tile in call.tiles(part, k_XCD, v_XCV):
                rows = tile.rows.flatten()
                g = grad.index_select(0, rows).view(*tile.rows.shape, -1)
                weights = call.weights(tile, lse)
                keep = call.keep(weights)
                dv_XCV.index_add_(0, tile.block, torch.bmm(call.dropped(weights, keep).mT, g))
                ds = call.dropped(torch.bmm(g, tile.v.mT), keep)
                ds.sub_(delta.index_select(0, rows).view(*tile.rows.shape, 1)).mul_(weights)
                dk_XCD.index_add_(0, tile.block, torch.bmm(ds.mT, tile.q))
                dq.index_add_(0, rows, torch.bmm(ds, tile.k).flatten(0, 1))
            if in_order:
                continue
            # Where there is no key the gradient is zero, whatever number stands there.
            dk.index_add_(0, part.keys_XC.flatten(), dk_XCD.flatten(0, 1))
            dv.index_add_(0, part.keys_XC.flatten(), dv_XCV.flatten(0, 1))
        # autograd casts each gradient to the dtype of its input.
        dq = dq.mul_(call.scale).view(q_BHQD.shape)
        return dq, dk.div_(LOG2_E).view(k_BGKD.shape), dv.view(v_BGKV.shape), None, None, None


@dataclass(frozen=True)
class _TileBatch:
    """A few tiles of a part, with what they work on."""

    rows: torch.Tensor
    """(T, R), 0 at free places."""
    free: torch.Tensor
    """(T, R)"""
    block: torch.Tensor
    """(T,)"""
    q: torch.Tensor
    """(T, R, D)"""
    k: torch.Tensor
    """(T, C, D)"""
    v: torch.Tensor
    """(T, C, V)"""
    hidden: torch.Tensor | None
    """Broadcasts to (T, R, C)."""


class _Inputs:
    """The inputs of one call by row, head and position, queries scaled by LOG2_E too; for both directions."""

    def __init__(self, q_BHQD, k_BGKD, v_BGKV, options):
        self.scale, self.dropout, self.seed = options
        self.dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
        self.q, self.k, self.v = (x.to(self.dtype).reshape(-1, x.shape[-1]) for x in (q_BHQD, k_BGKD, v_BGKV))
        self.q = self.q * (self.scale * LOG2_E)
        self.generator = None
        if self.dropout:
            self.generator = torch.Generator(q_BHQD.device).manual_seed(self.seed)

    def blocks(self, part: PairTiles) -> list[torch.Tensor]:
        if self.in_order(part):
            return [x.view(*part.keys_XC.shape, -1) for x in (self.k, self.v)]
        found = [x.index_select(0, part.keys_XC.flatten()).view(*part.keys_XC.shape, -1) for x in (self.k, self.v)]
        if part.not_padding_XC is None:
            return found
        # Padding may hold anything, and what stands for no key is another row's: a weight of 0 would not hide a NaN.
        is_padding = ~part.not_padding_XC.unsqueeze(-1)
        return [x.masked_fill_(is_padding, 0.0) for x in found]

    def in_order(self, part: PairTiles) -> bool:
        """Whether the blocks are the keys as they are, each once."""
        if part.not_padding_XC is not None or part.keys_XC.numel() != len(self.k):
            return False
        return torch.equal(part.keys_XC.flatten(), torch.arange(len(self.k), device=part.keys_XC.device))

    def tiles(self, part: PairTiles, k_XCD: torch.Tensor, v_XCV: torch.Tensor) -> Iterator[_TileBatch]:
        step = max(1, SCORES_AT_ONCE // (part.rows_TR.shape[1] * part.keys_XC.shape[1]))
        for low in range(0, len(part.block_T), step):
            rows, block = part.rows_TR[low : low + step], part.block_T[low : low + step]
            free, rows, hidden = rows < 0, rows.clamp(min=0), None
            if part.hidden is not None:
                hidden = part.hidden(rows, part.keys_XC.index_select(0, block))
            if part.not_padding_XC is not None:
                is_padding = ~part.not_padding_XC.index_select(0, block).unsqueeze(1)
                hidden = is_padding if hidden is None else hidden | is_padding
            q = self.q.index_select(0, rows.flatten()).view(*rows.shape, -1)
            k, v = (x.index_select(0, block) for x in (k_XCD, v_XCV))
            yield _TileBatch(rows, free, block, q, k, v, hidden)

    def scores(self, tile: _TileBatch) -> torch.Tensor:
        scores = torch.bmm(tile.q, tile.k.mT)
        return scores if tile.hidden is None else scores.masked_fill_(tile.hidden, -torch.inf)

    def weights(self, tile: _TileBatch, shift: torch.Tensor) -> torch.Tensor:
        """2^(score - level of the query), 0 at free places."""
        shift = shift.index_select(0, tile.rows.flatten()).view(tile.rows.shape).masked_fill_(tile.free, torch.inf)
        return self.scores(tile).sub_(shift.unsqueeze(-1)).exp2_()

    def sums(self, parts: list[PairTiles], shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of 2^(score - level) v and of 2^(score - level), for each query."""
        if self.generator is not None:
            self.generator.manual_seed(self.seed)
        total = torch.zeros_like(shift)
        out = total.new_zeros(len(total), self.v.shape[-1])
        for part in parts:
            for tile in self.tiles(part, *self.blocks(part)):
                weights = self.weights(tile, shift)
                total.index_add_(0, tile.rows.flatten(), weights.sum(dim=-1).flatten())
                values = torch.bmm(self.dropped(weights, self.keep(weights)), tile.v)
                out.index_add_(0, tile.rows.flatten(), values.flatten(0, 1))
        return out, total

    def max_scores(self, parts: list[PairTiles]) -> torch.Tensor:
        """The highest score of each query, 0 for one that sees nothing."""
        top = self.q.new_full((len(self.q),), -torch.inf)
        for part in parts:
            for tile in self.tiles(part, *self.blocks(part)):
                highest = self.scores(tile).amax(dim=-1).masked_fill_(tile.free, -torch.inf)
                top.scatter_reduce_(0, tile.rows.flatten(), highest.flatten(), "amax")
        return top.masked_fill_(top == -torch.inf, 0.0)

    def keep(self, weights):
        """What dropout multiplies the weights with, or None; the same again in the backward."""
        if self.generator is None:
            return None
        return torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)

    @staticmethod
    def dropped(x, keep):
        return x if keep is None else x * keep
