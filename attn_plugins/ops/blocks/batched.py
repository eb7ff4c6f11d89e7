"""Attention to chosen keys on devices that are not a CPU: as :mod:`.gather`, in operations of a fixed number.

Tiles of R queries and C keys are made without asking for a value on the host: there are as many as there can be. Each
tile takes a softmax of its own, whose sum and maximum are kept for each pair of a query and a tile, and the few of a
query are merged in the end. So what a tile gives is written once, by the number of its pair, and added up in the same
order whenever it is run. Scores are computed again in the backward.

In half precision, matrix products on a GPU take queries, keys, values and weights as they come, or rounded to that, and
add up in float32, in which all else is computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks.gather import block_layout
from attn_plugins.ops.dropout import draw_seed, dropped
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, outside_autocast
from attn_plugins.ops.sizes import scores_at_once
from attn_plugins.ops.softmax.batched import product

LARGEST_TILE = 128
"""Pairs that are multiplied with one block at a time."""

Hidden = Callable[..., torch.Tensor]
"""(rows_TR, block_T, keys_TC, *tables) -> (T, R, C), True for pairs that are not to be counted. A function of a module,
and with its tensors as tables, since both directions call it and torch.compile traces both."""


@dataclass(frozen=True)
class PairTiles:
    """T tiles of R places, each about a block of C keys.

    A query has ``width`` pairs at most, numbered ``query * width + 0..width - 1``. Queries and keys are numbered by
    row, head and position; the number after the last stands for none.
    """

    pair_TR: torch.Tensor
    block_T: torch.Tensor
    """Which of the X blocks a tile is about."""
    keys_XC: torch.Tensor
    width: int
    hidden: Hidden
    tables: tuple[torch.Tensor, ...]
    """What ``hidden`` needs."""


class _Part(NamedTuple):
    """What of PairTiles is no tensor."""

    width: int
    hidden: Hidden
    tensors: int


class _Options(NamedTuple):
    scale: float
    dropout: float
    out_dtype: torch.dtype
    parts: tuple[_Part, ...]


def batched_gathered_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    parts: list[PairTiles],
    *,
    scale: float,
    dropout: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the pairs of query and key in ``parts``, none twice.

    Returns:
        out_BHQV in ``out_dtype``, else the dtype of v, zero for a query that sees nothing, and the log-sum-exp of the
        scores (B, H, Q) in at least float32, -inf there; both have gradients. Differentiable once.
    """
    seed = draw_seed(q_BHQD.device) if dropout else None
    tensors: list[torch.Tensor] = []
    about = []
    for part in parts:
        own = (part.pair_TR, part.block_T, part.keys_XC, *part.tables)
        tensors += own
        about.append(_Part(part.width, part.hidden, len(own)))
    options = _Options(scale, dropout, out_dtype or v_BGKV.dtype, tuple(about))
    return _Gathered.apply(q_BHQD, k_BGKD, v_BGKV, seed, options, *tensors)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHQD, k_BGKD, v_BGKV, seed, options, *tensors):
        call = _Inputs(q_BHQD, k_BGKD, v_BGKV, seed, options)
        rows, size = call.q.shape[0] - 1, call.v.shape[1]
        tops, totals, outs = [], [], []
        for part, own in call.parts(tensors):
            pairs = rows * part.width + 1
            top = torch.full((pairs,), MASKED_SCORE, dtype=call.dtype, device=call.q.device)
            total, out = torch.zeros_like(top), top.new_zeros(pairs, size)
            for tile in call.tiles(part, own, scores=1.25):
                weights = call.scores(tile)
                highest = weights.amax(dim=-1).clamp_(min=MASKED_SCORE)
                weights.sub_(highest.unsqueeze(-1)).exp_()
                pair = tile.pair_TR.flatten()
                top.index_copy_(0, pair, highest.flatten())
                total.index_copy_(0, pair, weights.sum(dim=-1).flatten())
                values = call.product(call.kept(weights, tile), call.rows_of(call.v, tile.keys_TC))
                out.index_copy_(0, pair, values.flatten(0, 1))
                del weights, values  # before those of the next tiles are made
            tops.append(top[:-1].view(rows, -1))
            totals.append(total[:-1].view(rows, -1))
            outs.append(out[:-1].view(rows, -1, size))
        top, total = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (tops, totals))
        highest = top.amax(dim=1, keepdim=True)
        share = (top - highest).exp_()
        total = (total * share).sum(dim=1)
        empty = total == 0
        share = share / total.masked_fill(empty, 1.0).unsqueeze(1) / (1 - options.dropout)
        shares = share.split([part.width for part in options.parts], dim=1)
        merged = [torch.bmm(s.unsqueeze(1), o).squeeze(1) for s, o in zip(shares, outs, strict=True)]
        out = merged[0] if len(merged) == 1 else torch.stack(merged).sum(dim=0)
        lse = highest.squeeze(1) + total.log()
        out_BHQV = out.to(options.out_dtype).view(*q_BHQD.shape[:3], -1)
        ctx.save_for_backward(q_BHQD, k_BGKD, v_BGKV, seed, out_BHQV, lse.masked_fill(empty, torch.inf), *tensors)
        ctx.options = options
        return out_BHQV, lse.masked_fill(empty, -torch.inf).view(q_BHQD.shape[:3])

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BHQV, grad_lse):
        q_BHQD, k_BGKD, v_BGKV, seed, out_BHQV, lse, *tensors = ctx.saved_tensors
        options = ctx.options
        call = _Inputs(q_BHQD, k_BGKD, v_BGKV, seed, options)
        delta = torch.einsum("bhqv,bhqv->bhq", grad_BHQV.to(call.dtype), out_BHQV.to(call.dtype))
        delta = with_none((delta - grad_lse).flatten())
        # exp(score - inf) = 0: what sees nothing has no weights.
        lse = torch.nn.functional.pad(lse, (0, 1), value=torch.inf)
        grad = grad_BHQV if not options.dropout else grad_BHQV / (1 - options.dropout)
        grad = with_none(grad.to(call.operands).reshape(-1, grad.shape[-1]))
        dq, dk, dv = (torch.zeros_like(x, dtype=call.dtype) for x in (call.q, call.k, call.v))
        for part, own in call.parts(tensors):
            for tile in call.tiles(part, own, scores=2):
                weights = call.scores(tile).sub_(lse[tile.rows_TR].unsqueeze(-1)).exp_()
                keys, rows, g = tile.keys_TC.flatten(), tile.rows_TR.flatten(), call.rows_of(grad, tile.rows_TR)
                dv.index_add_(0, keys, call.product(call.kept(weights, tile).mT, g).flatten(0, 1))
                ds = call.kept(call.product(g, call.rows_of(call.v, tile.keys_TC).mT), tile)
                del g
                ds = weights.mul_(ds.sub_(delta[tile.rows_TR].unsqueeze(-1)))
                dk.index_add_(0, keys, call.product(ds.mT, call.rows_of(call.q, tile.rows_TR)).flatten(0, 1))
                dq.index_add_(0, rows, call.product(ds, call.rows_of(call.k, tile.keys_TC)).flatten(0, 1))
                del ds, weights
        # autograd casts each gradient to the dtype of its input.
        dq = dq[:-1].mul_(options.scale).view(q_BHQD.shape)
        return dq, dk[:-1].view(k_BGKD.shape), dv[:-1].view(v_BGKV.shape), None, None, *[None] * len(tensors)


