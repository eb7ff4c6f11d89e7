"""Fastformer against its paper's equations, and its pools over prefixes and segments."""

import itertools

import pytest
import torch

from attn_plugins.attentions.fastformer import FastformerAttention
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.additive.fastformer import pool, pool_prefixes
from attn_plugins.ops.reference import MASKED_SCORE


def attention(num_heads=4, num_key_value_heads=2, value_dim=8, *, trained=True, dtype=torch.float64, **options):
    shape = {"num_heads": num_heads, "num_key_value_heads": num_key_value_heads, "head_dim": 8, "value_dim": value_dim}
    module = FastformerAttention(FastformerAttention.Config(**options), HeadShape(**shape))
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator))
    return module.to(dtype)


def tensors(batch, queries, keys, num_heads=4, num_key_value_heads=2, value_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_heads, queries, 8), (num_key_value_heads, keys, 8), (num_key_value_heads, keys, value_dim))
    return [
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def additive_average(x, w, scale):
    return (scale * (x @ w)).softmax(0) @ x


def test_bidirectional_equals_the_equations_of_the_paper():
    module, (q, k, v) = attention(), tensors(1, 11, 11)
    with torch.no_grad():
        module.residual.fill_(1.0)
    got = module.attend(q, k, v, mask=AttentionMask(1, 11, 11, causal=False), scale=0.3, dropout=0.0)
    for head in range(4):
        query, key, value = q[0, head], k[0, head // 2], v[0, head // 2]
        global_query = additive_average(query, module.query_weight[head], 0.3)
        global_key = additive_average(global_query * key, module.key_weight[head], 0.3)
        want = (global_key * value) @ module.transform_weight[head].T + query
        torch.testing.assert_close(got[0, head], want)


def test_causal_equals_the_equations_prefix_by_prefix():
    module, (q, k, v) = attention(chunk_size=4), tensors(1, 23, 23)
    got = module.attend(q, k, v, mask=AttentionMask(1, 23, 23, causal=True), scale=0.3, dropout=0.0)
    for head in range(4):
        key, met = k[0, head // 2], []
        for t in range(23):
            met.append(additive_average(key[: t + 1], module.query_weight[head], 0.3) * key[t])
            global_key = additive_average(torch.stack(met), module.key_weight[head], 0.3)
            want = (
                module.transform_weight[head] @ (global_key * v[0, head // 2, t])
                + module.residual[head] * q[0, head, t]
            )
            torch.testing.assert_close(got[0, head, t], want)


def test_starts_next_to_nothing_with_a_gradient_to_every_weight():
    for causal, value_dim in itertools.product((True, False), (8, 6)):
        module, (q, k, v) = attention(value_dim=value_dim, trained=False), tensors(2, 30, 30, value_dim=value_dim)
        out = module.attend(q, k, v, mask=AttentionMask(2, 30, 30, causal=causal), scale=0.3, dropout=0.0)
        assert 0 < out.norm() < 0.01 * v.norm()
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).sum().backward()
        for name, weight in module.named_parameters():
            assert weight.grad.any(), f"{name} has no gradient at the start"


@pytest.mark.parametrize("chunk_size", [2, 3, 8, 64])
def test_chunks_padding_and_segments_in_all_combinations(chunk_size):
    padding = torch.arange(37) >= torch.tensor([[0], [20], [37]])
    segments = torch.bucketize(torch.arange(37), torch.tensor([9, 10, 30]), right=True).expand(3, -1)
    for causal, queries, pad, packed, value_dim in itertools.product(
        (True, False), (37, 20, 1), (None, padding), (None, segments), (8, 6)
    ):
        if not causal and queries < 37:
            continue
        q, k, v = tensors(3, queries, 37, value_dim=value_dim)
        module = attention(value_dim=value_dim, chunk_size=chunk_size)
        mask = AttentionMask(3, queries, 37, causal=causal, padding_BK=pad, segments_BK=packed)
        options = {"mask": mask, "scale": 0.3, "dropout": 0.0}
        got, (want, _) = module.attend(q, k, v, **options), module.reference(q, k, v, **options)
        torch.testing.assert_close(got, want)
        cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        leaves = [q, k, v, *module.parameters()]
        got, want = (torch.autograd.grad(out, leaves, cotangent) for out in (got, want))
        torch.testing.assert_close(got, want)


def test_prefix_pools_neither_overflow_nor_forget():
    # Logits up and down by hundreds: a maximum over all tokens would leave early prefixes 0 / 0.
    logits = torch.cat([torch.linspace(-800, 800, 50), torch.linspace(800, -800, 50)]).view(1, 1, -1)
    x = torch.randn(1, 1, 100, 3, generator=torch.Generator().manual_seed(0))
    pooled, lse = pool_prefixes(logits, x, None, 8)
    for t in range(100):
        want = logits[0, 0, : t + 1].double().softmax(0) @ x[0, 0, : t + 1].double()
        torch.testing.assert_close(pooled[0, 0, t].double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, logits.logcumsumexp(-1))


def test_pool_of_segments_equals_the_pool_of_each():
    generator = torch.Generator().manual_seed(0)
    logits, x = 50 * torch.randn(2, 3, 20, generator=generator), torch.randn(2, 3, 20, 4, generator=generator)
    logits[:, :, :5] = MASKED_SCORE
    segments = torch.tensor([7] * 5 + [2] * 8 + [9] * 7).expand(2, -1)
    pooled, running_max = pool(logits, x, segments)
    for part in (slice(5, 13), slice(13, 20)):
        want, _ = pool(logits[:, :, part], x[:, :, part], None)
        torch.testing.assert_close(pooled[:, :, part], want.expand(-1, -1, part.stop - part.start, -1))
    assert (running_max[:, :, :5] == MASKED_SCORE).all()


def test_bidirectional_segments_have_any_number_and_may_be_in_pieces():
    (q, k, v), module = tensors(2, 37, 37), attention()
    segments = torch.tensor([10**12, -3, 7])[torch.randint(3, (2, 37), generator=torch.Generator().manual_seed(0))]
    options = {"mask": AttentionMask(2, 37, 37, causal=False, segments_BK=segments), "scale": 0.3, "dropout": 0.0}
    torch.testing.assert_close(module.attend(q, k, v, **options), module.reference(q, k, v, **options)[0])


def test_room_for_keys_to_come_is_not_read():
    module, (q, k, v) = attention(chunk_size=4), tensors(1, 20, 64)
    padding = torch.arange(64).unsqueeze(0) >= 2
    fixed = AttentionMask(1, 20, 64, causal=True, padding_BK=padding, q_offset=13)
    grown = AttentionMask(1, 20, 33, causal=True, padding_BK=padding[:, :33])
    for form in (module.attend, lambda *x, **y: module.reference(*x, **y)[0]):
        got = form(q, k, v, mask=fixed, scale=0.3, dropout=0.0)
        want = form(q, k[:, :, :33], v[:, :, :33], mask=grown, scale=0.3, dropout=0.0)
        torch.testing.assert_close(got, want)


def test_memory_grows_with_the_length_and_not_with_its_square():
    largest = {}
    for length in (1024, 4096):
        module, leaves = attention(1, 1, dtype=torch.float32), tensors(1, length, length, 1, 1, dtype=torch.float32)
        mask = AttentionMask(1, length, length, causal=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            module.attend(*leaves, mask=mask, scale=0.3, dropout=0.0).sum().backward()
        largest[length] = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest[4096] <= 4 * largest[1024]
    assert largest[4096] < 4 * 4096 * 4096 / 8


@pytest.mark.parametrize("causal", [True, False])
def test_compiles_whole(causal):
    module = attention(dtype=torch.float32, chunk_size=8)
    q, k, v = (x.detach() for x in tensors(2, 40, 40, dtype=torch.float32))
    mask = AttentionMask(2, 40, 40, causal=causal, padding_BK=torch.arange(40) >= torch.tensor([[0], [7]]))

    def run(q, k, v):
        return module.attend(q, k, v, mask=mask, scale=0.3, dropout=0.0)

    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v), run(q, k, v))


def test_bidirectional_needs_all_queries():
    module, (q, k, v) = attention(), tensors(1, 5, 9)
    mask = AttentionMask(1, 5, 9, causal=False)
    for form in (module.attend, module.reference):
        with pytest.raises(ValueError, match="pools the queries of all tokens, got 5 queries and 9 keys"):
            form(q, k, v, mask=mask, scale=0.3, dropout=0.0)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="chunk_size=1; allowed: an integer from 2 on"):
        FastformerAttention.Config(chunk_size=1)


def test_needs_the_sizes_of_the_heads():
    with pytest.raises(ValueError, match="'fastformer' has weights a head and needs the sizes of the heads, got None"):
        FastformerAttention(FastformerAttention.Config())
