"""States of constant size, beyond the contract: every feature map, a compiled step, what is held and in which dtype."""

import copy

import pytest
import torch
from cases import EXACT, SCALE, Case, inputs, left_padding

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops.decode import running_sums as sums

LENGTH = 37
LENGTHS = (37, 20, 3)
MAPS = ("elu", "relu", "relu2", "t2r", "hedgehog", "favor", "cosformer", "taylor")
SUMS = ("linear", "retention", "gated_linear", "delta", "gated_delta", "kimi_delta", "linear_window", "fastformer")
OPTIONS = {
    **{f"linear {name}": {"feature_map": name, "chunk_size": 4, "max_length": LENGTH} for name in MAPS},
    **{f"linear_window {name}": {"feature_map": name, "window_size": 5} for name in MAPS if name not in MAPS[5:7]},
    **{f"{name} ": {} for name in SUMS},
}
"""The name of an attention and of its feature map: its options."""

every_map = pytest.mark.parametrize("name", OPTIONS)
every_attention = pytest.mark.parametrize("name", [f"{name} " for name in SUMS])


def make(name, **options):
    return Case(get_attention(name.split()[0]), {**OPTIONS.get(name, {}), **options}, causal=True).module()


def step(module, state, given, padding, start, end, room=0):
    """Outputs of the tokens from ``start`` to ``end``; the mask may tell of ``room`` tokens to come."""
    padding = None if padding is None else torch.nn.functional.pad(padding[:, :end], (0, room))
    mask = AttentionMask(len(given.q), end - start, end, causal=True, padding_BK=padding, device=given.q.device)
    return given.tokens(slice(start, end)).run(module, mask, state=state)


def run(module, state, given, padding, sizes, start=0):
    outs = []
    for size in sizes:
        outs.append(step(module, state, given, padding, start, start + size))
        start += size
    return torch.cat(outs, dim=1)


def whole(module, given, padding):
    mask = AttentionMask(*given.q.shape[:3:2], given.q.shape[2], causal=True, padding_BK=padding)
    return given.run(module, mask)


@every_map
@torch.no_grad()
def test_every_feature_map_goes_on_from_any_split(name):
    module, given, padding = make(name), inputs(3, LENGTH), left_padding(LENGTHS, LENGTH)
    want = whole(module, given, padding)
    draw = torch.Generator("cpu").manual_seed(7)
    for module.backend in ("torch", "batched", "torch"):
        cuts = sorted({*torch.randint(1, LENGTH, (8,), generator=draw, device="cpu").tolist(), 30, 31})
        sizes = [high - low for low, high in zip([0, *cuts], [*cuts, LENGTH], strict=True)]
        got = run(module, module.new_state(), given, padding, sizes)
        torch.testing.assert_close(got[padding], want[padding], atol=EXACT, rtol=EXACT)


@every_map
@torch.no_grad()
def test_long_pieces_are_taken_in_a_few_tokens_at_a_time(name, monkeypatch):
    module, given, padding = make(name), inputs(3, LENGTH), left_padding(LENGTHS, LENGTH)
    want = whole(module, given, padding)
    monkeypatch.setattr(sums, "PREFILL_CHUNK", 6)
    state = module.new_state()
    state.recording = True
    run(module, state, given, padding, [3, 17])
    state.crop(7)  # ten of the seventeen come again, without queries
    got = step(module, state, given, padding, 13, LENGTH)
    torch.testing.assert_close(got[padding[:, 13:]], want[:, 13:][padding[:, 13:]], atol=EXACT, rtol=EXACT)


@every_map
@torch.no_grad()
def test_the_first_token_makes_all_that_will_ever_be_held(name):
    module, given = make(name), inputs(2, LENGTH)
    state = module.new_state()
    step(module, state, given, None, 0, 1)
    first = state.num_bytes
    run(module, state, given, None, [1, 30, 1], start=1)
    prefilled = module.new_state()
    step(module, prefilled, given, None, 0, LENGTH)
    assert state.num_bytes == prefilled.num_bytes == first > 0
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.tensors.values())


@pytest.mark.parametrize("branch", ["window", "linear"])
@torch.no_grad()
def test_a_branch_alone_and_a_change_of_branch(branch):
    module, given, padding = make("linear_window elu"), inputs(3, LENGTH), left_padding(LENGTHS, LENGTH)
    state = module.new_state()
    run(module, state, given, padding, [20])
    module.branch = branch
    want = whole(module, given, padding)[:, 20:]
    got = run(module, state, given, padding, [1, 1, 15], start=20)
    torch.testing.assert_close(got[padding[:, 20:]], want[padding[:, 20:]], atol=EXACT, rtol=EXACT)


