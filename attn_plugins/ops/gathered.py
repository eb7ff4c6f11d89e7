"""Softmax attention over blocks of keys that each query chooses: O(N topk block_size) time, O(N topk) memory.

A copy of the chosen keys for each query would be N x topk x block_size x D. Instead, as in MoBA, queries come to the
keys: the (query, block) pairs are sorted by block and cut into tiles that share a block, a tile is two dense matrix
products, and a query's partial results are summed up. Scores are computed three times, for their maximum, for the
output and in the backward, and never kept: they stay in the CPU's cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.mask import AttentionMask
from attn_plugins.ops.dense import outside_autocast, wide

LARGEST_TILE = 64
"""Pairs that are multiplied with one block at a time."""
SCORES_AT_ONCE = 2**16
"""Scores worked on at a time, few enough for the CPU's cache and enough to hide what an operation costs by itself."""


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a mask's keys lie. C is the block size, N the number of blocks of the longest row."""

    block_BK: torch.Tensor
    """(B, K): the block of each key, counted from the beginning of its row."""
    keys_BNC: torch.Tensor
    """(B, N, C): the keys of each block, 0 where it has fewer."""
    real_BNC: torch.Tensor
    """(B, N, C): whether that key exists and is no padding."""
    start_BN: torch.Tensor
    """(B, N): the first real key of the row or segment that the block belongs to."""
    position_Q: torch.Tensor
    """(Q,): the queries' places among the keys."""
    causal: bool


def blocks_of(mask: AttentionMask, block_size: int) -> Blocks:
    """Blocks counted from the first real key of each row or segment; made once a forward pass."""

    def build() -> Blocks:
        starts_BK = mask.starts_BK().expand(mask.batch_size, -1)
        index = torch.arange(mask.kv_length, device=mask.device)
        begins = (index - starts_BK) % block_size == 0
        begins[:, 0] = True
        block_BK = begins.long().cumsum(dim=1) - 1
        number = int(block_BK[:, -1].max()) + 1
        # Blocks that a row does not have begin behind its last key.
        first_BN = torch.full((mask.batch_size, number), mask.kv_length, device=mask.device)
        first_BN = first_BN.scatter_reduce(1, block_BK, index.expand_as(block_BK), "amin")
        keys_BNC = first_BN.unsqueeze(-1) + torch.arange(block_size, device=mask.device)
        rows = torch.arange(mask.batch_size, device=mask.device).view(-1, 1, 1)
        blocks = torch.arange(number, device=mask.device).view(1, -1, 1)
        inside = keys_BNC.clamp(max=mask.kv_length - 1)
        real_BNC = (keys_BNC < mask.kv_length) & (block_BK[rows, inside] == blocks)
        keys_BNC = keys_BNC.masked_fill(~real_BNC, 0)
        if mask.padding_BK is not None:
            real_BNC = real_BNC & mask.padding_BK.expand(mask.batch_size, -1)[rows, inside]
        start_BN = starts_BK.gather(1, first_BN.clamp(max=mask.kv_length - 1))
        position_Q = torch.arange(mask.q_length, device=mask.device) + (mask.q_offset - mask.kv_offset)
        return Blocks(block_BK, keys_BNC, real_BNC, start_BN, position_Q, mask.causal)

    return mask.once(("blocks", block_size), build)


