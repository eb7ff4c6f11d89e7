"""Log-linear attention beyond the contract: levels, the start, states, and published code."""

import dataclasses
import math

import pytest
import torch
from cases import SCALE, Case, assert_same, inputs, left_padding, outcome, rounds
from naive_forms import flash_linear_attention

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops.recurrent import log_linear

FORMS = ["reference", "torch", "batched"]


def made(name="log_linear", **options):
    return Case(get_attention(name), {"chunk_size": 4, **options}, causal=True)


def level_of(query, key):
    """By the tree: the sums before a query's position, from the nearest on, hold the powers of two that make it up."""
    if query == key:
        return 0
    end = query
    while True:
        bit = end & -end  # the lowest one: that many tokens before ``end`` are in one sum
        if key >= end - bit:
            return bit.bit_length()
        end -= bit


def test_levels_are_those_of_a_fenwick_tree():
    position = torch.arange(70)
    got = log_linear._level(position.unsqueeze(1), position.unsqueeze(0), 20).tril()
    assert got.tolist() == [[level_of(i, j) if j <= i else 0 for j in range(70)] for i in range(70)]
    shared = log_linear._level(position.unsqueeze(1), position.unsqueeze(0), 3).tril()
    assert torch.equal(shared, got.clamp_max(2))
    assert not log_linear._level(position.unsqueeze(1), position.unsqueeze(0), 1).any()


@rounds("form", FORMS)
@rounds("gate_input", ["value", "hidden"])
def test_with_lambdas_of_1_it_is_gated_linear(form, gate_input):
    """As both start, so that what is measured of one, untrained, holds of the other."""
    modules = []
    for name in ("gated_linear", "log_linear"):
        case = made(name, initial_memory=5.0, gate_input=gate_input)
        modules.append(case.cls(case.cls.Config(**case.options), case.module().heads, backend=form).double())
    given, mask = inputs(2, 23), made().mask(2, 23, 23)
    cotangent = torch.randn(2, 23, 4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want, got = (outcome(module, given, mask, cotangent) for module in modules)
    both = ["out", *(f"gradient to {name}" for name in ("q", "k", "v", "score_weight", "average_weight"))]
    assert_same({name: got[name] for name in both}, {name: want[name] for name in both}, 1e-6)
    starts = [get_attention(name).Config().initial_memory for name in ("gated_linear", "log_linear")]
    assert starts[0] == starts[1]


@rounds("form", FORMS)
@rounds("level", [0, 1, 3, 5])
def test_one_level_alone_reads_its_tokens_alone(form, level):
    case = made(initial_memory=1e9)
    module = case.cls(case.cls.Config(**case.options), case.module().heads, backend=form).double()
    with torch.no_grad():
        module.level_bias.fill_(-1e3)
        module.level_bias[:, level] = 1.0
    given = inputs(1, 45)
    length = torch.arange(1.0, 46.0, dtype=torch.float64)
    _, weights = given.call(module, case.mask(1, 45, 45), need_weights=True)
    out = given.run(module, case.mask(1, 45, 45)).transpose(1, 2)
    scores = given.q @ given.k.repeat_interleave(2, 1).mT * SCALE / 32 + 0.5
    own = torch.tensor([[j <= i and level_of(i, j) == level for j in range(45)] for i in range(45)])
    want = scores * own * math.log1p(math.e) / length.view(-1, 1)
    torch.testing.assert_close(weights, want, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out, want @ given.v.repeat_interleave(2, 1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", ["torch", "batched"])
def test_states_grow_by_a_level_when_the_length_doubles(backend):
    """And hold as many sums, from any division of a text into calls, with padding on the left."""
    case = made(num_levels=5)
    module = case.module(backend=backend)
    given, padding = inputs(2, 41), left_padding((41, 30), 41)
    want = given.run(module, AttentionMask(2, 41, 41, causal=True, padding_BK=padding))
    for sizes in ([1] * 41, [3, 14, 1, 1, 16, 6]):
        state, outs, start, held = module.new_state(), [], 0, []
        for size in sizes:
            end = start + size
            mask = AttentionMask(2, size, end, causal=True, padding_BK=padding[:, :end])
            outs.append(given.tokens(slice(start, end)).run(module, mask, state=state))
            start = end
            held.append((end, (state.tensors["memory"].shape[2] - 1) // 9))
        torch.testing.assert_close(torch.cat(outs, dim=1), want, rtol=1e-9, atol=1e-9)
        assert held == [(end, (end - 1).bit_length() + 1) for end, _ in held]
        assert state.tensors["seen"].flatten().tolist() == [41, 30]


def test_num_levels_is_checked():
    cls = get_attention("log_linear")
    with pytest.raises(ValueError, match="num_levels=0; allowed: an integer from 1 on"):
        cls.Config(num_levels=0)
    unknown = dataclasses.replace(made().module().heads, hidden_size=None)
    with pytest.raises(ValueError, match="'log_linear' has weights of the size of hidden states, which is not known"):
        cls(cls.Config(gate_input="hidden"), unknown)


@pytest.mark.peers
@pytest.mark.parametrize("length", [1, 2, 33, 64])
def test_it_equals_the_naive_form_of_flash_linear_attention(length):
    naive = flash_linear_attention("log_linear_attn").naive_log_linear_attn
    case = made()
    heads = {"num_heads": 2, "num_key_value_heads": 2, "dtype": torch.float32}
    module, given = case.module(**heads), inputs(2, length, **heads)
    tokens = log_linear.level_tokens(given.q, given.k, given.v, *module.parameters(), scale=SCALE)
    log_gate = tokens.log_gate
    between = torch.exp(log_gate.cumsum(2) - log_gate.cumsum(2).mT).tril()
    q = tokens.q / between.sum(-1, keepdim=True)  # theirs are sums; the queries can bring the number of tokens along
    rows = [x.transpose(1, 2) for x in (q, tokens.k, tokens.v, log_gate[..., 0], tokens.level_weight)]
    torch.testing.assert_close(given.run(module, case.mask(2, length, length)), naive(*rows), rtol=1e-4, atol=1e-5)
