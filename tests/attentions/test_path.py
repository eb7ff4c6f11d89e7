"""PaTH attention: products of matrices, its start, padding, what it refuses, and the published naive form."""

import pytest
import torch
from cases import EXACT, SCALE, Case, assert_same, cotangent_for, inputs, left_padding, outcome
from naive_forms import flash_linear_attention

from attn_plugins.attentions.path import PathAttention
from attn_plugins.attentions.softmax import SoftmaxAttention
from attn_plugins.core.mask import AttentionMask

PAPER = {"form": "paper", "gate_input": "hidden", "initial_beta": 1.2, "chunk_size": 4}
OPTIONS = [{"chunk_size": 4}, PAPER, {**PAPER, "forget_gate": True, "gate_input": "value"}]


def expected(module, given, length):
    """Weights of head 1 of the first row by the definition, a product of matrices for each pair."""
    x = given.hidden[0, 0] if module.wants_hidden else given.v[0, 0]
    paper = module.config.form == "paper"
    w = torch.nn.functional.normalize(x @ module.direction_weight[0].T, dim=1)
    z = x @ module.beta_weight[0] + module.beta_bias[0]
    beta = 2 * (torch.sigmoid(z) if paper else z.clamp(0, 1))
    step = torch.eye(8, dtype=torch.float64) - beta[:, None, None] * w[:, :, None] * w[:, None, :]
    fade = torch.zeros(length, dtype=torch.float64)
    if module.config.forget_gate:
        fade = torch.nn.functional.logsigmoid(x @ module.gate_weight[1] + module.gate_bias[1])
    weights = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        scores = []
        for j in range(i + 1):
            key = given.k[0, 0, j]
            for t in range(j + 1, i + 1):
                key = step[t] @ key
            scores.append(SCALE * given.q[0, 1, i] @ key + fade[j + 1 : i + 1].sum())
        weights[i, : i + 1] = torch.stack(scores).softmax(dim=0)
    return weights, beta


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_a_key_is_changed_by_the_tokens_from_after_it_to_the_query(options):
    module, given = Case(PathAttention, options, True).module(), inputs(1, 11)
    mask = AttentionMask(1, 11, 11, causal=True)
    out, weights = given.call(module, mask, need_weights=True)
    want, beta = expected(module, given, 11)
    assert beta.max() > 0.3
    torch.testing.assert_close(weights[0, 1], want, atol=1e-5, rtol=1e-4)  # directions are of length 1 to 6 digits
    torch.testing.assert_close(given.run(module, mask), out)


@pytest.mark.parametrize("options", [{}, {"gate_input": "hidden", "forget_gate": True}], ids=str)
def test_it_starts_at_the_model_and_learns_from_the_first_step(options):
    case = Case(PathAttention, {**options, "chunk_size": 8}, True)
    module, given, mask = case.module(), inputs(2, 40), AttentionMask(2, 40, 40, causal=True)
    module.reset_parameters()
    want = given.run(Case(SoftmaxAttention, {}, True).module(), mask)
    for backend in ("torch", "batched", "reference"):
        module.backend = backend
        torch.testing.assert_close(given.run(module, mask), want, rtol=0, atol=1e-13)
    loss = (given.run(module, mask) * cotangent_for(given, mask)).sum()
    learns = [weight for name, weight in module.named_parameters() if name != "direction_weight"]
    for gradient in torch.autograd.grad(loss, learns):
        assert gradient.abs().min() > 0


@pytest.mark.parametrize("length", [5, 8, 9, 16, 23, 24, 31, 32, 33])
@pytest.mark.parametrize("backend", ["torch", "batched"])
def test_blocks_of_any_number_are_joined(length, backend):
    """One chunk and several, an even number of blocks and an odd one at each size, the last of them whole and not."""
    case = Case(PathAttention, {**PAPER, "forget_gate": True}, True)
    given, mask = inputs(2, length), AttentionMask(2, length, length, causal=True)
    cotangent, module = cotangent_for(given, mask), case.module()
    module.backend = "reference"
    want = outcome(module, given, mask, cotangent)
    module.backend = backend
    assert_same(outcome(module, given, mask, cotangent), want, EXACT)


@torch.no_grad()
def test_tiles_of_some_queries_are_enough(monkeypatch):
    case = Case(PathAttention, {**PAPER, "forget_gate": True}, True)
    given, mask = inputs(2, 45), AttentionMask(2, 45, 45, causal=True, padding_BK=left_padding([45, 27], 45))
    want = given.call(case.module(), mask, need_weights=True)[0]
    monkeypatch.setattr("attn_plugins.ops.softmax.path.LARGEST_TILE", 3)
    got = given.run(case.module(), mask)
    torch.testing.assert_close(got[mask.padding_BK], want[mask.padding_BK], rtol=0, atol=EXACT)


@torch.no_grad()
def test_a_cache_holds_keys_in_float32():
    """Each token changes them again: rounded to bfloat16 as often, they would be lost."""
    module = Case(PathAttention, {}, True).module(dtype=torch.bfloat16)
    state, given = module.new_state(), inputs(1, 5).to(torch.bfloat16)
    given.run(module, AttentionMask(1, 5, 5, causal=True), state=state)
    assert state.tensors["k"].dtype == torch.float32
    assert state.tensors["v"].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["torch", "batched", "reference"])
def test_keys_after_a_query_are_refused(backend):
    module = Case(PathAttention, {}, True).module(backend=backend)
    mask = AttentionMask(1, 6, 6, causal=False, plain=False, rule=lambda b, h, q, k: (k <= q) | (k < 3))
    with pytest.raises(ValueError, match="a path leads from a key to a later query; it needs a causal mask, got Atten"):
        inputs(1, 6).run(module, mask)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("initial_beta", 2.0, "a number between 0 and 2"), ("chunk_size", 0, "an integer from 1 on")],
)
def test_options_are_checked(option, value, allowed):
    with pytest.raises(ValueError, match=f"^{option}={value}; allowed: {allowed}$"):
        PathAttention.Config(**{option: value})


@pytest.mark.peers
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("backend", ["torch", "batched", "reference"])
@torch.no_grad()
def test_it_equals_that_of_flash_linear_attention(heads, backend):
    shape = {"num_heads": heads[0], "num_key_value_heads": heads[1]}
    given = inputs(2, 75, **shape).to(torch.float32)
    for forget_gate in (False, True):
        case = Case(PathAttention, {**PAPER, "chunk_size": 16, "forget_gate": forget_gate}, True)
        module = case.module(dtype=torch.float32, backend=backend, **shape)
        steps = module._steps(given.v, given.hidden[:, 0], None)
        log_gate = torch.zeros(2, heads[0], 75) if steps.log_gate_BHK is None else steps.log_gate_BHK
        q = SCALE * given.q  # theirs scales gates as well as scores
        tensors = (q, given.k, given.v, steps.w_BGKD, steps.beta_BGK, log_gate)
        theirs = flash_linear_attention("path_attn").naive_path_attn
        want = theirs(*(x.transpose(1, 2) for x in tensors), scale=1.0, chunk_size=16)
        mask = AttentionMask(2, 75, 75, causal=True)
        torch.testing.assert_close(given.run(module, mask), want, rtol=1e-5, atol=1e-5)