class _Tile(NamedTuple):
    """A few tiles of a part."""

    pair_TR: torch.Tensor
    rows_TR: torch.Tensor
    keys_TC: torch.Tensor
    hidden_TRC: torch.Tensor


class _Inputs:
    """The inputs of one call by row, head and position, queries scaled, a row of zeros behind; for both directions."""

    def __init__(self, q_BHQD, k_BGKD, v_BGKV, seed, options):
        self.options, self.seed = options, seed
        given = (q_BHQD, k_BGKD, v_BGKV)
        self.dtype, self.operands = accumulation_dtype(*given), operand_dtype(*given)
        given = (q_BHQD.to(self.dtype) * options.scale, k_BGKD, v_BGKV)
        self.q, self.k, self.v = (with_none(x.to(self.operands).reshape(-1, x.shape[-1])) for x in given)

    def parts(self, tensors) -> Iterator[tuple[_Part, tuple[torch.Tensor, ...]]]:
        low = 0
        for part in self.options.parts:
            yield part, tensors[low : low + part.tensors]
            low += part.tensors

    def tiles(self, part, own, *, scores) -> Iterator[_Tile]:
        """A few at a time; of each of their pairs of query and key ``scores`` numbers are held."""
        pair_TR, block_T, keys_XC, *tables = own
        (number, places), keys, size = pair_TR.shape, keys_XC.shape[1], max(self.q.shape[1], self.v.shape[1])
        # Beside them what is multiplied: queries, values and the like, and what comes of it.
        held = scores * places * keys + (places + max(places, keys)) * size
        step = max(1, int(scores_at_once(pair_TR.device) / held))
        for low in range(0, number, step):
            pair, block = pair_TR[low : low + step], block_T[low : low + step]
            rows, keys_TC = pair // part.width, keys_XC.index_select(0, block)
            yield _Tile(pair, rows, keys_TC, part.hidden(rows, block, keys_TC, *tables))

    @staticmethod
    def rows_of(x, index):
        return x.index_select(0, index.flatten()).view(*index.shape, -1)

    def product(self, a, b):
        """In the dtype of sums."""
        return product(a.to(self.operands), b.to(self.operands), self.dtype)

    def scores(self, tile):
        scores = self.product(self.rows_of(self.q, tile.rows_TR), self.rows_of(self.k, tile.keys_TC).mT)
        return scores.masked_fill_(tile.hidden_TRC, -torch.inf)

    def kept(self, x_TRC, tile):
        """With zeros where dropout takes a weight; what is left is not yet scaled."""
        if not self.options.dropout:
            return x_TRC
        taken = dropped(self.seed, tile.rows_TR.unsqueeze(2), tile.keys_TC.unsqueeze(1), self.options.dropout)
        return x_TRC.masked_fill(taken, 0.0)


