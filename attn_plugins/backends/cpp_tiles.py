"""Tiles of a pattern as tables that compiled kernels go through, and these kernels as operators with a gradient.

The tiles are those of :mod:`attn_plugins.ops.softmax.tile_engine`, whatever pattern they come from; here they are cut
into blocks of 64 queries and 64 keys, and a mask is kept only of blocks of which a part is hidden.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import outside_autocast
from attn_plugins.ops.softmax.tile_engine import SoftmaxParts, Tile
from attn_plugins.ops.softmax.tiles import Pattern

SIZE = 64
"""Queries and keys of a block at most."""
MULTIPLE = 16
"""Of the size of a head, in the kernels; others are filled with zeros."""


class TileTables(NamedTuple):
    """As ``kernels.h`` has them."""

    tiles: torch.Tensor
    """(number, 7) int32: first query, step, how many, where its indices begin or -1, how far the next row's are, first
    block, number of blocks."""
    blocks: torch.Tensor
    """(number, 7) int32: first key, step, how many, where its indices begin or -1, how far the next row's are, which
    mask or -1, 1 where each row of the batch has its own."""
    indices: torch.Tensor
    """int32, of queries and keys that are no slices."""
    masks: torch.Tensor
    """(number, 64 keys, 64 queries) bytes, 1 where visible."""
    ranges: torch.Tensor
    """Of each mask, and each set of its rows, what of the other side there is anything in."""
    merged: bool
    """Whether a query may see keys in several tiles."""


class _Builder:
    def __init__(self) -> None:
        self.tiles: list[tuple[int, ...]] = []
        self.blocks: list[tuple[int, ...]] = []
        self.index: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []
        self.ranges: list[torch.Tensor] = []
        self.indices = self.number = 0
        self.cut: dict[tuple, tuple[list[int], int, int]] = {}

    def add(self, tile: Tile) -> None:
        if isinstance(tile.queries, slice):
            step = tile.queries.step or 1
            rows = len(range(tile.queries.start, tile.queries.stop, step))
            first, at, row = tile.queries.start, -1, 0
        else:
            rows, first, step = tile.queries.shape[1], 0, 1
            at, row = self._indices(tile.queries)
        parts: list[tuple[int, int, int, int, int]] = []  # of columns: first, step, how many, indices, next row's
        if tile.extra is not None:
            where, beside = self._indices(tile.extra)
            number = tile.extra.shape[1]
            parts += [(0, 1, min(SIZE, number - i), where + i, beside) for i in range(0, number, SIZE)]
        for keys in tile.keys:
            by = keys.step or 1
            number = len(range(keys.start, keys.stop, by))
            parts += [(keys.start + i * by, by, min(SIZE, number - i), -1, 0) for i in range(0, number, SIZE)]
        rows_at, columns_at = [*range(0, rows, SIZE), rows], [0]
        for part in parts:
            columns_at.append(columns_at[-1] + part[2])
        kinds, base, own = self._cut(tile.hidden, rows_at, columns_at)
        for i, low in enumerate(rows_at[:-1]):
            here = kinds[i * len(parts) : (i + 1) * len(parts)]
            begin = len(self.blocks)
            seen = [(part, kind) for part, kind in zip(parts, here, strict=True) if kind > -2]
            self.blocks += [(*part, kind if kind < 0 else base + kind, own) for part, kind in seen]
            if begin < len(self.blocks):
                begun = first + low * step if at < 0 else 0
                place = at if at < 0 else at + low
                self.tiles.append((begun, step, rows_at[i + 1] - low, place, row, begin, len(self.blocks) - begin))

    def _indices(self, index: torch.Tensor) -> tuple[int, int]:
        """(where they begin, how far those of the batch's next row are)."""
        self.index.append(index.to(torch.int32).flatten())
        at = self.indices
        self.indices += index.numel()
        return at, index.shape[1] if len(index) > 1 else 0

    def _cut(self, hidden: torch.Tensor | None, rows: list[int], columns: list[int]) -> tuple[list[int], int, int]:
        """(what each block holds, the number of the first mask, 1 where rows of the batch have their own)."""
        if hidden is None:
            return [-1] * ((len(rows) - 1) * (len(columns) - 1)), 0, 0
        name = (id(hidden), *rows, -1, *columns)  # tiles of one look share their mask
        if name not in self.cut:
            visible = (hidden == 0)[:, 0, 0].contiguous()
            kinds, masks, ranges = torch.ops.attn_plugins_cpp.cut_mask(visible, rows, columns)
            self.cut[name] = kinds.tolist(), self.number, int(len(visible) > 1)
            self.masks.append(masks)
            self.ranges.append(ranges)
            self.number += len(masks)
        return self.cut[name]

    def tables(self, merged: bool) -> TileTables:
        index = torch.cat(self.index) if self.index else torch.empty(0, dtype=torch.int32)
        numbers = (torch.tensor(x, dtype=torch.int32).view(-1, 7) for x in (self.tiles, self.blocks))
        none = torch.empty(0, 0, dtype=torch.uint8)
        masks, ranges = (torch.cat(x) if x else none for x in (self.masks, self.ranges))
        tiles, blocks = numbers
        return TileTables(tiles, blocks, index, masks, ranges, merged)


def tables_of(tiles: Iterable[Tile], merged: bool) -> TileTables:
    """Tables of tiles; blocks in which nothing is visible are left out."""
    builder = _Builder()
    for tile in tuple(tiles):  # all alive at once: masks that tiles share are told by their identity
        builder.add(tile)
    return builder.tables(merged)


def compiled_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    pattern: Pattern,
    *,
    scale: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """As :func:`attn_plugins.ops.softmax.tiles.tiled_attention`, by compiled kernels: out_BHQV in the dtype of v, or
    :class:`SoftmaxParts` with ``return_lse``.

    Inputs are float32 or half precision; sums are float32.
    """

    def build() -> TileTables:
        return tables_of(pattern.tiles(mask), pattern.merged)

    tables = mask.cached(("compiled", pattern), build)
    q, k, v = (dense(x) for x in (q_BHQD, k_BGKD, v_BGKV))
    bias = None if position_bias is None else position_bias.float()[(None,) * (4 - position_bias.ndim)]
    seed = int(torch.randint(2**62, ())) if dropout else 0
    sinks = None if sinks is None else sinks.float().contiguous()
    options = (float(scale), softcap or 0.0, dropout, seed)
    out, lse, top = torch.ops.attn_plugins_cpp.softmax_forward(q, k, v, *tables, bias, sinks, *options)
    out = out[..., : v_BGKV.shape[3]].to(v_BGKV.dtype)
    if not return_lse:
        return out
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # the kernel's sign gives weights of 0 to what sees nothing
    return SoftmaxParts(out, lse.unsqueeze(3), top.unsqueeze(3))


def dense(x: torch.Tensor) -> torch.Tensor:
    """In float32, with a size that kernels take, dense in it."""
    x, rest = x.float(), -x.shape[3] % MULTIPLE
    x = pad(x, (0, rest)) if rest else x
    return x if x.stride(3) == 1 else x.contiguous()


def register() -> None:
    """Say of the operators, once they are loaded, what shapes they make and what their gradients are."""

    @torch.library.register_fake("attn_plugins_cpp::softmax_forward")
    def _(q, k, v, *others):
        batch, heads, queries, _ = q.shape
        lse, top = q.new_empty(batch, heads, queries), q.new_empty(batch, heads, queries)
        return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2), lse, top

    @torch.library.register_fake("attn_plugins_cpp::softmax_backward")
    def _(grad, grad_lse, grad_top, q, k, v, *others):
        like = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
        rows, queries = others[-5], q.shape[2]  # bias_rows
        return *like, q.new_empty(rows, q.shape[1], queries if rows else 0, k.shape[2])

    torch.library.register_autograd("attn_plugins_cpp::softmax_forward", _softmax_backward, setup_context=_keep_softmax)