@torch.no_grad()
def test_single_tokens_whose_exponents_rise_by_hundreds_are_as_logarithms_say():
    module, given = make("linear favor"), inputs(2, LENGTH, seed=3)
    radius = torch.linspace(85, 75, LENGTH, dtype=torch.float64)[:, None]
    given.k *= radius / given.k.norm(dim=3, keepdim=True)
    w, k, v = module.projection * SCALE**0.5, *(x.repeat_interleave(2, dim=1) for x in (given.k, given.v))
    exponents = k @ w.mT - k.square().sum(dim=3, keepdim=True) * SCALE / 2
    assert exponents.max() < -700  # e to it is 0 in float64
    scores = ((given.q @ w.mT).unsqueeze(3) + exponents.unsqueeze(2)).logsumexp(dim=4)
    scores.masked_fill_(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -torch.inf)
    want = (scores.softmax(dim=3) @ v).transpose(1, 2)
    for state in (module.new_state(), module.new_state(LENGTH)):
        for _ in range(2):  # also from a state that is reset
            torch.testing.assert_close(run(module, state, given, None, [1] * LENGTH), want, atol=EXACT, rtol=EXACT)
            state.reset()


@torch.no_grad()
def test_cosformer_refuses_what_is_longer_than_max_length_before_anything_changes():
    module = make("linear cosformer", max_length=20)
    given, padding = inputs(2, 26), left_padding((20, 11), 26)
    want = whole(module, given, padding)  # padding does not count
    for state in (module.new_state(), module.new_state(30)):
        state.recording = True
        run(module, state, given, padding, [10, 13])
        state.crop(3)
        run(module, state, given, padding, [1, 1, 1], start=20)
        state.crop(1)
        got = step(module, state, given, padding, 22, 26)
        torch.testing.assert_close(got, want[:, 22:], atol=EXACT, rtol=EXACT)
        state.crop(1)
        before, more = copy.deepcopy(state), inputs(2, 27)
        with pytest.raises(ValueError, match="got a sequence of 21 tokens; allowed: at most max_length=20"):
            step(module, state, more, left_padding((21, 12), 27), 25, 27)
        assert state.seen == before.seen == 25
        assert all(torch.equal(state.tensors[name], before.tensors[name]) for name in before.tensors)
        assert torch.equal(state.pending[0], before.pending[0])


@every_attention
@torch.no_grad()
def test_sums_are_float32_under_a_model_in_bfloat16(name):
    module, given, padding = make(name), inputs(3, LENGTH), left_padding(LENGTHS, LENGTH)
    want = whole(module, given, padding)[padding]
    module, given = module.to(torch.bfloat16), given.to(torch.bfloat16)
    state = module.new_state()
    got = run(module, state, given, padding, [9, 1, 1, 9, 1, 16])
    assert got.dtype == torch.bfloat16
    assert {t.dtype for key, t in state.tensors.items() if key not in ("k", "v")} == {torch.float32}
    exact = whole(module, given, padding)[padding]
    assert (got[padding].double() - want).norm() < 1.1 * (exact.double() - want).norm()


@every_attention
@torch.no_grad()
def test_the_number_of_heads_and_rows_has_to_stay(name):
    module, state = make(name), make(name).new_state()
    step(module, state, inputs(2, 5), None, 0, 5)
    for batch, heads, got in ((1, 2, r"\(1, 2, 8\) and"), (2, 4, r"\(2, 4, 8\) and")):
        wrong = inputs(batch, 6, num_key_value_heads=heads).tokens(slice(5, 6))
        with pytest.raises(ValueError, match=rf"\(2, 2, 8\) and \(2, 2, 8\), got {got}.*another model or batch"):
            state.check(wrong.q, wrong.k, wrong.v, AttentionMask(batch, 1, 6, causal=True))


@pytest.mark.parametrize(
    "name", ["linear favor", "linear cosformer", "retention ", "gated_delta ", "linear_window elu", "fastformer "]
)
@torch.no_grad()
def test_a_step_of_a_static_cache_compiles_to_a_graph_that_serves_the_next_ones_too(name):
    torch._dynamo.reset()
    module, given, padding = make(name), inputs(3, LENGTH), left_padding(LENGTHS, LENGTH)
    want, state, graphs = whole(module, given, padding), module.new_state(LENGTH), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    step(module, state, given, padding, 0, 30)
    places = {key: tensor.data_ptr() for key, tensor in state.tensors.items()}
    for at in range(30, LENGTH):
        got = compiled(module, state, given, padding, at, at + 1, LENGTH - at - 1)
        real = padding[:, at]
        torch.testing.assert_close(got[real], want[real, at : at + 1], atol=EXACT, rtol=EXACT)
        assert places == {key: tensor.data_ptr() for key, tensor in state.tensors.items()}
    assert len(graphs) <= 3
