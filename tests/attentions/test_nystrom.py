"""Nystrom attention: the published module, the true inverse, and which tokens a landmark is the mean of."""

import pytest
import torch
from cases import SCALE, Case, assert_forms_agree, assert_same, inputs, left_padding, outcome
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from attn_plugins.attentions.nystrom import NystromAttention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.low_rank.nystrom import iterative_inverse, landmarks_of, run_means
from attn_plugins.ops.reference import expand_heads


def nystrom(**options):
    return Case(NystromAttention, options, False)


@pytest.mark.parametrize(("heads", "norms"), [(1, "original"), (4, "exact")])
@pytest.mark.parametrize("conv_kernel_size", [None, 5])
def test_equals_the_published_module(heads, norms, conv_kernel_size):
    """In one row, with lengths that divide; by default theirs starts from the largest norm of all rows and heads."""
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_landmarks": 6, "segment_means_seq_len": 30}
    theirs = NystromformerSelfAttention(NystromformerConfig(**sizes, conv_kernel_size=5)).double()
    theirs.init_option, theirs.conv_kernel_size = norms, conv_kernel_size
    hidden = 3 * torch.randn(1, 30, 8 * heads, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(hidden)[0]
        given = inputs(1, 30, num_heads=heads, num_key_value_heads=heads)
        for name in ("query", "key", "value"):
            setattr(given, name[0], getattr(theirs, name)(hidden).view(1, 30, heads, 8).transpose(1, 2))
        module = nystrom(num_landmarks=6, conv_kernel_size=conv_kernel_size).module(heads, heads)
        if conv_kernel_size is not None:
            module.conv_weight.copy_(theirs.conv.weight.view(heads, -1))
        for form in ("torch", "reference"):
            module.backend = form
            got = module(given.q, given.k, given.v, mask=AttentionMask(1, 30, 30, causal=False), scale=8**-0.5)[0]
            assert_same({"out": got.flatten(2)}, {"out": want}, 1e-6)  # theirs makes the identity in float32


def test_equals_the_product_with_the_true_inverse_token_by_token():
    given = inputs(2, 13)
    padding = left_padding([13, 8], 13)
    padding[1, -1] = False
    module = nystrom(num_landmarks=3, num_iterations=30).module()
    got = given.run(module, AttentionMask(2, 13, 13, causal=False, padding_BK=padding))
    runs = [[range(5), range(5, 9), range(9, 13)], [range(5, 8), range(8, 10), range(10, 12)]]
    for b in range(2):
        real = [j for j in range(13) if padding[b, j]]
        for h in range(4):
            q, k, v = given.q[b, h], given.k[b, h // 2], given.v[b, h // 2]
            q_mean, k_mean = (torch.stack([x[list(run)].mean(dim=0) for run in runs[b]]) for x in (q, k))
            core = torch.softmax(q_mean @ k_mean.T * SCALE, dim=-1)
            values = torch.softmax(q_mean @ k[real].T * SCALE, dim=-1) @ v[real]
            for i in real:
                want = torch.softmax(k_mean @ q[i] * SCALE, dim=0) @ torch.linalg.pinv(core) @ values
                torch.testing.assert_close(got[b, i, h], want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_landmarks", [1, 3, 5, 8])
def test_landmarks_are_runs_of_real_tokens(num_landmarks):
    padding = left_padding([12, 7, 3, 0], 12)
    padding[1, -2:] = False
    mask = AttentionMask(4, 12, 12, causal=False, padding_BK=padding)
    x = inputs(4, 12).q
    x.masked_fill_(~padding[:, None, :, None], torch.inf)
    landmarks = landmarks_of(mask, num_landmarks)
    means = run_means(x, landmarks)
    for b in range(4):
        real = padding[b].nonzero().squeeze(1).tolist()
        counts = landmarks.count_BM[b].tolist()
        held = [count for count in counts if count]
        assert sum(counts) == len(real)
        assert len(held) == min(num_landmarks, len(real))
        assert not held or max(held) - min(held) <= 1
        for count, mean in zip(counts, means[b].unbind(dim=1), strict=True):
            run, real = real[:count], real[count:]
            assert_same({"mean": mean}, {"mean": x[b][:, run].mean(dim=1) if run else torch.zeros(4, 8)}, 1e-12)


def test_the_inverse_converges_and_leaves_zeros_alone():
    a = torch.softmax(torch.randn(3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    a[1, 6:], a[1, :, 6:] = 0, 0
    a[2] = 0
    got = iterative_inverse(a, 30)
    torch.testing.assert_close(got[:2], torch.linalg.pinv(a[:2]), rtol=0, atol=1e-8)
    assert not got[1, 6:].any()
    assert not got[1, :, 6:].any()
    assert not got[2].any()
    assert (iterative_inverse(a, 3) - got).abs().max() > 0.1, "so few steps are not enough"


def test_rows_shorter_than_the_landmarks_have_each_token_as_one():
    given, padding = inputs(2, 20), left_padding([20, 6], 20)
    mask = AttentionMask(2, 20, 20, causal=False, padding_BK=padding)
    got = given.run(nystrom(num_landmarks=12, num_iterations=30).module(), mask)[1, -6:]
    weights = torch.softmax(given.q[1, :, -6:] @ expand_heads(given.k, 4)[1, :, -6:].mT * SCALE, dim=-1)
    want = weights @ expand_heads(given.v, 4)[1, :, -6:]
    assert_same({"out": got}, {"out": want.transpose(0, 1)}, 1e-9)


def test_starts_from_the_method_without_a_convolution():
    given, mask = inputs(2, 20), AttentionMask(2, 20, 20, causal=False)
    module = nystrom(num_landmarks=5, conv_kernel_size=3).module()
    trained = given.run(module, mask)
    module.reset_parameters()
    plain = given.run(nystrom(num_landmarks=5).module(), mask)
    assert torch.equal(given.run(module, mask), plain)
    assert not torch.allclose(trained, plain)


def test_the_convolution_serves_grouped_heads_of_any_size_and_skips_padding():
    given, padding = inputs(2, 15, value_dim=6), left_padding([15, 9], 15)
    case, mask = (
        nystrom(num_landmarks=4, conv_kernel_size=5),
        AttentionMask(2, 15, 15, causal=False, padding_BK=padding),
    )
    assert_forms_agree(case, given, mask, value_dim=6)
    module = case.module(value_dim=6)
    added = given.run(module, mask) - given.run(nystrom(num_landmarks=4).module(value_dim=6), mask)
    for i in range(6, 15):
        for h in range(4):
            near = [(tap, i + tap - 2) for tap in range(5) if 6 <= i + tap - 2 < 15]
            want = sum(module.conv_weight[h, tap] * given.v[1, h // 2, j] for tap, j in near)
            torch.testing.assert_close(added[1, i, h], want)


def test_queries_that_are_not_the_keys_are_refused():
    with pytest.raises(ValueError, match="got 3 queries and 9 keys; allowed: as many queries as keys"):
        inputs(1, 3, 9).run(nystrom().module(), AttentionMask(1, 3, 9, causal=False))


def test_options_out_of_range_are_refused():
    for option in ("num_landmarks", "num_iterations"):
        with pytest.raises(ValueError, match=f"{option}=0; allowed: an integer from 1 on"):
            NystromAttention.Config(**{option: 0})
    for size in (0, 4, -1):
        with pytest.raises(ValueError, match=f"conv_kernel_size={size}; allowed: None or an odd integer"):
            NystromAttention.Config(conv_kernel_size=size)
    with pytest.raises(ValueError, match="conv_kernel_size has weights a head and needs the sizes of the heads"):
        NystromAttention(NystromAttention.Config(conv_kernel_size=3))


@pytest.mark.parametrize("form", ["torch", "reference"])
def test_many_steps_lose_no_precision(form):
    """Each step can triple what rounding leaves: in float32 nothing was right after 30 of them."""
    given = inputs(1, 64, num_heads=2, num_key_value_heads=1)
    given.q = 6 * given.q
    case = Case(NystromAttention, {"num_landmarks": 64, "num_iterations": 40}, False)
    sizes = {"num_heads": 2, "num_key_value_heads": 1}
    want = given.run(case.module(**sizes), case.mask(1, 64, 64))
    got = given.to(torch.float32).run(case.module(**sizes, dtype=torch.float32, backend=form), case.mask(1, 64, 64))
    assert_same({"out": got}, {"out": want}, 1e-4)


def test_more_steps_than_float64_can_take_are_refused():
    with pytest.raises(ValueError, match="num_iterations=41; allowed: an integer from 1 to 40"):
        NystromAttention.Config(num_iterations=41)


def test_is_part_of_a_graph():
    """torch.compile takes all of it, forward and backward, the inverse that is computed twice too."""
    case, given = nystrom(num_landmarks=4, num_iterations=3), inputs(2, 20)
    mask, cotangent = case.mask(2, 20, 20, padding_BK=left_padding([20, 11], 20)), torch.randn(2, 20, 4, 8)
    module = case.module()
    want = outcome(module, given, mask, cotangent)
    module.compile(backend="aot_eager", fullgraph=True)
    assert_same(outcome(module, given, mask, cotangent), want, 1e-9)