def _keep_softmax(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, *tables, merged, bias, sinks, scale, softcap, dropout, seed = inputs
    ctx.save_for_backward(q, k, v, *output, bias, sinks, *tables)
    ctx.options = (merged, scale, softcap, dropout, seed)
    ctx.set_materialize_grads(False)


@outside_autocast
def _softmax_backward(
    ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None, grad_top: torch.Tensor | None
) -> tuple:
    q, k, v, out, lse, top, bias, sinks, *tables = ctx.saved_tensors
    merged, *numbers = ctx.options
    of_bias, of_sinks = ctx.needs_input_grad[9:11]
    grad = torch.zeros_like(out) if grad is None else grad
    dense = grad if grad.stride(3) == 1 else grad.contiguous()
    given = (q, k, v, out, lse, top, *tables, merged, bias, sinks, len(bias) if of_bias else 0)
    dq, dk, dv, d_bias = torch.ops.attn_plugins_cpp.softmax_backward(dense, grad_lse, grad_top, *given, *numbers)
    d_sinks = None
    if of_sinks:
        weight_BHQ = torch.exp(sinks.view(1, -1, 1) - lse)
        pulled_BHQ = (grad * out).sum(dim=3)
        d_sinks = -(weight_BHQ * (pulled_BHQ if grad_lse is None else pulled_BHQ - grad_lse)).sum(dim=(0, 2))
    return dq, dk, dv, *[None] * 6, d_bias.sum_to_size(bias.shape) if of_bias else None, d_sinks, *[None] * 4
