"""AttentionMask against a double loop in plain Python."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_plugins.core.mask import AttentionMask

TABLE = torch.arange(400).view(20, 20) % 7 % 3 == 0


def sliding(b, h, q, k):
    return (k <= q) & (k > q - 4)


def of_the_row(b, h, q, k):
    return (q + 2 * k + b) % 3 > 0


def from_a_table(b, h, q, k):
    return TABLE[q, k]


RULES = {"sliding": (sliding, True), "of the row": (of_the_row, False), "from a table": (from_a_table, False)}


@st.composite
def masks(draw):
    """(mask, what it was made from)"""
    batch, keys = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    queries, kv_offset = draw(st.integers(1, keys)), draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["causal", "bidirectional", "dense", *RULES]))
    made = {
        "causal": kind in ("causal", "sliding"),
        "plain": kind in ("causal", "bidirectional"),
        "kv_offset": kv_offset,
    }

    def table(rows, elements):
        return torch.tensor(
            draw(st.lists(st.lists(elements, min_size=keys, max_size=keys), min_size=rows, max_size=rows))
        )

    if draw(st.booleans()):
        made["padding_BK"] = table(draw(st.sampled_from([1, batch])), st.booleans())
    if made["plain"] and draw(st.booleans()):
        made["segments_BK"] = table(draw(st.sampled_from([1, batch])), st.integers(0, 2)).sort(dim=1).values
    if kind == "dense":
        rows = draw(st.sampled_from([1, batch]))
        made["dense_BQK"] = torch.stack([table(queries, st.booleans()) for _ in range(rows)])
    if kind in RULES:
        made["rule"] = RULES[kind][0]
        made["vectorised"] = draw(st.booleans())
    return AttentionMask(batch, queries, keys, **made), made


def of(table, row):
    return table[row % len(table)]


def sees(mask, made, b, i, j):
    """Whether query i of row b sees key j, the long way."""
    if not (0 <= i < mask.q_length and 0 <= j < mask.kv_length):
        return False
    own = i + mask.kv_length - mask.q_length
    if "padding_BK" in made and not of(made["padding_BK"], b)[j]:
        return False
    if "dense_BQK" in made:
        return bool(of(made["dense_BQK"], b)[i, j])
    if "rule" in made:
        offset = mask.kv_offset
        return bool(made["rule"](*(torch.tensor(x) for x in (b, 0, own + offset, j + offset))))
    if made["causal"] and j > own:
        return False
    return "segments_BK" not in made or bool(of(made["segments_BK"], b)[own] == of(made["segments_BK"], b)[j])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(masks())
def test_dense_is_the_double_loop(drawn):
    mask, made = drawn
    want = [
        [[sees(mask, made, b, i, j) for j in range(mask.kv_length)] for i in range(mask.q_length)]
        for b in range(mask.batch_size)
    ]
    got = mask.dense()
    assert got.dtype == torch.bool
    assert got.shape[0] in (1, mask.batch_size)
    assert got.shape[1:] == (1, mask.q_length, mask.kv_length)
    assert torch.equal(got[:, 0].expand(mask.batch_size, -1, -1), torch.tensor(want))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(drawn=masks(), data=st.data())
def test_visible_is_the_double_loop_for_any_indices(drawn, data):
    mask, made = drawn
    rows = data.draw(st.sampled_from([1, mask.batch_size]))
    indices = st.integers(-2, 11)
    shape = {"min_size": 3 * rows, "max_size": 3 * rows}
    q_index = torch.tensor(data.draw(st.lists(indices, **shape))).view(rows, 3, 1)
    k_index = torch.tensor(data.draw(st.lists(indices, **shape))).view(rows, 1, 3)
    got = mask.visible(q_index, k_index)
    for b in range(mask.batch_size):
        for i in range(3):
            for j in range(3):
                want = sees(mask, made, b, int(of(q_index, b)[i, 0]), int(of(k_index, b)[0, j]))
                assert of(got, b)[i, j] == want


@settings(max_examples=150, deadline=None, derandomize=True)
@given(masks())
def test_starts_are_the_first_real_key_of_the_row_or_segment(drawn):
    mask, made = drawn
    got = mask.starts_BK()
    assert got.dtype == torch.long
    for b in range(mask.batch_size):
        for j in range(mask.kv_length):
            if mask.kv_offset and "segments_BK" not in made:
                want = -mask.kv_offset
            else:
                first = 0
                while "segments_BK" in made and of(made["segments_BK"], b)[first] != of(made["segments_BK"], b)[j]:
                    first += 1
                real = [n for n in range(first, j + 1) if "padding_BK" not in made or of(made["padding_BK"], b)[n]]
                want = real[0] if real else first
            assert of(got, b)[j] == want, (b, j)


def test_starts_count_from_dropped_keys():
    padding = torch.tensor([[True] * 4, [False, False, True, True]])
    mask = AttentionMask(2, 1, 4, causal=True, kv_offset=6, padding_BK=padding, first_B=torch.tensor([-6, 2]))
    assert mask.row_starts
    assert mask.starts_BK().tolist() == [[-6] * 4, [2] * 4]


def test_what_is_computed_once_is_shared():
    mask, calls = AttentionMask(1, 2, 2, causal=True), []
    assert [mask.cached("key", lambda: calls.append(1) or len(calls)) for _ in range(3)] == [1, 1, 1]
    assert mask.dense() is mask.dense()


def test_a_mask_that_is_not_plain_says_what_is_visible():
    with pytest.raises(ValueError, match="not plain needs a rule or a dense mask"):
        AttentionMask(1, 2, 2, causal=True, plain=False)


def test_to_another_device_keeps_the_rule_where_it_was_made():
    made_on = []

    def rule(b, h, q, k):
        made_on.append(q.device.type)
        return k <= q

    padding = torch.tensor([[True, True, False]])
    mask = AttentionMask(1, 3, 3, causal=True, plain=False, rule=rule, padding_BK=padding)
    assert mask.to("cpu") is mask
    assert mask.to(torch.float16) is mask
    mask.dense()
    moved = mask.to("meta")
    assert moved.device.type == "meta"
    assert moved.padding_BK.device.type == "meta"
    assert moved.memo == {}, "what was computed on one device is no use on the other"
    assert moved.starts_BK().device.type == "meta"
    assert mask.device.type == mask.padding_BK.device.type == "cpu"
    assert made_on == ["cpu"]


def test_as_cross_is_shared_and_changes_nothing_else():
    mask = AttentionMask(1, 2, 5, causal=False)
    crossed = mask.as_cross()
    assert crossed.cross
    assert not mask.cross
    assert crossed is mask.as_cross()
    assert crossed.as_cross() is crossed
    assert torch.equal(crossed.dense(), mask.dense())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))])
def test_copies_are_the_same_mask(duplicate):
    mask = AttentionMask(2, 3, 4, causal=True, padding_BK=torch.tensor([[True] * 4, [False, True, True, True]]))
    assert torch.equal(duplicate(mask).dense(), mask.dense())


def test_repr_says_what_kind_of_mask_it_is():
    padding = torch.ones(2, 4, dtype=torch.bool)
    text = repr(AttentionMask(2, 3, 4, causal=True, plain=False, rule=sliding, padding_BK=padding))
    assert text == "AttentionMask(B=2, Q=3, K=4, causal, padding_BK, rule)"
    assert "cross" in repr(AttentionMask(1, 1, 2, causal=False, cross=True))
