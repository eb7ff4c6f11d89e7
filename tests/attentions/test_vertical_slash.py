"""Vertical and slash lines against a loop over pairs, and their sample; the contract is in test_contract.py."""

import pytest
from cases import SCALE, Case, assert_forms_agree, assert_same, inputs, left_padding

from attn_plugins.attentions.vertical_slash import VerticalSlashAttention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks import vertical_slash as ops


def vertical_slash(**options):
    return Case(VerticalSlashAttention, options, False)


@pytest.mark.parametrize(
    "options",
    [
        {"vertical_size": 3, "slash_size": 4, "last_q": 5},
        {"vertical_size": 0, "slash_size": 2, "last_q": 1},
        {"vertical_size": 6, "slash_size": 1, "last_q": 100},
        {"vertical_size": 2, "slash_size": 80, "last_q": 1},
    ],
)
@pytest.mark.parametrize("pad", [0, 7])
def test_each_head_sees_its_heaviest_keys_and_diagonals(options, pad):
    length = 36
    case, given = vertical_slash(**options), inputs(1, length)
    padding = left_padding([length - pad], length) if pad else None
    out = given.run(case.module(), case.mask(1, length, length, padding_BK=padding))
    real = range(pad, length)
    sampled = min(options["last_q"], len(real))
    picked = [real[(2 * s + 1) * len(real) // (2 * sampled)] for s in range(sampled)]
    for h in range(4):
        q, k, v = given.q[0, h], given.k[0, h // 2], given.v[0, h // 2]
        by_key, by_distance = dict.fromkeys(real, 0.0), {}
        for i in picked:
            for j, weight in zip(real, (SCALE * (k[list(real)] @ q[i])).softmax(0).tolist(), strict=True):
                by_key[j] += weight
                by_distance[j - i] = by_distance.get(j - i, 0.0) + weight
        by_distance[0] = float("inf")
        vertical = sorted(by_key, key=lambda j: -by_key[j])[: options["vertical_size"]]
        slash = sorted(by_distance, key=lambda d: -by_distance[d])[: options["slash_size"]]
        for i in real:
            keys = [j for j in real if j in vertical or j - i in slash]
            want = (SCALE * (k[keys] @ q[i])).softmax(0) @ v[keys]
            assert_same({"out": out[0, i, h]}, {"out": want}, 1e-9, f"query {i}, head {h}: ")


def test_the_sample_is_spread_over_the_real_tokens_of_each_row():
    padding = left_padding([40, 13, 2, 0], 40)
    padding[0, 20:] = False
    index, there = ops.sample(AttentionMask(4, 40, 40, causal=False, padding_BK=padding), 5)
    picked = [row[real].tolist() for row, real in zip(index, there, strict=True)]
    assert picked == [[2, 6, 10, 14, 18], [28, 30, 33, 36, 38], [38, 39], []]


@pytest.mark.parametrize(("rows", "keys_at_once"), [(1, 1), (7, 100)])
def test_tiles_of_any_size_give_the_same(rows, keys_at_once, monkeypatch):
    case, given = vertical_slash(vertical_size=5, slash_size=6, last_q=9), inputs(2, 40)
    mask = case.mask(2, 40, 40, padding_BK=left_padding([40, 31], 40))
    out = given.run(case.module(), mask)
    monkeypatch.setattr(ops, "ROWS", rows)
    monkeypatch.setattr(ops, "KEYS_AT_ONCE", keys_at_once)
    assert_same({"out": given.run(case.module(), mask)}, {"out": out}, 1e-12)
    assert_forms_agree(case, given, mask)


def test_pairs_are_those_of_the_lines():
    length = 512
    case, given = vertical_slash(vertical_size=8, slash_size=6), inputs(1, length)
    mask = case.mask(1, length, length)
    chosen = ops.choose(given.q, given.k, mask, vertical_size=8, slash_size=6, last_q=64, scale=SCALE)
    vertical, *slash = ops.parts_of(*chosen, mask, 2)
    assert vertical.rows_TR.numel() * vertical.keys_XC.shape[1] == 4 * length * 8
    assert sum(part.rows_TR.numel() * part.keys_XC.shape[1] for part in slash) == 4 * length * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vertical_size": -1}, "vertical_size=-1; allowed: an integer from 0 on"),
        ({"slash_size": 0}, "slash_size=0; allowed: an integer from 1 on"),
        ({"last_q": 0}, "last_q=0; allowed: an integer from 1 on"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VerticalSlashAttention.Config(**options)


@pytest.mark.parametrize("backend", ["torch", "batched"])
def test_the_main_diagonal_counts_once_where_there_are_few(backend):
    case = vertical_slash(vertical_size=0, slash_size=6)
    mask = case.mask(2, 9, 9, padding_BK=left_padding([9, 2], 9))
    assert_forms_agree(case, inputs(2, 9), mask, backend=backend)
