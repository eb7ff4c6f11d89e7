"""Blocks that kernels leave out, or take for visible as a whole, against every single pair."""

import pytest
import torch
from cases import CASES, left_padding, naming

from attn_plugins.core.grid import Grid
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.ops.softmax.attention import FollowsRules
from attn_plugins.ops.softmax.block_limits import MaskOfBlocks, visible_blocks
from attn_plugins.ops.softmax.patterns.band import Band, BlockBand
from attn_plugins.ops.softmax.patterns.neighborhood import Neighborhood
from attn_plugins.ops.softmax.tiles import dense_pattern

SIZE, LENGTH = 16, 150


def masks(causal, queries=LENGTH):
    padding = left_padding([LENGTH, 61], LENGTH)
    index = torch.arange(LENGTH)
    segments = torch.stack([(index >= 40).long() + (index >= 103), (index >= 75).long()])
    dense = torch.rand(2, queries, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.01
    for name, options in {
        "plain": {},
        "left padding": {"padding_BK": padding},
        "right padding": {"padding_BK": padding.flip(1)},
        "packed": {"segments_BK": segments},
        "packed and padded": {"segments_BK": segments, "padding_BK": padding.flip(1)},
        "of one table for all rows": {"segments_BK": segments[:1], "padding_BK": padding[1:]},
        "after keys that a cache has dropped": {"kv_offset": 37},
        "a rule": {"plain": False, "rule": lambda b, h, q, k: k <= q},
        "dense": {"plain": False, "dense_BQK": dense},
    }.items():
        yield name, AttentionMask(2, queries, LENGTH, causal=causal, **options)


def by_pairs(visible_BQK):
    """(blocks with a visible pair, blocks of which every pair is)."""
    batch, queries, keys = visible_BQK.shape
    rows, columns = -(-queries // SIZE), -(-keys // SIZE)
    padded = visible_BQK.new_zeros(batch, rows * SIZE, columns * SIZE)
    padded[:, :queries, :keys] = visible_BQK
    blocks = padded.unflatten(1, (rows, SIZE)).unflatten(3, (columns, SIZE))
    return blocks.any(4).any(2), blocks.all(4).all(2)


def assert_limits_hold(mask, pattern, spare):
    some, every = by_pairs(dense_pattern(mask, pattern)[:, 0])
    got = visible_blocks(MaskOfBlocks(mask), pattern, SIZE)
    assert (got.some | ~some).all(), "a visible pair is in none of the blocks"
    assert (every | ~got.every).all(), "a block holds a hidden pair"
    assert got.some.float().mean() <= some.float().mean() + spare, "blocks that hold nothing are not left out"


CLASSES = [cls for cls in map(get_attention, list_attentions()) if issubclass(cls, FollowsRules)]


@pytest.mark.parametrize("case", [case for case in CASES if case.cls in CLASSES], ids=str)
def test_every_visible_pair_is_in_a_block_and_whole_blocks_hide_none(case):
    for queries in (LENGTH, 37):
        for name, mask in masks(case.causal, queries):
            q = torch.zeros(2, 2, queries, 8)
            for _, pattern in case.module().by_rules(q, q, mask)[2]:
                with naming(queries, "queries", name, pattern):
                    assert_limits_hold(mask, pattern, 0.2 if mask.plain else 1)


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "prefix", "grid"), [(3, 1, 1, (7, 23)), (5, 2, 0, (12, 20)), (3, 1, 2, (2, 80))]
)
def test_blocks_of_a_grid(kernel_size, dilation, prefix, grid):
    length = prefix + grid[0] * grid[1]
    mask = AttentionMask(1, length, length, causal=False)
    assert_limits_hold(
        mask, Neighborhood(Grid(grid), prefix, (kernel_size,) * 2, (dilation,) * 2, (False, False)), 0.15
    )


def test_blocks_that_are_wholly_visible_are_found():
    mask = AttentionMask(1, 160, 160, causal=True)
    got = visible_blocks(MaskOfBlocks(mask), Band(64, 0), SIZE)
    some, every = by_pairs(dense_pattern(mask, Band(64, 0))[:, 0])
    assert got.some.equal(some)
    assert got.every.equal(every)
    assert visible_blocks(MaskOfBlocks(mask), BlockBand(32), SIZE).every.sum() == 5