@torch.no_grad()
def choose_blocks(q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, blocks: Blocks, topk: int) -> torch.Tensor:
    """The blocks that each query of each head attends to.

    Its own block is always the first; the others are those of the same row or segment, complete and past where
    attention is causal, with the highest ``q . mean of the block's real keys``.

    Returns:
        (B, Q, H, at most topk) block numbers, -1 where there are fewer to choose from.
    """
    dtype = wide(q_BHQD, k_BGKD)
    batch, groups = k_BGKD.shape[:2]
    heads, queries = q_BHQD.shape[1:3]
    number = blocks.start_BN.shape[1]
    own_BQ = blocks.block_BK[:, blocks.position_Q]
    start_BQ = blocks.start_BN.gather(1, own_BQ)
    chosen = torch.full((batch, queries, heads, min(topk, number)), -1, device=q_BHQD.device)
    chosen[..., 0] = own_BQ.unsqueeze(-1)
    if chosen.shape[-1] == 1:
        return chosen
    count = blocks.real_BNC.sum(dim=-1).unsqueeze(1)
    keys = by_block(k_BGKD, blocks).view(batch, number, groups, -1, k_BGKD.shape[-1]).to(dtype)
    means_BGND = torch.einsum("bngcd,bnc->bgnd", keys, blocks.real_BNC.to(dtype)) / count.clamp(min=1).unsqueeze(-1)
    # A few queries at a time: the comparison of all queries with all blocks is the one thing here that is quadratic.
    step = max(1, 2 * SCORES_AT_ONCE // (batch * heads * number))
    for low in range(0, queries, step):
        at = slice(low, low + step)
        own, start = own_BQ[:, at, None], start_BQ[:, at, None]
        # Where causal, the last query's own block and what follows it are no candidates.
        block = torch.arange(int(own.max()) if blocks.causal else number, device=q_BHQD.device)
        if not len(block):
            continue
        candidate = (block < own) if blocks.causal else (block != own)
        candidate = candidate & (blocks.start_BN[:, None, block] == start) & (count[:, :, block] > 0)
        q = q_BHQD[:, :, at].to(dtype).reshape(batch, groups, -1, q_BHQD.shape[3])
        scores = (q @ means_BGND[:, :, block].transpose(-1, -2)).view(batch, heads, -1, len(block))
        scores.masked_fill_(~candidate.unsqueeze(1), -torch.inf)
        best = scores.topk(min(chosen.shape[-1] - 1, len(block)), dim=-1)
        others = best.indices.masked_fill(best.values == -torch.inf, -1)
        chosen[:, at, :, 1 : 1 + others.shape[-1]] = others.transpose(1, 2)
    return chosen


def chosen_keys(chosen_BQHT: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """(B, H, Q, K) bool: whether a key is in a chosen block. Dense, for the reference form."""
    chosen = chosen_BQHT.transpose(1, 2)
    number = blocks.start_BN.shape[1]
    member = torch.zeros((*chosen.shape[:3], number + 1), dtype=torch.bool, device=chosen.device)
    member.scatter_(-1, chosen.masked_fill(chosen < 0, number), True)
    return member.gather(-1, blocks.block_BK[:, None, None].expand(*member.shape[:3], -1))


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def gathered_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    block_size: int,
    topk: int,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over the visible keys of the blocks that :func:`choose_blocks` chooses.

    Args:
        mask: causal or bidirectional, padding, segments; no other rule.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    blocks = blocks_of(mask, block_size)
    chosen_BQHT = choose_blocks(q_BHQD, k_BGKD, blocks, topk)
    # The backward draws the same dropout again from this seed instead of keeping what was drawn.
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return _Gathered.apply(q_BHQD, k_BGKD, v_BGKV, chosen_BQHT, blocks, (scale, dropout, seed))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHQD, k_BGKD, v_BGKV, chosen_BQHT, blocks, options):
        plan = _plan(chosen_BQHT, blocks, k_BGKD.shape[1])
        call = _Call(q_BHQD, k_BGKD, v_BGKV, plan, blocks, options)
        top = call.q.new_full((len(call.q),), -torch.inf, dtype=call.dtype)
        for tile in call.tiles():
            highest = call.scores(tile).amax(dim=-1).masked_fill_(tile.nobody, -torch.inf)
            top.scatter_reduce_(0, tile.rows.flatten(), highest.flatten(), "amax")
        top.masked_fill_(top == -torch.inf, 0.0)
        total = torch.zeros_like(top)
        out = total.new_zeros(len(total), v_BGKV.shape[-1])
        for tile in call.tiles():
            weights = call.weights(tile, top)
            total.index_add_(0, tile.rows.flatten(), weights.sum(dim=-1).flatten())
            part = torch.bmm(call.dropped(weights, call.keep(weights)), tile.v)
            out.index_add_(0, tile.rows.flatten(), part.flatten(0, 1))
        out = out.div_(total.clamp(min=torch.finfo(total.dtype).tiny).unsqueeze(-1)).to(v_BGKV.dtype)
        ctx.save_for_backward(q_BHQD, k_BGKD, v_BGKV, out, top + total.log())
        ctx.plan, ctx.blocks, ctx.options = plan, blocks, options
        return out.view(len(q_BHQD), q_BHQD.shape[2], q_BHQD.shape[1], -1).transpose(1, 2)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BHQV):
        q_BHQD, k_BGKD, v_BGKV, out, lse = ctx.saved_tensors
        call = _Call(q_BHQD, k_BGKD, v_BGKV, ctx.plan, ctx.blocks, ctx.options)
        grad = by_token(grad_BHQV).to(call.dtype)
        delta = torch.einsum("nv,nv->n", grad, out.to(call.dtype)).unsqueeze(-1)
        # exp(score - inf) = 0: what sees nothing has no weights.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        dq, dk, dv = (torch.zeros(x.shape, dtype=call.dtype, device=x.device) for x in (call.q, call.k, call.v))
        for tile in call.tiles():
            rows = tile.rows.flatten()
            g = grad.index_select(0, rows).view(*tile.rows.shape, -1)
            weights = call.weights(tile, lse)
            keep = call.keep(weights)
            dv.index_add_(0, tile.block, torch.bmm(call.dropped(weights, keep).transpose(1, 2), g))
            ds = call.dropped(torch.bmm(g, tile.v.transpose(1, 2)), keep)
            ds.sub_(delta.index_select(0, rows).view(*tile.rows.shape, 1)).mul_(weights)
            dk.index_add_(0, tile.block, torch.bmm(ds.transpose(1, 2), tile.q))
            dq.index_add_(0, rows, torch.bmm(ds, tile.k).flatten(0, 1))
        dq = dq.mul_(call.scale).view(len(q_BHQD), q_BHQD.shape[2], q_BHQD.shape[1], -1).transpose(1, 2)
        # autograd casts each gradient to the dtype of its input.
        return dq, call.by_key(dk, k_BGKD), call.by_key(dv, v_BGKV), None, None, None


