"""Additive attention against Bahdanau's formula, its start at softmax attention, and its tiles."""

import itertools

import pytest
import torch

from attn_plugins.attentions.additive import AdditiveAttention
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops import sizes
from attn_plugins.ops.additive import additive as ops
from attn_plugins.ops.reference import dense_attention


def attention(num_heads=4, num_key_value_heads=2, value_dim=8, *, trained=True, dtype=torch.float64, **options):
    shape = {"num_heads": num_heads, "num_key_value_heads": num_key_value_heads, "head_dim": 8, "value_dim": value_dim}
    torch.manual_seed(0)
    module = AdditiveAttention(AdditiveAttention.Config(**{"hidden_dim": 6, **options}), HeadShape(**shape))
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator))
    return module.to(dtype)


def tensors(batch, queries, keys, num_heads=4, num_key_value_heads=2, value_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_heads, queries, 8), (num_key_value_heads, keys, 8), (num_key_value_heads, keys, value_dim))
    return [
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def test_equals_the_formula_pair_by_pair():
    module, (q, k, v) = attention(), tensors(1, 7, 7)
    got = module.attend(q, k, v, mask=AttentionMask(1, 7, 7, causal=True), scale=0.3, dropout=0.0)
    for head, i in itertools.product(range(4), range(7)):
        scores = []
        for j in range(i + 1):
            x, y = q[0, head, i], k[0, head // 2, j]
            score = (1 - module.gate[head]) * 0.3 * x @ y
            for twin, sign in (("", 1), ("_twin", -1)):
                w_q, w_k = getattr(module, f"query_weight{twin}")[head], getattr(module, f"key_weight{twin}")[head // 2]
                score = score + sign * getattr(module, f"score_weight{twin}")[head] @ torch.tanh(w_q @ x + w_k @ y)
            scores.append(score)
        want = torch.stack(scores).softmax(0) @ v[0, head // 2, : i + 1]
        torch.testing.assert_close(got[0, head, i], want)


@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}])
def test_starts_at_softmax_attention_with_a_gradient_to_every_weight(extras):
    module, (q, k, v) = attention(trained=False), tensors(2, 30, 30)
    mask = AttentionMask(2, 30, 30, causal=True)
    got = module.attend(q, k, v, mask=mask, scale=0.3, dropout=0.0, **extras)
    want, _ = dense_attention(q, k, v, mask.dense(), scale=0.3, **extras)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    got.square().sum().backward()
    for name, weight in module.named_parameters():
        assert weight.grad.abs().amax() > 1e-3, f"{name} has no gradient at the start"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_additive_score_is_exactly_zero_at_the_start(dtype):
    module, (q, k, _) = attention(trained=False, dtype=dtype, hidden_dim=16), tensors(1, 50, 50, dtype=dtype)
    weights = module._weights()
    a, b = ops.project(q * 5, weights["w_q_HED"]), ops.project(k * 5, weights["w_k_GED"])
    assert not ops.additive_scores(a, b, weights["w_HE"].to(a.dtype)).any()


def test_units_differ_from_each_other_at_the_start():
    module = attention(trained=False)
    assert torch.equal(module.query_weight, module.query_weight_twin)
    assert module.query_weight.flatten().unique().numel() == module.query_weight.numel()
    assert not torch.equal(module.query_weight[0, 0], module.key_weight[0, 0])


def test_a_gate_at_one_leaves_the_dot_product_out():
    module, (q, k, v) = attention(initial_gate=1.0, trained=False), tensors(1, 9, 9)
    mask = AttentionMask(1, 9, 9, causal=False)
    with torch.no_grad():
        module.score_weight.add_(1.0)
    runs = [module.attend(q, k, v, mask=mask, scale=scale, dropout=0.0) for scale in (0.3, 100.0)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("tile_size", [1, 8, 64])
def test_tiles_in_all_combinations(tile_size):
    padding = torch.arange(37) >= torch.tensor([[3], [20]])
    segments = torch.bucketize(torch.arange(37), torch.tensor([9, 10, 30]), right=True).expand(2, -1)
    generator = torch.Generator().manual_seed(3)
    for causal, queries, pad, packed in itertools.product((True, False), (37, 20), (None, padding), (None, segments)):
        q, k, v = tensors(2, queries, 37, value_dim=6)
        module = attention(value_dim=6, tile_size=tile_size)
        mask = AttentionMask(2, queries, 37, causal=causal, padding_BK=pad, segments_BK=packed)
        bias = torch.randn(1, 4, queries, 37, generator=generator, dtype=torch.float64).requires_grad_()
        sinks = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
        leaves = [q, k, v, bias, sinks, *module.parameters()]
        options = {"scale": 0.3, "dropout": 0.0, "position_bias": bias, "sinks": sinks, "softcap": 3.0}
        cotangent = torch.randn(2, 4, queries, 6, generator=generator, dtype=torch.float64)
        got = module.attend(q, k, v, mask=mask, **options)
        want, _ = module.reference(q, k, v, mask=mask, **options)
        torch.testing.assert_close(got, want)
        got, want = (torch.autograd.grad(out, leaves, cotangent) for out in (got, want))
        torch.testing.assert_close(got, want)


SCORES = (ops.additive_scores, ops.additive_scores_at_once)


@pytest.mark.parametrize("scores", SCORES)
def test_score_gradients_equal_finite_differences(scores, monkeypatch):
    monkeypatch.setattr(sizes, "SCORES_AT_ONCE_ELSEWHERE", 250)  # two of four units
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 3, 5), (2, 2, 3, 4), (4, 3))
    a, b, w = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    w = torch.cat([w, w[:, :1]], dim=1).detach().requires_grad_()
    a, b = (torch.cat([x, x[:, :, :1]], dim=2).detach().requires_grad_() for x in (a, b))
    assert torch.autograd.gradcheck(scores, (a, b, w))


