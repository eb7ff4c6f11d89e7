"""Luong's local attention: its formula in a loop, places that do not depend on padding, the monotonic form, cost."""

import math

import pytest
import test_contract
import torch
from cases import SCALE, Case, inputs, left_padding

from attn_plugins.attentions.luong_local import LuongLocalAttention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.predicted_window import dense_window, windowed

PREDICTED = Case(LuongLocalAttention, {"half_window": 3, "hidden_dim": 4, "chunk_size": 4}, False)
MONOTONIC = Case(LuongLocalAttention, {"half_window": 2, "center": "monotonic", "chunk_size": 4}, False)


@pytest.mark.parametrize("cross", [True, False])
def test_weights_are_a_softmax_over_the_window_times_a_gaussian(cross):
    """Luong et al. 2015, eq. 9 and 10, with positions from 0."""
    queries, keys = (5, 12) if cross else (12, 12)
    module, given = PREDICTED.module(), inputs(1, queries, keys)
    mask = AttentionMask(1, queries, keys, causal=False, cross=cross)
    out, weights = given.call(module, mask, need_weights=True)
    for h in range(4):
        for i in range(queries):
            hidden = torch.tanh(module.place_weight[h] @ given.q[0, h, i])
            place = keys * torch.sigmoid(module.place_vector[h] @ hidden).item()
            window = [j for j in range(keys) if place - 3 <= j <= place + 3]
            scores = torch.stack([SCALE * given.q[0, h, i] @ given.k[0, h // 2, j] for j in window])
            want = torch.zeros(keys, dtype=torch.float64)
            for j, share in zip(window, scores.softmax(0), strict=True):
                want[j] = share * math.exp(-((j - place) ** 2) / (2 * 1.5**2))
            torch.testing.assert_close(weights[0, h, i], want)
    torch.testing.assert_close(given.run(module, mask), out)


def test_the_monotonic_form_is_a_plain_window_around_the_query():
    given, mask = inputs(1, 9), MONOTONIC.mask(1, 9, 9)
    out, weights = given.call(MONOTONIC.module(), mask, need_weights=True)
    index = torch.arange(9)
    near = (index - index[:, None]).abs() <= 2
    assert torch.equal(weights[0, 0] > 0, near)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 9, dtype=torch.float64))
    torch.testing.assert_close(given.run(MONOTONIC.module(), mask), out)
    cross = AttentionMask(1, 9, 9, causal=False, cross=True)
    for need_weights in (True, False):
        with pytest.raises(ValueError, match=r"center='monotonic' needs the places of queries .* center='predicted'"):
            inputs(1, 9).call(MONOTONIC.module(), cross, need_weights=need_weights)


def test_places_are_counted_within_the_keys_that_are_real():
    """The same keys with padding before, behind, and both: the same outputs, for queries of another sequence too."""
    module, short = PREDICTED.module(), inputs(1, 5, 8)
    wanted = short.run(module, AttentionMask(1, 5, 8, causal=False, cross=True))
    for before in (0, 2, 4):
        long = inputs(1, 5, 12, seed=1)
        long.q, long.hidden = short.q, short.hidden
        for name in ("k", "v"):
            x = getattr(long, name).clone()
            x[:, :, before : before + 8] = getattr(short, name)
            setattr(long, name, x)
        real = (torch.arange(12) >= before) & (torch.arange(12) < before + 8)
        mask = AttentionMask(1, 5, 12, causal=False, cross=True, padding_BK=real.unsqueeze(0))
        torch.testing.assert_close(long.run(module, mask), wanted)
        dense = long.call(module, mask, need_weights=True)[0]
        torch.testing.assert_close(dense, wanted)


def test_a_segment_has_its_own_length():
    module, given = PREDICTED.module(), inputs(1, 11)
    segments = torch.tensor([[0] * 4 + [1] * 7])
    packed = given.run(module, PREDICTED.mask(1, 11, 11, segments_BK=segments))
    for start, stop in ((0, 4), (4, 11)):
        part = inputs(1, stop - start)
        for name in ("q", "k", "v", "hidden"):
            setattr(part, name, getattr(given, name)[:, :, start:stop])
        torch.testing.assert_close(packed[:, start:stop], part.run(module, PREDICTED.mask(1, *2 * [stop - start])))


def test_a_query_reads_its_window_alone():
    """What lies outside of every window may be anything, infinite too, in the form whose cost is the window."""
    given = inputs(1, 4, 40)
    module = PREDICTED.module()
    with torch.no_grad():
        module.place_vector.fill_(-50.0)
        module.place_weight.copy_(module.place_weight.abs())
    given.q = given.q.abs()  # all look at the beginning
    mask = AttentionMask(1, 4, 40, causal=False, cross=True)
    wanted = given.run(module, mask)
    given.k, given.v = given.k.clone(), given.v.clone()
    given.k[:, :, 10:] = given.v[:, :, 10:] = torch.inf
    torch.testing.assert_close(given.run(module, mask), wanted)


def test_a_key_at_the_edge_counts_however_its_distance_rounds():
    """From p = 1 - 2^-24 key 4 is more than 3 away, and 3 as float32 has it."""
    given, mask = inputs(1, 5, 20).to(torch.float32), AttentionMask(1, 5, 20, causal=False, cross=True)
    centre = torch.full((1, 4, 5), 1 - 2.0**-24)
    how = {"half_window": 3, "gaussian": True, "scale": SCALE, "dropout": 0.0}
    tensors = given.q, given.k, given.v
    want, weights = dense_window(*tensors, torch.ones(1, dtype=torch.bool), centre, **how)
    assert (weights > 0).sum(-1).eq(5).all()
    for chunk_size in (2, None):
        torch.testing.assert_close(windowed(*tensors, mask, centre, chunk_size=chunk_size, **how), want)


def test_the_place_learns():
    module, given = PREDICTED.module(), inputs(2, 5, 20)
    mask = AttentionMask(2, 5, 20, causal=False, cross=True, padding_BK=left_padding([20, 9], 20))
    given.run(module, mask).square().sum().backward()
    for weight in module.parameters():
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["half_window", "hidden_dim", "chunk_size"])
def test_options_out_of_range(name):
    with pytest.raises(ValueError, match=rf"{name}=0.*an integer from 1 on"):
        LuongLocalAttention.Config(**{name: 0})
    with pytest.raises(ValueError, match="needs the sizes of the heads, got None"):
        LuongLocalAttention(LuongLocalAttention.Config())


CONTRACT = [
    test_contract.test_left_padding_does_not_matter,
    test_contract.test_packed_segments_do_not_leak,
    test_contract.test_fast_form_equals_reference_in_float32,
]


@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_the_monotonic_form_keeps_the_contract(test):
    getattr(test, "of_case", test)(MONOTONIC)