@dataclass(frozen=True)
class _Tiles:
    """T tiles with places for R pairs of query and block each. Queries are numbered by row, position and head."""

    nobody: torch.Tensor
    """(T, R): whether a place is empty."""
    rows: torch.Tensor
    """(T, R): the pair's query; 0 where a place is empty."""
    block: torch.Tensor
    """(T,): the block, numbered by row, number and key/value head."""
    own: bool
    """Whether the block is the queries' own and has keys after them that they must not see."""


@dataclass(frozen=True)
class _Loaded(_Tiles):
    """The same with what they work on."""

    q: torch.Tensor
    """(T, R, D)"""
    k: torch.Tensor
    """(T, C, D)"""
    v: torch.Tensor
    """(T, C, V)"""


def _plan(chosen_BQHT: torch.Tensor, blocks: Blocks, groups: int) -> list[_Tiles]:
    """All pairs of query and block, sorted by block and cut into tiles: for own blocks, and for the others."""
    batch, queries, heads, width = chosen_BQHT.shape
    number = blocks.start_BN.shape[1]
    chosen = chosen_BQHT.reshape(-1)
    place = torch.arange(len(chosen), device=chosen.device)
    first = place % width == 0
    plan = []
    for own, members in ((True, first), (False, ~first)) if blocks.causal else ((False, chosen >= 0),):
        pairs = (members & (chosen >= 0)).nonzero().squeeze(1)
        if not len(pairs):
            continue
        row = pairs // (width * heads * queries)
        block = (row * number + chosen[pairs]) * groups + pairs // width % heads // (heads // groups)
        block, order = block.sort(stable=True)
        count = block.bincount(minlength=batch * groups * number)
        # Tiles of as many places as a block has pairs on average: one where a single token is decoded.
        size = min(LARGEST_TILE, 1 << (len(pairs) // int((count > 0).sum()) - 1).bit_length())
        tiles = (count + size - 1) // size
        within = place[: len(pairs)] - (count.cumsum(0) - count)[block]
        rows = chosen.new_full((int(tiles.sum()) * size,), -1)
        rows[(tiles.cumsum(0) - tiles)[block] * size + within] = pairs[order] // width
        rows = rows.view(-1, size)
        at = torch.arange(len(tiles), device=chosen.device).repeat_interleave(tiles)
        plan.append(_Tiles(rows < 0, rows.clamp(min=0), at, own))
    return plan


class _Call:
    """The inputs of one call, queries one after the other, keys and values by block; cut alike in both directions."""

    def __init__(self, q_BHQD, k_BGKD, v_BGKV, plan, blocks, options):
        self.scale, self.dropout, seed = options
        self.plan, self.blocks = plan, blocks
        self.heads, self.queries, self.groups = q_BHQD.shape[1], q_BHQD.shape[2], k_BGKD.shape[1]
        self.dtype = wide(q_BHQD, k_BGKD, v_BGKV)
        self.q = by_token(q_BHQD)
        self.k, self.v = (by_block(x, blocks) for x in (k_BGKD, v_BGKV))
        self.hidden = None
        if not blocks.real_BNC.all():
            hidden_BNC = torch.zeros(blocks.real_BNC.shape, dtype=self.dtype, device=self.k.device)
            hidden_BNC.masked_fill_(~blocks.real_BNC, -torch.inf)
            self.hidden = hidden_BNC.flatten(0, 1).repeat_interleave(self.groups, dim=0)
        self.generator = torch.Generator(q_BHQD.device).manual_seed(seed) if self.dropout else None

    def tiles(self) -> Iterator[_Loaded]:
        """A few tiles at a time, with their queries, scaled, and keys and values."""
        for part in self.plan:
            step = max(1, SCORES_AT_ONCE // (part.rows.shape[1] * self.k.shape[1]))
            for low in range(0, len(part.block), step):
                at = slice(low, low + step)
                rows, block = part.rows[at], part.block[at]
                q = self.q.index_select(0, rows.flatten()).view(*rows.shape, -1).to(self.dtype).mul_(self.scale)
                k, v = (x.index_select(0, block).to(self.dtype) for x in (self.k, self.v))
                yield _Loaded(part.nobody[at], rows, block, part.own, q, k, v)

    def scores(self, tile: _Loaded) -> torch.Tensor:
        scores = torch.bmm(tile.q, tile.k.transpose(1, 2))
        if self.hidden is not None:
            scores += self.hidden.index_select(0, tile.block).unsqueeze(1)
        if tile.own:
            keys = self.blocks.keys_BNC.flatten(0, 1).index_select(0, tile.block // self.groups)
            position = self.blocks.position_Q[tile.rows // self.heads % self.queries]
            scores.masked_fill_(keys.unsqueeze(1) > position.unsqueeze(2), -torch.inf)
        return scores

    def weights(self, tile: _Loaded, level: torch.Tensor) -> torch.Tensor:
        """exp(score - level of the query), 0 in empty places."""
        level = level.index_select(0, tile.rows.flatten()).view(tile.rows.shape).masked_fill_(tile.nobody, torch.inf)
        return self.scores(tile).sub_(level.unsqueeze(-1)).exp_()

    def keep(self, weights):
        """What dropout multiplies the weights with, or None; the same again in the backward."""
        if self.generator is None:
            return None
        return torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)

    @staticmethod
    def dropped(x, keep):
        return x if keep is None else x * keep

    def by_key(self, x, like):
        """Back from blocks to keys, in the shape of ``like``."""
        blocks, (batch, groups, length, size) = self.blocks, like.shape
        number, block_size = blocks.keys_BNC.shape[1:]
        within = torch.arange(length, device=x.device) - blocks.keys_BNC[..., 0].gather(1, blocks.block_BK)
        block = blocks.block_BK + torch.arange(batch, device=x.device).view(-1, 1) * number
        head = torch.arange(groups, device=x.device)
        index = (block.unsqueeze(-1) * groups + head) * block_size + within.unsqueeze(-1)
        return x.flatten(0, 1).index_select(0, index.flatten()).view(batch, length, groups, size).transpose(1, 2)


def by_token(x_BHQD: torch.Tensor) -> torch.Tensor:
    """(B * Q * H, D): no copy for what transformers hands over, which lies token by token."""
    return x_BHQD.transpose(1, 2).reshape(-1, x_BHQD.shape[-1])


def by_block(x_BGKD: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """(B * N * G, C, D): keys or values by block; what a block lacks is filled with some other key."""
    batch, groups, length, size = x_BGKD.shape
    row = torch.arange(batch, device=x_BGKD.device).view(-1, 1, 1, 1) * length
    head = torch.arange(groups, device=x_BGKD.device).view(1, 1, -1, 1)
    index = (row + blocks.keys_BNC.unsqueeze(2)) * groups + head
    return by_token(x_BGKD).index_select(0, index.flatten()).view(-1, blocks.keys_BNC.shape[-1], size)
