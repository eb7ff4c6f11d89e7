"""A pattern and a mask in FlexAttention's terms: a function of one pair of indices, and the blocks that it concerns."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.block_limits import Blocks, MaskOfBlocks, visible_blocks
from attn_plugins.ops.softmax.tiles import Pattern

BLOCK = 128
"""Queries, and keys, of a block: what FlexAttention's kernels are made for."""


class MaskOfPair(AttentionMask):
    """A mask that answers for the index of one query and one key, as scalars, in a given row and head.

    It looks things up in tables that are there already, and holds no number that follows from lengths: the code that
    comes of it is the same for every mask of the same kind.
    """

    def __init__(self, tables: dict[str, Any], made: dict[Hashable, Any], row: Any, head: Any):
        super().__init__(0, 0, 0, **tables["fields"])
        self.tables, self.made, self.row, self.head = tables, made, row, head

    @property
    def keys_before(self) -> Any:
        return self.tables["keys_before"]

    @property
    def row_starts(self) -> Any:
        return self.tables["row_starts"]

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        return self.made[key]

    def look_up(self, table: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
        places = (self.row if table.shape[0] > 1 else self.row * 0, *index)
        return table[places]

    def _evaluate(self, q_position: torch.Tensor, k_position: torch.Tensor) -> torch.Tensor:
        assert self.rule is not None
        return self.rule(self.row, self.head, q_position, k_position)


def flex_mask(mask: AttentionMask, pattern: Pattern) -> BlockMask:
    """What mask and pattern show, made once a forward pass for all layers."""
    return mask.cached((pattern, "flex"), lambda: _flex_mask(mask, pattern))


def _flex_mask(mask: AttentionMask, pattern: Pattern) -> BlockMask:
    of_blocks = MaskOfBlocks(mask)
    seen = visible_blocks(of_blocks, pattern, BLOCK)
    tables = {
        "fields": {
            "causal": mask.causal,
            "plain": mask.plain,
            "padding_BK": _contiguous(mask.padding_BK),
            "segments_BK": _contiguous(mask.segments_BK),
            "dense_BQK": _contiguous(mask.dense_BQK),
            "rule": mask.rule,
            "q_offset": _number(mask.q_offset - mask.kv_offset if mask.plain else mask.q_offset, mask.device),
            "kv_offset": 0 if mask.plain else _number(mask.kv_offset, mask.device),
            "device": mask.device,
        },
        "keys_before": _number(mask.keys_before, mask.device),
        "row_starts": mask.row_starts,
    }
    made = {key: _contiguous(table) for key, table in of_blocks.made.items()}

    def mask_mod(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        pair = MaskOfPair(tables, made, row, head)
        return pair.shows(q, k) & pattern.sees(pair, q, k)

    return _block_mask(seen, mask_mod, (mask.q_length, mask.kv_length))


def _block_mask(seen: Blocks, mask_mod: Any, lengths: tuple[int, int]) -> BlockMask:
    whole = seen.every.unsqueeze(1)
    partial = seen.some.unsqueeze(1) & ~whole
    return BlockMask(
        lengths,
        *_listed(partial),
        *_listed(whole),
        *_listed(partial.mT),
        *_listed(whole.mT),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=mask_mod,
    )


def _listed(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many columns of each line are True, and their numbers, which come before those of the others."""
    first = table.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return table.sum(dim=-1).to(torch.int32), first.to(torch.int32).contiguous()


def _contiguous(table: Any) -> Any:
    """The same table, for kernels: positions in 32 bits."""
    if table is None:
        return None
    return (table.to(torch.int32) if table.dtype == torch.int64 else table).contiguous()


def _number(value: Any, device: torch.device) -> Any:
    """A number as a tensor, which code does not depend on, unless it is 0."""
    if isinstance(value, int) and value == 0:
        return 0
    return (
        torch.as_tensor(value, dtype=torch.int32)
        if torch.is_tensor(value)
        else torch.full((), value, dtype=torch.int32, device=device)
    )
