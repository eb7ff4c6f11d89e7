"""A pattern and a mask in FlexAttention's terms: a function of one pair of indices, and the blocks that it concerns."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.block_limits import Blocks, MaskOfBlocks, visible_blocks
from attn_plugins.ops.softmax.tiles import Rule

BLOCK = 128
"""Queries, and keys, of a block: what FlexAttention's kernels are made for."""


class MaskOfPair(AttentionMask):
    """A mask that answers for the index of one query and one key, as scalars, in a given row and head.

    It looks things up in tables that are there already, and holds no number that follows from lengths: the code that
    comes of it is the same for every mask of the same kind.
    """

    def __init__(self, tables: "_Tables", row: Any, head: Any):
        numbers: dict[str, Any] = {name: table[row * 0] for name, table in tables.numbers.items()}
        q_offset, kv_offset = numbers.get("q_offset", 0), numbers.get("kv_offset", 0)
        super().__init__(0, 0, 0, **tables.fields, q_offset=q_offset, kv_offset=kv_offset)
        self.tables, self.row, self.head, self.number_before = tables, row, head, numbers.get("keys_before", 0)

    @property
    def keys_before(self) -> Any:
        return self.number_before

    @property
    def row_starts(self) -> Any:
        return self.tables.row_starts

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        return self.tables.made[key]

    def look_up(self, table: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
        places = (self.row if table.shape[0] > 1 else self.row * 0, *index)
        return table[places]

    def _evaluate(self, q_position: torch.Tensor, k_position: torch.Tensor) -> torch.Tensor:
        assert self.rule is not None
        return self.rule(self.row, self.head, q_position, k_position)


@dataclass(frozen=True, eq=False)
class _Tables:
    """What :class:`MaskOfPair` needs of another mask."""

    fields: dict[str, Any]
    numbers: dict[str, torch.Tensor]
    """Those of its numbers that are not 0, each (1,): as tensors, which code does not depend on."""
    row_starts: bool
    made: dict[Hashable, Any]


def flex_mask(mask: AttentionMask, pattern: Rule) -> BlockMask:
    """What mask and pattern show, made once a forward pass for all layers."""
    return mask.cached((pattern, "flex"), lambda: _flex_mask(mask, pattern))


def _flex_mask(mask: AttentionMask, pattern: Rule) -> BlockMask:
    of_blocks = MaskOfBlocks(mask)
    seen = visible_blocks(of_blocks, pattern, BLOCK)
    held = {name: _contiguous(getattr(mask, name)) for name in ("padding_BK", "segments_BK", "dense_BQK")}
    numbers = {"q_offset": mask.q_offset - mask.kv_offset, "kv_offset": 0, "keys_before": mask.keys_before}
    if not mask.plain:  # rules and structures go by absolute positions
        numbers |= {"q_offset": mask.q_offset, "kv_offset": mask.kv_offset}
    structure = mask.structure
    if structure is not None:
        structure = replace(structure, relations=tuple(one.mapped(_contiguous) for one in structure.relations))
    fields = {"causal": mask.causal, "plain": not mask.ruled, "rule": mask.rule, "structure": structure}
    tables = _Tables(
        {**fields, "device": mask.device, **held},
        {name: _number(value, mask.device) for name, value in numbers.items() if torch.is_tensor(value) or value},
        mask.row_starts,
        {key: _contiguous(table) for key, table in of_blocks.made.items() if torch.is_tensor(table)},
    )

    def mask_mod(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        pair = MaskOfPair(tables, row, head)
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


def _number(value: Any, device: torch.device) -> torch.Tensor:
    if torch.is_tensor(value):
        return value.to(torch.int32).reshape(1)
    return torch.full((1,), value, dtype=torch.int32, device=device)
