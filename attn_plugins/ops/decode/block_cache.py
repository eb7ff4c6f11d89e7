"""Decoding with a cache of blocks: all keys and values are kept, a query reads those of the blocks that it selects.

What the choice needs of a block is computed once, when the block's last key has come. Blocks count from each row's
first real token, so rows of a batch may begin theirs at different positions.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from attn_plugins.core.decode_state import State
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import accumulation_dtype, masked_softmax, with_dropout

MAX_GATHER_QUERIES = 16
"""Most queries that gather the keys of their blocks each for itself; for more, queries of one block share its keys."""
ROOM = 64
"""Fewest tokens that there is room for."""
KEYS_AT_ONCE = 4096
"""Keys of completed blocks that are worked on at a time."""


class KeyBlocks(State):
    """Keys and values of all tokens, and summaries of complete blocks of them.

    Buffers have room for tokens to come, and double when it is used up. ``tensors``: k (B, G, room, D) and v likewise,
    by position; not_padding (B, room); start (B,), each row's first real position, -1 before it has come; filled
    (B, N), whether a block of ``block_size`` keys has real ones. Without ``kernel`` also mean (B, G, N, D), of a
    block's real keys. With it k_compressed (B, G, M, D) and v_compressed, weighted sums over ``kernel_size`` keys at
    each multiple of ``kernel_stride``, and whole (B, M), whether all of these are real. The weights are those of the
    call in which the last key came: training changes them, so that a cache made before is not to be used after.

    What stands in a summary before the block's last key has come means nothing, and no query sees it. So tokens are
    removed by lowering ``length``.

    Args:
        block_size: keys a block.
        kernel: (kernel_size, kernel_stride) of compressed blocks, if there are any.
        fixed_length: as for every state.
    """

    supports_fixed_length = grows = True

    def __init__(self, block_size: int, kernel: tuple[int, int] | None = None, fixed_length: int | None = None):
        super().__init__(fixed_length)
        self.block_size, self.kernel = block_size, kernel
        self.started = False
        """Whether every row has had a real token."""
        self.shared_start: int | None = None
        """The first real position, where all rows have the same."""
        self.padded = False
        """Whether there ever was padding."""

    def flush_pending(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The new tokens: none are ever pending, and nothing has to be recorded for a crop."""
        return new

    def reset(self) -> None:
        super().reset()
        self.started, self.shared_start, self.padded = False, None, False
        if self.tensors:
            self.tensors["start"].fill_(-1)

    def append(
        self,
        k_BGKD: torch.Tensor,
        v_BGKV: torch.Tensor,
        mask: AttentionMask,
        weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Append the next tokens, the last of ``mask``'s, and summarise the blocks that they complete.

        Args:
            weights: (G, kernel_size) of the keys and of the values in a compressed block.
        """
        new = k_BGKD.shape[2]
        self.padded = self.padded or mask.padding_BK is not None
        self._make_room(k_BGKD, v_BGKV, new)
        if not self.started:
            start_B = self.tensors["start"]
            self.started = self.find_starts(start_B, mask, new)
            if self.started and self.fixed_length is None:
                first = int(start_B[0])
                self.shared_start = first if bool((start_B == first).all()) else None
        position = torch.arange(new, device=k_BGKD.device) + self.position
        self.write("k", 2, position, k_BGKD)
        self.write("v", 2, position, v_BGKV)
        if mask.padding_BK is None:
            not_padding_BK = torch.ones(1, 1, dtype=torch.bool, device=k_BGKD.device).expand(mask.batch_size, new)
        else:
            not_padding_BK = mask.padding_BK.index_select(1, position).expand(mask.batch_size, -1)
        self.write("not_padding", 1, position, not_padding_BK)
        self.advance(new)
        self._summarise(new, weights)

    def blocks_seen(self, stride: int, allocated: int) -> int:
        """Blocks at multiples of ``stride`` that may have begun; as many as ever will where shapes have to stay."""
        return allocated if self.fixed_length is not None else min(allocated, self.length // stride + 1)

    def last(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and positions of the last tokens; positions are negative where a static cache has fewer."""
        if self.fixed_length is not None:
            position = torch.arange(number, device=self.tensors["k"].device) + (self.position - number)
            k, v = (self.tensors[name].index_select(2, position.clamp(min=0)) for name in "kv")
            return k, v, position
        low = max(0, self.length - number)
        k, v = (self.tensors[name][:, :, low : self.length] for name in "kv")
        return k, v, torch.arange(low, self.length, device=k.device)

    def starts(self) -> torch.Tensor:
        """(B,), 0 for rows that have had no real token."""
        return self.tensors["start"].clamp(min=0)

    def _summarise(self, new: int, weights: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        size = self.block_size
        for index_BN, position_BNC in self._completed(size, size, new):
            not_padding_BNC = _at(self.tensors["not_padding"].unsqueeze(1).unsqueeze(3), position_BNC).squeeze(4)
            self._write_rows("filled", index_BN, not_padding_BNC.any(dim=3))
            if self.kernel is None:
                not_padding_BNC = not_padding_BNC.to(self.tensors["mean"].dtype)
                keys = _at(self.tensors["k"], position_BNC).to(not_padding_BNC.dtype)
                mean = torch.einsum("bgncd,bxnc->bgnd", keys, not_padding_BNC) / not_padding_BNC.sum(dim=3).clamp(
                    min=1
                ).unsqueeze(3)
                self._write_rows("mean", index_BN, mean)
        if self.kernel is None:
            return
        assert weights is not None
        for index_BM, position_BMC in self._completed(*self.kernel, new):
            not_padding_BMC = _at(self.tensors["not_padding"].unsqueeze(1).unsqueeze(3), position_BMC).squeeze(4)
            self._write_rows("whole", index_BM, not_padding_BMC.all(dim=3))
            for name, weight_GC in zip("kv", weights, strict=True):
                held = self.tensors[f"{name}_compressed"]
                x = _at(self.tensors[name], position_BMC).to(held.dtype)
                summed = torch.einsum("bgmcd,gc->bgmd", x, weight_GC.to(held.dtype))
                self._write_rows(f"{name}_compressed", index_BM, summed)

    def _completed(self, size: int, stride: int, new: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(B, N) numbers and (B, N, size) keys of the blocks whose last key may be one of the ``new`` last ones."""
        number, before = (new - 1) // stride + 1, self.position - new
        if self.fixed_length is None and self.shared_start is not None:
            reach = self.shared_start + size - 1
            number = (self.length - 1 - reach) // stride - max(0, -((reach - before) // stride)) + 1
        if size > self.tensors["k"].shape[2]:
            return  # there is not even room for one
        start_B1 = self.starts().unsqueeze(1)
        first_B1 = -torch.div(start_B1 + (size - 1 - before), stride, rounding_mode="floor")
        first_B1, step = first_B1.clamp(min=0), max(1, KEYS_AT_ONCE // size)
        for low in range(0, number, step):
            index_BN = first_B1 + torch.arange(low, min(low + step, number), device=first_B1.device)
            begin_BN1 = (start_B1 + index_BN * stride).unsqueeze(2)
            position_BNC = begin_BN1 + torch.arange(size, device=begin_BN1.device)
            yield index_BN, position_BNC.clamp(max=self.tensors["k"].shape[2] - 1)

    def _make_room(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, new: int) -> None:
        held = self.tensors["k"].shape[2] if self.tensors else 0
        if held and self.fixed_length is not None:
            return
        tokens = self.length + new
        if tokens <= held:
            return
        room = max(ROOM, 2 * held, tokens) if self.fixed_length is None else self.fixed_length
        batch, groups, _, head_dim = k_BGKD.shape
        value_dim, dtype = v_BGKV.shape[3], accumulation_dtype(k_BGKD, v_BGKV)
        number = room // self.block_size + 2
        made = {
            "k": k_BGKD.new_zeros(batch, groups, room, head_dim),
            "v": v_BGKV.new_zeros(batch, groups, room, value_dim),
            "not_padding": k_BGKD.new_zeros(batch, room, dtype=torch.bool),
            "start": torch.full((batch,), -1, device=k_BGKD.device),
            "filled": k_BGKD.new_zeros(batch, number, dtype=torch.bool),
        }
        if self.kernel is None:
            made["mean"] = k_BGKD.new_zeros(batch, groups, number, head_dim, dtype=dtype)
        else:
            number = room // self.kernel[1] + 2
            made["k_compressed"] = k_BGKD.new_zeros(batch, groups, number, head_dim, dtype=dtype)
            made["v_compressed"] = v_BGKV.new_zeros(batch, groups, number, value_dim, dtype=dtype)
            made["whole"] = k_BGKD.new_zeros(batch, number, dtype=torch.bool)
        for name, old in self.tensors.items():
            made[name][tuple(slice(size) for size in old.shape)].copy_(old)
        self.tensors = made

    def _write_rows(self, name: str, index_BN: torch.Tensor, x_BGND: torch.Tensor) -> None:
        """Into (B, G, rows, D) at (B, N); what goes into a table of (B, rows) comes as (B, 1, N)."""
        held = self.tensors[name]
        index, dim = index_BN.unsqueeze(1).expand(x_BGND.shape[:3]), x_BGND.shape[3:]
        table = held if dim else held.unsqueeze(1)
        index = index.reshape(*index.shape, *[1] * len(dim)).expand(*index.shape, *dim)
        if x_BGND.requires_grad or held.requires_grad:
            self.tensors[name] = table.scatter(2, index, x_BGND).view(held.shape)
        else:
            table.scatter_(2, index, x_BGND)

    def like(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.tensors["k"], self.tensors["v"]) if self.tensors else None

    def _reaches(self, target: int) -> bool:
        return True

    def _rewind(self, target: int) -> None:
        self.length = target
        start_B = self.tensors["start"]
        later_B = start_B >= target
        if bool(later_B.any()):
            start_B.masked_fill_(later_B, -1)
            self.started, self.shared_start = False, None


def _at(x_BGKD: torch.Tensor, index_BNC: torch.Tensor) -> torch.Tensor:
    """(B, G, N, C, D): the same rows of each head."""
    return rows_at(x_BGKD, index_BNC.unsqueeze(1).expand(-1, x_BGKD.shape[1], -1, -1))


def rows_at(x_BGKD: torch.Tensor, index_BX: torch.Tensor) -> torch.Tensor:
    """Rows by their indices (B, X, ...), where X / G of them one after the other are for the same head: (B, X, ..., D).

    By number in a table of all rows: that copies whole rows, several times as fast as ``gather``.
    """
    batch, groups, rows, size = x_BGKD.shape
    first = torch.arange(0, batch * groups * rows, rows, device=x_BGKD.device).view(batch, groups, 1)
    first_BX = first.expand(-1, -1, index_BX.shape[1] // groups).flatten(1)
    number = index_BX + first_BX.view(*first_BX.shape, *[1] * (index_BX.ndim - 2))
    return x_BGKD.reshape(-1, size).index_select(0, number.flatten()).view(*index_BX.shape, size)


@torch.no_grad()
def choose_by_means(
    q_BHQD: torch.Tensor, position_Q: torch.Tensor, state: KeyBlocks, topk: int, init_blocks: int
) -> torch.Tensor:
    """(B, H, Q, at most topk) blocks, as :func:`attn_plugins.ops.blocks.gather.choose_blocks` chooses them."""
    own_BQ1 = own_blocks(position_Q, state).unsqueeze(2)
    own_BHQ1 = own_BQ1.unsqueeze(1).expand(*q_BHQD.shape[:3], 1)
    mean_BGND = state.tensors["mean"]
    number = state.blocks_seen(state.block_size, mean_BGND.shape[2])
    width = min(topk - 1, number)
    if not width:
        return own_BHQ1
    q = q_BHQD.to(mean_BGND.dtype).reshape(*mean_BGND.shape[:2], -1, q_BHQD.shape[3])
    scores = (q @ mean_BGND[:, :, :number].mT).view(*q_BHQD.shape[:3], number)
    block = torch.arange(number, device=q.device)
    scores.masked_fill_(block < min(init_blocks, topk - 1), torch.inf)
    candidate = (block < own_BQ1) & state.tensors["filled"][:, None, :number]
    best = scores.masked_fill(~candidate.unsqueeze(1), -torch.inf).topk(width, dim=-1)
    return torch.cat([own_BHQ1, best.indices.masked_fill(best.values == -torch.inf, -1)], dim=3)


def own_blocks(position_Q: torch.Tensor, state: KeyBlocks) -> torch.Tensor:
    """(B, Q): the block of each query."""
    place_BQ = (position_Q - state.starts().unsqueeze(1)).clamp(min=0)
    return torch.div(place_BQ, state.block_size, rounding_mode="floor")


def chosen_attention(
    q_BHQD: torch.Tensor,
    position_Q: torch.Tensor,
    state: KeyBlocks,
    chosen_BXQT: torch.Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over the keys of chosen blocks, of which no others are touched.

    Args:
        position_Q: of the queries, which have been taken in.
        chosen_BXQT: for each query head, or for those of a key/value head together; -1 for none. The first is the
            query's own.

    Returns:
        out_BHQV in float32, or float64.
    """
    start = state.starts().view(-1, 1, 1, 1, 1)
    own = position_Q.view(-1, 1, 1)
    block = chosen_BXQT.unsqueeze(4)
    seen = state.length if state.fixed_length is None else state.fixed_length
    size = min(state.block_size, seen)  # all keys, where a block would hold more
    index = block * state.block_size + start + torch.arange(size, device=block.device)
    visible = (block >= 0) & (index <= own)
    index, visible = torch.where(visible, index, own).flatten(3), visible.flatten(3)
    k, v = (rows_at(state.tensors[name], index) for name in "kv")
    if state.padded:
        not_padding = state.tensors["not_padding"][:, None, :, None]
        visible = visible & rows_at(not_padding, index.flatten(1).unsqueeze(1)).view(index.shape)
    # Each query has its own keys, which the heads that share a choice share: as if it were these heads' only one.
    batch, shared, queries, keys = index.shape
    q = q_BHQD.unflatten(1, (shared, -1)).transpose(2, 3).flatten(1, 3).unsqueeze(2)
    out, _ = grouped_attention(
        q, k.flatten(1, 2), v.flatten(1, 2), visible.view(batch, -1, 1, 1, keys), scale=scale, dropout=dropout
    )
    return out.view(batch, shared, queries, -1, out.shape[3]).transpose(2, 3).flatten(1, 2)


def grouped_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention that repeats no keys: query heads that share a key/value head are rows of one product.

    Args:
        visible: broadcasts to (B, G, H / G, Q, K).

    Returns:
        (out_BHQV, weights_BHQK before dropout), in at least float32.
    """
    dtype, (batch, heads, queries, size), groups = (
        accumulation_dtype(q_BHQD, k_BGKD, v_BGKV),
        q_BHQD.shape,
        k_BGKD.shape[1],
    )
    rows = (q_BHQD.to(dtype) * scale).reshape(batch, groups, -1, size)
    s = (rows @ k_BGKD.to(dtype).mT).view(batch, groups, -1, queries, k_BGKD.shape[2])
    weights = masked_softmax(s, visible)
    kept = with_dropout(weights, dropout).flatten(2, 3)
    out = kept @ v_BGKV.to(dtype)
    return out.view(batch, heads, queries, -1), weights.flatten(1, 2)


def attention_from_blocks(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    state: KeyBlocks,
    attend: Callable[..., torch.Tensor],
    gather_attend: Callable[..., torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Attention of the last Q of K new tokens, which ``state`` takes in.

    Args:
        attend: the attention over all keys, for many queries.
        attend_few: the attention of ``(q_BHQD, position_Q, state)``, for a few.
        weights: as :meth:`KeyBlocks.append` wants them.
        options: of both.

    Returns:
        out_BHQV in the dtype of v.
    """
    queries = q_BHQD.shape[2]
    state.append(k_BGKD, v_BGKV, mask, weights)
    if queries <= MAX_GATHER_QUERIES:
        position_Q = torch.arange(queries, device=q_BHQD.device) + (state.position - queries)
        return gather_attend(q_BHQD, position_Q, state, **options).to(v_BGKV.dtype)
    if state.length > k_BGKD.shape[2]:
        k_BGKD, v_BGKV = (state.tensors[name][:, :, : state.length] for name in "kv")
    return attend(q_BHQD, k_BGKD, v_BGKV, mask=mask, **options)
