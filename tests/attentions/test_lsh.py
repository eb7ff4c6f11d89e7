"""Hashed attention against a loop over pairs, and its cost; the contract is in test_contract.py."""

import pytest
import torch
from cases import SCALE, Case, assert_forms_agree, assert_same, inputs, left_padding

from attn_plugins.attentions.lsh import LSHAttention
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks import lsh as ops


def lsh(causal=True, **options):
    return Case(LSHAttention, options, causal)


def bucket(x, directions):
    """The bucket of one vector: the nearest of the directions and their opposites."""
    dots = [float(x @ direction) for direction in directions]
    dots += [-dot for dot in dots]
    return dots.index(max(dots))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"num_buckets": 4, "num_hashes": 1, "bucket_size": 2},
        {"num_buckets": 2, "num_hashes": 3, "bucket_size": 6},
        {"num_buckets": 8, "num_hashes": 2, "bucket_size": 1},
    ],
)
@pytest.mark.parametrize("kind", ["whole", "left padding", "packed"])
def test_a_query_sees_the_nearest_of_its_buckets_and_itself(causal, options, kind):
    length = 70
    case, given = lsh(causal, **options), inputs(1, length)
    mask_options, sequences = {}, [range(length)]
    if kind == "left padding":
        mask_options, sequences = {"padding_BK": left_padding([length - 9], length)}, [range(9, length)]
    if kind == "packed":
        segments = (torch.arange(length) >= 40).long().unsqueeze(0)
        mask_options, sequences = {"segments_BK": segments}, [range(40), range(40, length)]
    module = case.module()
    out = given.run(module, case.mask(1, length, length, **mask_options))
    for h in range(4):
        q, k, v = given.q[0, h], given.k[0, h // 2], given.v[0, h // 2]
        of_q, of_k = ([[bucket(x, r) for x in side] for r in module.rotations] for side in (q, k))
        for tokens in sequences:
            for i in tokens:
                seen = {i}
                for a, b in zip(of_q, of_k, strict=True):
                    same = [j for j in tokens if b[j] == a[i]]
                    seen |= set([j for j in same if j <= i][-options["bucket_size"] :])
                    seen |= set() if causal else set([j for j in same if j > i][: options["bucket_size"]])
                keys = sorted(seen)
                want = (SCALE * (k[keys] @ q[i])).softmax(0) @ v[keys]
                assert_same({"out": out[0, i, h]}, {"out": want}, 1e-9, f"query {i}, head {h}: ")


def test_pairs_are_few_however_queries_and_keys_fall_into_buckets():
    length, size = 4096, 16
    mask = AttentionMask(1, length, length, causal=True)
    generator = torch.Generator().manual_seed(0)
    uneven = torch.rand(2, 1, 1, length, generator=generator).pow(4).mul(32).long()
    apart = torch.zeros(1, 1, length, dtype=torch.long)
    for of_queries, of_keys in ((uneven[0], uneven[1]), (apart, apart), (apart, apart + 1), (apart + 1, uneven[0])):
        now = ops.sort_round(of_queries, of_keys, mask, size)
        _, *parts = ops.parts_of([now], torch.arange(length), 1)
        pairs = sum(part.rows_TR.shape[1] * part.keys_XC.shape[1] * len(part.block_T) for part in parts)
        assert pairs <= length * (size + 3 * ops.TILE)


@pytest.mark.parametrize("tile", [1, 5, 64])
def test_tiles_of_any_size_give_the_same(tile, monkeypatch):
    case, given = lsh(num_buckets=4, num_hashes=3, bucket_size=5), inputs(2, 50)
    mask = case.mask(2, 50, 50, padding_BK=left_padding([50, 38], 50))
    out = given.run(case.module(), mask)
    monkeypatch.setattr(ops, "TILE", tile)
    assert_same({"out": given.run(case.module(), mask)}, {"out": out}, 1e-12)
    assert_forms_agree(case, given, mask)


def test_the_length_of_a_vector_is_no_matter():
    x = inputs(1, 40).k
    rotations = lsh().module().rotations
    assert torch.equal(ops.buckets(x, rotations), ops.buckets(7 * x, rotations))


def test_rotations_come_from_the_seed_alone():
    heads = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8)
    modules = [LSHAttention(LSHAttention.Config(seed=seed), heads) for seed in (0, 0, 1)]
    assert torch.equal(modules[0].rotations, modules[1].rotations)
    assert not torch.equal(modules[0].rotations, modules[2].rotations)
    assert "rotations" in modules[0].state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hashes": 0}, "num_hashes=0; allowed: an integer from 1 on"),
        ({"num_buckets": 5}, "num_buckets=5; allowed: an even integer from 2 on"),
        ({"bucket_size": 0}, "bucket_size=0; allowed: an integer from 1 on"),
        ({"seed": -1}, "seed=-1; allowed: an integer from 0 on"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LSHAttention.Config(**options)


def test_it_needs_the_sizes_of_the_heads():
    with pytest.raises(ValueError, match="needs the sizes of the heads, got None"):
        LSHAttention(LSHAttention.Config())