def operand_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype that matrix products take these tensors in: their own on a GPU, else that of sums."""
    dtype = tensors[0].dtype
    alike = tensors[0].is_cuda and all(tensor.dtype == dtype for tensor in tensors)
    return dtype if alike else accumulation_dtype(*tensors)


def product_with_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``torch.bmm(a, b)`` in the dtype of ``b``, that of sums; what a GPU rounds of these is multiplied too."""
    dtype = operand_dtype(a)
    if dtype == b.dtype:
        return torch.bmm(a.to(dtype), b)
    high = b.to(dtype)
    low = (b - high.to(b.dtype)).to(dtype)
    return product(torch.cat([a, a], dim=2), torch.cat([high, low], dim=1), b.dtype)


def with_none(x: torch.Tensor) -> torch.Tensor:
    """With a zero, or a row of zeros, behind it, which the number after the last stands for."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def pairs_by_block(
    block_P: torch.Tensor, number: int, largest: int = LARGEST_TILE, *, filled: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """P pairs, sorted by block and cut into T tiles of one block each: (T, R) pairs, P at free places; (T,) blocks.

    As many tiles as there can be, which is one more a block than their places are needed for.

    Args:
        block_P: in 0..number, ``number`` for a pair that is none.
        largest: the most places of a tile.
        filled: tiles that a block on average fills.
    """
    # Plain numbers: a graph whose lengths are symbols is then one of this length.
    pairs, number, device = int(block_P.shape[0]), int(number), block_P.device
    size = min(largest, 1 << max(0, (pairs // max(1, filled * number)).bit_length() - 1))
    tiles = pairs // size + min(number, pairs)
    sorted_P, order = block_P.sort(stable=True)
    begin = torch.searchsorted(sorted_P, torch.arange(number + 1, device=device, dtype=sorted_P.dtype))
    until = (begin.diff() + size - 1).div(size, rounding_mode="floor").cumsum(0)  # tiles of all blocks to this one
    first = torch.nn.functional.pad(until, (1, 0))
    place = first[sorted_P] * size + torch.arange(pairs, device=device) - begin[sorted_P]
    place = torch.where(sorted_P == number, tiles * size, place)
    pair = torch.full((tiles * size + 1,), pairs, device=device).index_copy_(0, place, order)
    block = torch.searchsorted(until, torch.arange(tiles, device=device), right=True)
    return pair[:-1].view(tiles, size), block.clamp(max=number - 1)


def not_visible(rows_TR, block_T, keys_TC, place_XC, last_N):
    """Whether a key's place comes after the last that a query sees."""
    return place_XC.index_select(0, block_T).unsqueeze(1) > last_N[rows_TR].unsqueeze(2)


