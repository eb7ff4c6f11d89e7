"""Forgetting attention: its start, its gates against a loop, padding, what it refuses, the published naive form."""

import pytest
import tiny
import torch
from cases import EXACT, SCALE, Case, inputs, left_padding
from naive_forms import flash_linear_attention

import attn_plugins as ap
from attn_plugins.attentions.forgetting import ForgettingAttention
from attn_plugins.attentions.softmax import SoftmaxAttention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax import sigmoid

FORMS = [
    {"form": form, "gate_input": gate_input} for form in ("pretrained", "paper") for gate_input in ("value", "hidden")
]


def gates(module, given):
    """log f of each query head and token, (H, K), token by token."""
    wanted = []
    for head in range(4):
        x = given.hidden[0, 0] if module.wants_hidden else given.v[0, head // 2]
        z = x @ module.gate_weight[head] + module.gate_bias[head]
        wanted.append(-torch.relu(z) if module.config.form == "pretrained" else torch.log(torch.sigmoid(z)))
    return torch.stack(wanted)


@pytest.mark.parametrize("options", FORMS, ids=str)
@torch.no_grad()
def test_a_score_loses_the_gates_of_the_tokens_from_after_the_key_to_the_query(options):
    module, given = Case(ForgettingAttention, options, True).module(), inputs(1, 9)
    mask = AttentionMask(1, 9, 9, causal=True)
    out, weights = given.call(module, mask, need_weights=True)
    log_gate = gates(module, given)
    assert (log_gate <= 0).all()
    assert (log_gate < -0.1).any()
    for head in range(4):
        for i in range(9):
            scores = torch.stack(
                [
                    SCALE * given.q[0, head, i] @ given.k[0, head // 2, j] + log_gate[head, j + 1 : i + 1].sum()
                    for j in range(i + 1)
                ]
            )
            torch.testing.assert_close(weights[0, head, i, : i + 1], scores.softmax(dim=0))
    torch.testing.assert_close(given.run(module, mask), out)


@pytest.mark.parametrize("gate_input", ["value", "hidden"])
def test_it_starts_at_the_model_and_learns_from_the_first_step(gate_input):
    case = Case(ForgettingAttention, {"gate_input": gate_input}, True)
    module, given, mask = case.module(), inputs(2, 40), AttentionMask(2, 40, 40, causal=True)
    module.reset_parameters()
    want = given.run(Case(SoftmaxAttention, {}, True).module(), mask)
    got, alike = given.run(module, mask), given.call(module, mask, need_weights=True)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(alike, want, rtol=0, atol=1e-13)
    loss = (got * torch.randn(got.shape, generator=torch.Generator().manual_seed(0), dtype=got.dtype)).sum()
    for gradient in torch.autograd.grad(loss, [module.gate_weight, module.gate_bias]):
        assert gradient.abs().min() > 0


def test_the_papers_gates_fade_over_the_memory_that_is_asked_for():
    module = Case(ForgettingAttention, {"form": "paper", "initial_memory": 20.0}, True).module()
    module.reset_parameters()
    torch.testing.assert_close(torch.sigmoid(module.gate_bias).log(), torch.full((4,), -1 / 20).double())


@torch.no_grad()
def test_long_texts_lose_no_digits_to_what_the_gates_add_up_to():
    """In float32 a sum of 13000 has 3 digits behind the point at most, differences of near ones keep all."""
    # Gates of -10/3: multiples of a whole number would be exact in float32 too.
    case = Case(ForgettingAttention, {"form": "paper", "initial_memory": 0.3}, True)
    given = inputs(1, 4000, num_heads=1, num_key_value_heads=1)
    shape = {"num_heads": 1, "num_key_value_heads": 1}
    last = given.tokens(slice(3900, 4000))
    mask, short = AttentionMask(1, 4000, 4000, causal=True), AttentionMask(1, 100, 100, causal=True)
    for backend in ("torch", "batched"):
        module = case.module(dtype=torch.float32, backend=backend, **shape)
        module.reset_parameters()
        got = given.to(torch.float32).run(module, mask)[:, -20:]
        want = last.run(module.double(), short)[:, -20:]  # what is before has faded away
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


@torch.no_grad()
def test_tiles_of_several_keys_and_queries_are_merged(monkeypatch):
    monkeypatch.setattr(sigmoid, "TILE", (7, 5))
    case = Case(ForgettingAttention, {"form": "paper"}, True)
    given, mask = inputs(2, 33), AttentionMask(2, 33, 33, causal=True, padding_BK=left_padding([33, 20], 33))
    given.extras = {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), "softcap": 2.0}
    want = given.call(case.module(), mask, need_weights=True)[0]
    real = mask.padding_BK
    torch.testing.assert_close(given.run(case.module(), mask)[real], want[real], rtol=0, atol=EXACT)


@pytest.mark.parametrize("backend", ["torch", "batched", "reference"])
def test_keys_after_a_query_are_refused(backend):
    module = Case(ForgettingAttention, {}, True).module(backend=backend)
    mask = AttentionMask(1, 6, 6, causal=False, plain=False, rule=lambda b, h, q, k: (k <= q) | (k < 3))
    with pytest.raises(ValueError, match="a forget gate is of the tokens between a key and a later query; it needs"):
        inputs(1, 6).run(module, mask)


def test_a_memory_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"^initial_memory=0.0; allowed: a number above 0$"):
        ForgettingAttention.Config(initial_memory=0.0)


@pytest.mark.parametrize(
    ("model_name", "some"), [("mistral", {}), ("gemma3", {}), ("mistral", {"heads": "0-1"})], ids=str
)
@torch.no_grad()
def test_gates_of_hidden_states_generate_beside_a_sliding_window(model_name, some):
    """An ordinary layer of the cache would hold the window's keys alone, without their hidden states."""
    model, given = tiny.build(model_name), tiny.inputs(model_name)
    rule = {"type": "forgetting", "gate_input": "hidden", "form": "paper", "initial_memory": 4.0, **some}
    ap.swap_attention(model, rule)
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**given, **how), model.generate(**given, **how, use_cache=False))
    with pytest.raises(ValueError, match="a cache of keys and values does not have them; use a new cache, of the def"):
        model.generate(**given, **how, cache_implementation="static")


@pytest.mark.peers
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("backend", ["torch", "batched", "reference"])
@torch.no_grad()
def test_it_equals_that_of_flash_linear_attention(heads, backend):
    shape = {"num_heads": heads[0], "num_key_value_heads": heads[1]}
    given = inputs(2, 75, **shape).to(torch.float32)
    case = Case(ForgettingAttention, {"form": "paper", "gate_input": "hidden"}, True)
    module = case.module(dtype=torch.float32, backend=backend, **shape)
    log_gate = torch.nn.functional.logsigmoid(given.hidden[:, 0] @ module.gate_weight.T + module.gate_bias)
    naive = flash_linear_attention("forgetting_attn").naive_forgetting_attn
    want = naive(*(x.transpose(1, 2) for x in (given.q, given.k, given.v)), log_gate, scale=SCALE)
    torch.testing.assert_close(given.run(module, AttentionMask(2, 75, 75, causal=True)), want, rtol=1e-5, atol=1e-5)
