"""Linear attention against the recurrence of its papers, and what only a chunked state can get wrong."""

import itertools

import pytest
import torch
from cases import MostZeros
from torch.nn.functional import elu

from attn_plugins.attentions.linear import LinearAttention
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops import sizes
from attn_plugins.ops.linear import chunked as kernel
from attn_plugins.ops.linear.features import FEATURE_MAPS

MAPS = ("elu", "hedgehog", "favor", "taylor")


def attention(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, dtype=torch.float64, **options):
    shape = {"num_heads": num_heads, "num_key_value_heads": num_key_value_heads}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # taylor's projections are drawn
        module = LinearAttention(
            LinearAttention.Config(**options), HeadShape(**shape, head_dim=head_dim, value_dim=value_dim)
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return module.to(dtype)


def tensors(batch, queries, keys, num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (num_heads, queries, head_dim),
        (num_key_value_heads, keys, head_dim),
        (num_key_value_heads, keys, value_dim),
    )
    return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def both_forms(module, q, k, v, mask, autocast=False, fast="attend"):
    """Outputs and gradients, of the fast form and of the reference."""
    results = []
    for form in (fast, "reference"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = getattr(module, form)(*leaves, mask=mask, scale=1.0, dropout=0.0)
        out = out[0] if form == "reference" else out
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(
            out.dtype
        )
        results.append([out, *torch.autograd.grad(out, [*leaves, *module.parameters()], cotangent)])
    return zip(*results, strict=True)


def test_elu_equals_the_recurrence_of_the_paper():
    q, k, v = tensors(1, 30, 30, num_heads=1, num_key_value_heads=1)
    mask = AttentionMask(1, 30, 30, causal=True)
    got = attention(1, 1, feature_map="elu", chunk_size=4).attend(q, k, v, mask=mask, scale=1.0, dropout=0.0)[0, 0]
    s, z = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for t in range(30):
        phi_q, phi_k = elu(q[0, 0, t]) + 1, elu(k[0, 0, t]) + 1
        s, z = s + torch.outer(phi_k, v[0, 0, t]), z + phi_k
        torch.testing.assert_close(got[t], phi_q @ s / (phi_q @ z + 1e-6))


def test_hedgehog_starts_at_softmax_of_plus_and_minus_x():
    heads = HeadShape(num_heads=2, num_key_value_heads=1, head_dim=8, value_dim=8)
    module = LinearAttention(LinearAttention.Config(feature_map="hedgehog"), heads).double()
    q, k, v = tensors(1, 12, 12, 2, 1)
    weights = module(q, k, v, mask=AttentionMask(1, 12, 12, causal=False), scale=1.0, need_weights=True)[1]
    phi = [torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q, k)]
    products = phi[0] @ phi[1].mT
    torch.testing.assert_close(weights, products / (products.sum(-1, keepdim=True) + 1e-6))


def test_hedgehog_projects_each_query_head_and_each_key_head_by_its_own_weight():
    module = attention(feature_map="hedgehog")
    q, k, v = tensors(1, 12, 12)
    weights = module(q, k, v, mask=AttentionMask(1, 12, 12, causal=False), scale=1.0, need_weights=True)[1]
    for head in range(4):
        x = q[0, head] + q[0, head] @ module.query_weight[head].T
        y = k[0, head // 2] + k[0, head // 2] @ module.key_weight[head // 2].T
        phi_x, phi_y = (torch.cat([a.softmax(-1), (-a).softmax(-1)], -1) for a in (x, y))
        products = phi_x @ phi_y.T
        torch.testing.assert_close(weights[0, head], products / (products.sum(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("name", [name for name, phi in FEATURE_MAPS.items() if not phi.exponential])
def test_the_kernel_s_form_of_a_feature_map_and_its_gradient(name):
    phi = FEATURE_MAPS[name]
    x = (3 * torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    features = phi.features(x)
    assert features.shape[-1] == phi.size(6)
    torch.testing.assert_close(phi.fast_features(x.detach().clone()), features.detach())
    cotangent = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (want,) = torch.autograd.grad(features, x, cotangent)
    got = phi.gradient(features.detach().clone(), cotangent.clone())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [16, 64, 4096], ids="rows a block {}".format)
@pytest.mark.parametrize("feature_map", MAPS)
def test_blocks_chunks_padding_and_segments_in_all_combinations(monkeypatch, rows, feature_map):
    monkeypatch.setitem(kernel.ROWS_A_BLOCK, "cpu", rows)
    keys = 61
    padding = torch.arange(keys) >= torch.tensor([[3], [40]])
    segments = torch.bucketize(torch.arange(keys), torch.tensor([9, 10, 45]), right=True).expand(2, -1)
    calls = itertools.product((True, False), (61, 22, 16), (None, padding), (None, segments))
    for number, (causal, queries, pad, packed) in enumerate(calls):
        # Each call with one number of groups, and with the other in the test of the next feature map.
        groups = (4, 2)[(number.bit_count() + MAPS.index(feature_map)) % 2]
        q, k, v = tensors(2, queries, keys, 4, groups, value_dim=6)
        module = attention(4, groups, value_dim=6, feature_map=feature_map, chunk_size=8)
        mask = AttentionMask(2, queries, keys, causal=causal, padding_BK=pad, segments_BK=packed)
        for got, want in both_forms(module, q, k, v, mask):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("feature_map", MAPS)
def test_large_blocks_are_of_many_heads_before_they_are_long(monkeypatch, feature_map):
    monkeypatch.setattr(kernel, "CHUNKS_A_BLOCK", 3)
    padding = torch.arange(61) >= torch.tensor([[3], [40], [0]])
    segments = torch.bucketize(torch.arange(61), torch.tensor([9, 10, 45]), right=True).expand(3, -1)
    (q, k, v), mask = (
        tensors(3, 61, 61),
        AttentionMask(3, 61, 61, causal=True, padding_BK=padding, segments_BK=segments),
    )
    module = attention(feature_map=feature_map, chunk_size=8)
    for scores in (1 << 14, 1 << 18):
        monkeypatch.setitem(sizes.SCORES_AT_ONCE, "cpu", scores)
        for got, want in both_forms(module, q, k, v, mask, fast="attend_batched"):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_text_of_at_most_two_blocks_is_one(monkeypatch):
    monkeypatch.setitem(kernel.ROWS_A_BLOCK, "cpu", 32)
    for length, number in ((16, 1), (17, 4)):
        tokens = tensors(1, length, length)
        problem = kernel._problem(*tokens, *[None] * 4, "elu", 8, 0, False)
        assert sum(map(len, kernel._places(problem))) == number, length


@pytest.mark.parametrize("packed", [False, True])
def test_kernel_gradients_equal_finite_differences(monkeypatch, packed):
    monkeypatch.setitem(kernel.ROWS_A_BLOCK, "cpu", 4)
    q, k, v = tensors(2, 7, 7, 2, 1, 3, 2)
    w_q, w_k = (torch.eye(3, dtype=torch.float64).repeat(n, 1, 1) + 0.1 for n in (2, 1))
    state = torch.rand(2, 1, 6, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    segments = torch.bucketize(torch.arange(7), torch.tensor([3, 5]), right=True).expand(2, -1) if packed else None
    padding = torch.arange(7) >= torch.tensor([[0], [2]])

    def run(*leaves):
        q, k, v, w_q, w_k, state = leaves
        rest = (padding, segments, state, None, "hedgehog", 2, 1e-6, 0)
        return kernel.causal_linear(q, k, v, w_q, w_k, *rest)[:2]

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (q, k, v, w_q, w_k, state)])


def test_kernel_keeps_the_rules_of_a_torch_operator():
    q, k, v = (x.requires_grad_() for x in tensors(1, 13, 13, 2, 1, 4, 4, torch.float32))
    w_q, w_k = (torch.zeros(n, 4, 4, requires_grad=True) for n in (2, 1))
    arguments = (q, k, v, w_q, w_k, *[None] * 4, "hedgehog", 4, 1e-6, 0)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernel.causal_linear, arguments, test_utils=checks)


@pytest.mark.parametrize("feature_map", ["elu", "relu", "relu2", "identity"])
def test_kernel_leaves_tokens_as_they_are(feature_map):
    leaves = [x.requires_grad_() for x in tensors(1, 16, 16, 2, 2, 4, 4, torch.float32)]
    before = [x.detach().clone() for x in leaves]
    out, *_ = kernel.causal_linear(*leaves, *[None] * 6, feature_map, 4, 1e-6, 0)
    out.sum().backward()
    for got, want in zip(leaves, before, strict=True):
        assert torch.equal(got, want)


def test_backward_makes_no_zeros_for_the_states_that_only_it_reads():
    leaves = [x.requires_grad_() for x in tensors(1, 64, 64, 2, 2, 4, 4)]
    out, den, states, _ = kernel.causal_linear(*leaves, *[None] * 6, "elu", 4, 1e-6, 0)
    zeros = MostZeros()
    with zeros:
        out.sum().backward()
    assert zeros.number < min(den.numel(), states.numel())


@pytest.mark.parametrize("causal", [True, False])
def test_compiles_whole(causal):
    module, (q, k, v) = attention(dtype=torch.float32), tensors(2, 40, 40, dtype=torch.float32)
    mask = AttentionMask(2, 40, 40, causal=causal, padding_BK=torch.arange(40) >= torch.tensor([[0], [7]]))
    compiled = torch.compile(
        lambda q, k, v: module.attend(q, k, v, mask=mask, scale=1.0, dropout=0.0), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k, v), module.attend(q, k, v, mask=mask, scale=1.0, dropout=0.0))


def test_cosformer_compiles_over_packed_rows_that_are_longer_than_its_longest_sequence():
    module, (q, k, v) = attention(feature_map="cosformer", max_length=25), tensors(2, 40, 40)

    @torch.compile(backend="eager", fullgraph=True)
    def attend(q, segments):
        mask = AttentionMask(2, 40, 40, causal=True, segments_BK=segments, device="cpu")
        return module.attend(q, k, v, mask=mask, scale=1.0, dropout=0.0)

    segments = (torch.arange(40) >= torch.tensor([[15], [25]])).long()
    mask = AttentionMask(2, 40, 40, causal=True, segments_BK=segments)
    torch.testing.assert_close(attend(q, segments), module.attend(q, k, v, mask=mask, scale=1.0, dropout=0.0))
    with pytest.raises(RuntimeError, match="'cosformer' got more than max_length"):
        attend(q, (torch.arange(40) >= torch.tensor([[15], [26]])).long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_sequences_in_half_precision_do_not_drift(dtype):
    # A float16 denominator overflows after a thousand tokens, a bfloat16 state stops growing.
    module = attention(1, 1, 64, 64, dtype=dtype)
    q, k, v = tensors(1, 4096, 4096, 1, 1, 64, 64, dtype)
    v = v + 0.5
    mask = AttentionMask(1, 4096, 4096, causal=True)
    got = module.attend(q, k, v, mask=mask, scale=1.0, dropout=0.0)
    want = module.attend(q.double(), k.double(), v.double(), mask=mask, scale=1.0, dropout=0.0)
    assert got.dtype == dtype
    assert (got - want).norm() / want.norm() < {torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
def test_autocast_does_not_reach_the_sums(causal, feature_map):
    module, (q, k, v) = attention(feature_map=feature_map, dtype=torch.float32), tensors(1, 50, 50, dtype=torch.float32)
    mask = AttentionMask(1, 50, 50, causal=causal)
    want = [got for got, _ in both_forms(module, q, k, v, mask)]
    for (got, reference), exact in zip(both_forms(module, q, k, v, mask, autocast=True), want, strict=True):
        assert torch.equal(got, exact)
        torch.testing.assert_close(reference, exact, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_the_kernel_in_backward_either():
    module, inputs = attention(dtype=torch.float32), tensors(1, 50, 50, dtype=torch.float32)
    leaves, mask = [x.requires_grad_() for x in inputs], AttentionMask(1, 50, 50, causal=True)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = module.attend(*leaves, mask=mask, scale=1.0, dropout=0.0)
            gradients.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(map(torch.equal, *gradients))


def test_output_needs_no_copy_into_the_layout_of_transformers():
    out = attention().attend(*tensors(2, 40, 40), mask=AttentionMask(2, 40, 40, causal=True), scale=1.0, dropout=0.0)
    assert out.transpose(1, 2).is_contiguous()


def test_huge_values_of_one_packed_sequence_leave_no_trace_in_another():
    module, (q, k, v) = attention(dtype=torch.float32, chunk_size=8), tensors(1, 60, 60, dtype=torch.float32)
    segments = (torch.arange(60) >= 21).long().unsqueeze(0)
    for causal in (True, False):
        mask = AttentionMask(1, 60, 60, causal=causal, segments_BK=segments)
        before = module.attend(q, k, v, mask=mask, scale=1.0, dropout=0.0)
        v_huge = torch.where(segments[0, :, None] == 0, 1e30, v)
        after = module.attend(q, k, v_huge, mask=mask, scale=1.0, dropout=0.0)
        assert torch.equal(after[:, :, 21:], before[:, :, 21:])


def test_room_for_keys_to_come_is_not_read():
    # A cache of fixed length: 64 places, 33 written, of which the last 20 are this call's.
    module, (q, k, v) = attention(), tensors(1, 20, 64)
    padding = torch.arange(64).unsqueeze(0) >= 2
    mask = AttentionMask(1, 20, 64, causal=True, padding_BK=padding, q_offset=13)
    want = module.attend(
        q, k[:, :, :33], v[:, :, :33], scale=1.0, dropout=0.0,
        mask=AttentionMask(1, 20, 33, causal=True, padding_BK=padding[:, :33]),
    )  # fmt: skip
    leaves = [k.requires_grad_(), v.requires_grad_()]
    got = module.attend(q, k, v, mask=mask, scale=1.0, dropout=0.0)
    torch.testing.assert_close(got, want)
    assert not any(gradient[:, :, 33:].any() for gradient in torch.autograd.grad(got.sum(), leaves))
    with pytest.raises(ValueError, match="20 queries from key 50 on; allowed: queries within 64 keys"):
        module.attend(q, k, v, mask=AttentionMask(1, 20, 64, causal=True, q_offset=50), scale=1.0, dropout=0.0)


@pytest.mark.parametrize("feature_map", MAPS)
def test_memory_grows_with_the_length_and_not_with_its_square(feature_map):
    # From inside the operator: a hook on dispatch sees it as one call.
    largest = {}
    for length in (1024, 4096):
        module = attention(1, 1, 16, 16, dtype=torch.float32, feature_map=feature_map)
        leaves = [x.requires_grad_() for x in tensors(1, length, length, 1, 1, 16, 16, torch.float32)]
        mask = AttentionMask(1, length, length, causal=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            module.attend(*leaves, mask=mask, scale=1.0, dropout=0.0).sum().backward()
        largest[length] = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest[4096] <= 4 * largest[1024]
    assert largest[4096] < 4 * 4096 * 4096 / 8


def test_packed_sequences_in_pieces_are_refused():
    module, (q, k, v) = attention(), tensors(2, 40, 40)
    segments = torch.zeros(2, 40, dtype=torch.long)
    segments[1, 10:20] = 1
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[1, 35:] = False
    for causal, padding_BK in ((True, None), (False, None), (True, padding)):
        mask = AttentionMask(2, 40, 40, causal=causal, segments_BK=segments, padding_BK=padding_BK)
        with pytest.raises(
            ValueError, match=r"row 1 has 2 packed sequences in 3 pieces; allowed: each .* in one piece"
        ):
            module.attend(q, k, v, mask=mask, scale=1.0, dropout=0.0)


def test_padding_with_a_number_of_its_own_at_both_ends_is_no_sequence_in_pieces():
    module, (q, k, v) = attention(chunk_size=4), tensors(1, 40, 40)
    segments = torch.bucketize(torch.arange(40), torch.tensor([5, 20, 33]), right=True).unsqueeze(0)
    segments[segments == 3] = 0
    mask = AttentionMask(1, 40, 40, causal=True, segments_BK=segments, padding_BK=segments != 0)
    for got, want in both_forms(module, q, k, v, mask):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "softmax"}, "feature_map='softmax'.*allowed: 'elu', 'relu', 'relu2', "),
        ({"chunk_size": 0}, "chunk_size=0; allowed: an integer from 1 on"),
        ({"eps": 0.0}, "eps=0.0; allowed: a number above 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention.Config(**options)


def test_hedgehog_needs_the_sizes_of_the_heads():
    with pytest.raises(ValueError, match="feature_map='hedgehog' has weights a head and needs the sizes of the heads"):
        LinearAttention(LinearAttention.Config(feature_map="hedgehog"))
