"""The dense oracle against torch and against what is written out by hand; the softmax attention against the oracle."""

import pytest
import torch
from cases import SCALE, Case, assert_same, inputs, left_padding
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.attentions.softmax import SoftmaxAttention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import accumulation_dtype, dense_attention, expand_heads, outside_autocast, scores


def test_sums_are_taken_in_float32_at_least():
    half, single, double = (torch.empty(0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert accumulation_dtype(half, half) == accumulation_dtype(half, single) == torch.float32
    assert accumulation_dtype(half, double) == torch.float64


def test_oracle_equals_torch():
    given = inputs(2, 9, 13)
    k, v = (expand_heads(x, 4) for x in (given.k, given.v))
    for visible in (torch.ones(1, 1, 9, 13, dtype=torch.bool), torch.rand(2, 4, 9, 13) > 0.3):
        bias = torch.randn(1, 4, 9, 13, dtype=torch.float64)
        out, weights = dense_attention(given.q, given.k, given.v, visible, scale=SCALE, position_bias=bias)
        want = scaled_dot_product_attention(
            given.q, k, v, attn_mask=bias.masked_fill(~visible, -torch.inf), scale=SCALE
        )
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 9, dtype=torch.float64))


def test_oracle_caps_scores_before_the_bias():
    given = inputs(1, 3)
    bias = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    got = scores(given.q, given.k, scale=SCALE, position_bias=bias, softcap=0.7)
    for h in range(4):
        for i in range(3):
            for j in range(3):
                dot = given.q[0, h, i] @ given.k[0, h // 2, j] * SCALE
                want = 0.7 * torch.tanh(dot / 0.7) + bias[0, h, i, j]
                torch.testing.assert_close(got[0, h, i, j], want)


def test_oracle_gives_learned_sinks_a_share_and_no_value():
    given, sinks = inputs(1, 5), torch.randn(4, dtype=torch.float64)
    visible = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    out, weights = dense_attention(given.q, given.k, given.v, visible, scale=SCALE, sinks=sinks)
    logits = torch.cat([scores(given.q, given.k, scale=SCALE), sinks.view(1, 4, 1, 1).expand(1, 4, 5, 1)], dim=-1)
    want = torch.softmax(logits, dim=-1)[..., :-1]
    torch.testing.assert_close(weights, want)
    torch.testing.assert_close(out, want @ expand_heads(given.v, 4))


@pytest.mark.parametrize("sinks", [None, torch.zeros(4, dtype=torch.float64)])
def test_oracle_gives_zeros_where_nothing_is_visible(sinks):
    given = inputs(2, 6)
    leaves = [x.requires_grad_() for x in (given.q, given.k, given.v)]
    visible = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    visible[0, :, 2] = False
    out, weights = dense_attention(*leaves, visible, scale=SCALE, sinks=sinks)
    assert not out[0, :, 2].any()
    assert not weights[0, :, 2].any()
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert gradient.isfinite().all()


def test_oracle_sums_in_float32_and_answers_in_the_dtype_of_the_values():
    given = inputs(1, 40).to(torch.bfloat16)
    visible = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    out, weights = dense_attention(given.q, given.k, given.v, visible, scale=SCALE)
    assert out.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    exact, _ = dense_attention(*(x.double() for x in (given.q, given.k, given.v)), visible, scale=SCALE)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)


def test_products_of_a_backward_are_not_lowered_by_autocast():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x @ x).float()

        @staticmethod
        @outside_autocast
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            product = grad @ x.T
            assert product.dtype == torch.float32
            return (product + x.T @ grad).float()

    x = torch.randn(3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Product.apply(x).sum().backward()


MASKS = {
    "causal": {"causal": True},
    "bidirectional": {"causal": False},
    "padded": {"causal": True, "padding_BK": left_padding([14, 9], 14)},
    "a rule": {"causal": False, "plain": False, "rule": lambda b, h, q, k: (q + k + b) % 4 > 0},
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("queries", [1, 5, 14])
@pytest.mark.parametrize("biased", [False, True])
def test_softmax_attention_takes_every_path_of_torch_and_equals_the_oracle(kind, queries, biased):
    given = inputs(2, queries, 14)
    if biased:
        given.extras = {"position_bias": torch.randn(1, 4, queries, 14, dtype=torch.float64)}
    mask = AttentionMask(2, queries, 14, **MASKS[kind])
    case = Case(SoftmaxAttention, {}, True)
    got, want = (given.run(case.module(backend=form), mask) for form in ("torch", "reference"))
    assert_same({"out": got}, {"out": want}, 1e-12)


def test_softmax_attention_needs_no_dense_mask_where_nothing_is_padded(monkeypatch):
    monkeypatch.setattr(AttentionMask, "dense", lambda mask: pytest.fail("the N x N mask is built"))
    case = Case(SoftmaxAttention, {}, True)
    inputs(2, 9).run(case.module(), case.mask(2, 9, 9))
    inputs(2, 1, 9).run(case.module(), case.mask(2, 1, 9))