def batched_block_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    chosen_BXQT: torch.Tensor,
    *,
    block_size: int,
    **options: Any,
) -> torch.Tensor:
    """As :func:`attn_plugins.ops.blocks.gather.block_attention`.

    Args:
        chosen_BXQT: as there, of each query head, or of a few heads after another that share a key/value head.
        options: of :func:`batched_gathered_attention`.
    """
    (batch, choosing, queries, width), groups = chosen_BXQT.shape, k_BGKD.shape[1]
    heads = q_BHQD.shape[1]
    keys_XC, place_XC = _keys_of_blocks(mask, block_size, groups)
    last_N = mask.cached(("last places", heads), lambda: _last_places(mask, heads))
    blocks, shared = len(keys_XC), heads // choosing
    row_BX = torch.arange(batch * groups, device=mask.device).repeat_interleave(
        choosing // groups, output_size=batch * choosing
    )
    block = chosen_BXQT + row_BX.view(batch, choosing, 1, 1) * (blocks // (batch * groups))
    block = torch.where(chosen_BXQT < 0, blocks, block).flatten()
    pair_TR, block_T = pairs_by_block(block, blocks, max(1, LARGEST_TILE // shared))
    if shared > 1:
        pair_TR = _of_each_head(pair_TR, shared, queries * width, len(block))
    part = PairTiles(pair_TR, block_T, keys_XC, width, not_visible, (place_XC, last_N))
    return batched_gathered_attention(q_BHQD, k_BGKD, v_BGKV, [part], **options)[0]


def _keys_of_blocks(mask: AttentionMask, block_size: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of the blocks of all rows and key/value heads, and their places in their row, ``kv_length`` for none."""

    def build() -> tuple[torch.Tensor, torch.Tensor]:
        blocks, length = block_layout(mask, block_size), mask.kv_length
        there = blocks.not_padding_BNC.unsqueeze(1)
        row = torch.arange(mask.batch_size * groups, device=mask.device).view(-1, groups, 1, 1)
        keys = blocks.keys_BNC.unsqueeze(1)
        number = torch.where(there, keys + row * length, mask.batch_size * groups * length)
        place = torch.where(there, keys, length).expand(number.shape)
        return number.flatten(0, 2), place.flatten(0, 2)

    return mask.cached(("keys of blocks", block_size, groups), build)


def _last_places(mask: AttentionMask, heads: int) -> torch.Tensor:
    """The last key that each query sees by the order alone, by number of the query; -1 for none."""
    last_Q = torch.arange(mask.q_length, device=mask.device) + (mask.q_offset - mask.kv_offset)
    if not mask.causal:
        last_Q = torch.full_like(last_Q, mask.kv_length - 1)
    return torch.nn.functional.pad(last_Q.expand(mask.batch_size * heads, -1).flatten(), (0, 1), value=-1)


def _of_each_head(pair_TR: torch.Tensor, shared: int, pairs: int, none: int) -> torch.Tensor:
    """Pairs of heads that choose for ``shared`` heads each, as pairs of all of these: (T, R * shared).

    Args:
        pairs: of one head.
        none: what stands for none, before.
    """
    head, within = pair_TR.div(pairs, rounding_mode="floor").unsqueeze(2), (pair_TR % pairs).unsqueeze(2)
    each = (head * shared + torch.arange(shared, device=pair_TR.device)) * pairs + within
    return torch.where(pair_TR.unsqueeze(2) == none, none * shared, each).flatten(1)