@pytest.mark.parametrize("scores", SCORES)
def test_scores_keep_the_rules_of_a_torch_operator(scores):
    arguments = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 2, 5), (2, 2, 2, 3), (4, 2))]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(scores, arguments, test_utils=checks)


@pytest.mark.parametrize("scores", SCORES)
def test_scores_of_saturated_projections_are_those_of_tanh(scores):
    # exp(2 a) and exp(-2 b) differ by e^80 here.
    a = torch.tensor([-1e4, -30.0, -15.0, 0.0, 1e-3, 15.0, 30.0, 1e4])
    weight = torch.ones(1, 1, 1)
    projected = ops.project(a.view(1, 1, -1, 1), weight)
    w = torch.tensor([[1.0, 0.0]])
    got = scores(*(projected.expand(1, 1, 2, -1).contiguous().requires_grad_() for _ in "ab"), w)
    exact = projected.flatten().double()
    torch.testing.assert_close(got[0, 0].double(), torch.tanh(exact[:, None] + exact[None, :]), rtol=0, atol=2e-6)
    (gradient,) = torch.autograd.grad(got.sum(), [got.grad_fn.next_functions[0][0].variable])
    assert gradient.isfinite().all()


def test_dropout_of_a_tile_is_the_same_when_backward_computes_it_again():
    # The output is linear in v, so <v, gradient to v> is the output's own sum only if both saw the same drops.
    module, (q, k, v) = attention(tile_size=5), tensors(2, 40, 40)
    mask = AttentionMask(2, 40, 40, causal=True)
    total = module.attend(q, k, v, mask=mask, scale=0.3, dropout=0.5).sum()
    (gradient,) = torch.autograd.grad(total, v)
    torch.testing.assert_close((gradient * v).sum(), total)


def test_scores_hold_nothing_larger_than_themselves():
    # Not (8, 2048, hidden_dim), forward or backward. From inside the operator: a hook on dispatch sees one call.
    shapes = ((1, 1, 16, 8), (1, 1, 16, 2048), (1, 16))
    leaves = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for shape in shapes]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.additive_scores(*leaves).sum().backward()
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) <= 4 * (2 * 8 * 2048 + 16 * 2048)


def test_nothing_but_a_tile_is_kept_for_backward():
    module, leaves = attention(1, 1, dtype=torch.float32, tile_size=8), tensors(1, 512, 512, 1, 1, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        module.attend(*leaves, mask=AttentionMask(1, 512, 512, causal=False), scale=0.3, dropout=0.0)
    assert max(kept) <= 512 * 8


def test_compiles_whole():
    module = attention(dtype=torch.float32, tile_size=16)
    q, k, v = (x.detach() for x in tensors(2, 40, 40, dtype=torch.float32))
    mask = AttentionMask(2, 40, 40, causal=True, padding_BK=torch.arange(40) >= torch.tensor([[0], [7]]))

    def run(q, k, v):
        return module.attend(q, k, v, mask=mask, scale=0.3, dropout=0.0)

    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v), run(q, k, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 5}, "hidden_dim=5; allowed: an even integer from 2 on"),
        ({"hidden_dim": 0}, "hidden_dim=0; allowed: an even integer from 2 on"),
        ({"tile_size": 0}, "tile_size=0; allowed: an integer from 1 on"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdditiveAttention.Config(**options)


def test_needs_the_sizes_of_the_heads():
    with pytest.raises(ValueError, match="'additive' has weights a head and needs the sizes of the heads, got None"):
        AdditiveAttention(AdditiveAttention.Config())
