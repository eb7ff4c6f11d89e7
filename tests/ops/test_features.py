"""Each feature map of linear attention against its formula, and every form of it against every other."""

import math

import pytest
import torch
from torch.nn.functional import elu, relu

from attn_plugins.attentions.linear import LinearAttention
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.linear import chunked as kernel
from attn_plugins.ops.linear.attention import (
    absorb,
    dense_linear_attention,
    linear_attention,
    project,
    projections,
    sum_keys,
)
from attn_plugins.ops.linear.features import moved

MAPS = {
    "elu": {},
    "relu": {},
    "relu2": {},
    "t2r": {},
    "hedgehog": {},
    "favor": {"num_features": 20},
    "cosformer": {"max_length": 5000},
    "taylor": {"feature_dim": 5},
}
SCALE = 0.3


def attention(feature_map, num_heads=2, num_key_value_heads=1, head_dim=8, dtype=torch.float64, **options):
    heads = HeadShape(
        num_heads=num_heads, num_key_value_heads=num_key_value_heads, head_dim=head_dim, value_dim=head_dim
    )
    config = LinearAttention.Config(feature_map=feature_map, **{**MAPS[feature_map], **options})
    module = LinearAttention(config, heads)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return module.to(dtype)


def tensors(length, num_heads=2, num_key_value_heads=1, head_dim=8, batch=1, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, head_dim) for heads in (num_heads, num_key_value_heads, num_key_value_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def features(module, x, head, side, t):
    """phi of one token of one head, from the papers."""
    name = module.config.feature_map
    if name in ("hedgehog", "t2r"):
        x = x + getattr(module, f"{side}_weight")[head] @ x
    if name == "elu":
        return elu(x) + 1
    if name == "relu":
        return relu(x)
    if name == "relu2":
        return relu(x) ** 2
    if name == "t2r":
        return relu(x + getattr(module, f"{side}_bias")[head])
    if name == "hedgehog":
        return torch.cat([x.softmax(0), (-x).softmax(0)])
    if name == "favor":
        x = x * math.sqrt(SCALE)
        return torch.exp(module.projection @ x - x @ x / 2) / math.sqrt(len(module.projection))
    if name == "cosformer":
        angle = math.pi * t / (2 * module.config.max_length)
        return torch.cat([relu(x) * math.cos(angle), relu(x) * math.sin(angle)])
    x = getattr(module, f"{side}_weight")[head] @ x * math.sqrt(SCALE)
    return torch.cat([x.new_ones(1), x, torch.outer(x, x).flatten() / math.sqrt(2)])


def loop(module, q, k, v, causal):
    """One weight after the other."""
    out, length = torch.zeros(q.shape, dtype=q.dtype), q.shape[2]
    for head in range(q.shape[1]):
        phi_q = [features(module, q[0, head, t], head, "query", t) for t in range(length)]
        phi_k = [features(module, k[0, head // 2, t], head // 2, "key", t) for t in range(length)]
        for i in range(length):
            seen = range(i + 1) if causal else range(length)
            weights = torch.stack([phi_q[i] @ phi_k[j] for j in seen])
            eps = 0 if module.config.feature_map == "favor" else module.config.eps
            out[0, head, i] = weights @ v[0, head // 2, : len(seen)] / (weights.sum() + eps)
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
def test_the_formula_of_the_paper(feature_map, causal):
    module, (q, k, v) = attention(feature_map, chunk_size=4), tensors(25)
    mask = AttentionMask(1, 25, 25, causal=causal)
    want = loop(module, q, k, v, causal)
    for form in (module.attend(q, k, v, mask=mask, scale=SCALE, dropout=0.0),
                 module.reference(q, k, v, mask=mask, scale=SCALE, dropout=0.0)[0]):  # fmt: skip
        torch.testing.assert_close(form, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("feature_map", MAPS)
def test_recurrent_chunked_and_quadratic_forms_agree_in_float32_at_4096_tokens(feature_map):
    length, sizes = 4096, {"num_heads": 1, "num_key_value_heads": 1}
    # eps takes from rows whose features are all but zero, where rounding would be all that is left.
    module = attention(feature_map, **sizes, eps=1e-3, dtype=torch.float32)
    q, k, v = tensors(length, **sizes, dtype=torch.float32)
    mask = AttentionMask(1, length, length, causal=True)
    q_in, k_in, options = module.prepare(q, k, mask, SCALE)
    quadratic = dense_linear_attention(q_in, k_in, v, mask.dense(), **options)[0]
    for chunk_size in (16, 64, 100):
        chunked = linear_attention(q_in, k_in, v, mask, chunk_size=chunk_size, **options)
        torch.testing.assert_close(chunked, quadratic, rtol=0, atol=1e-5)

    phi = kernel.FEATURE_MAPS[options["feature_map"]].features
    both = ((q_in, "query_projection"), (k_in, "key_projection"))
    fq, fk = (phi(x[0, 0] if name not in options else x[0, 0] @ options[name][0].mT) for x, name in both)
    state, v_one = torch.zeros(fk.shape[1], 9), torch.cat([v[0, 0], torch.ones(length, 1)], dim=1)
    recurrent = []
    for t in range(length):
        state.addr_(fk[t], v_one[t])
        total = fq[t] @ state
        recurrent.append(total[:-1] / (total[-1] + options["eps"]))
    torch.testing.assert_close(torch.stack(recurrent), quadratic[0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("feature_map", ["t2r", "relu2", "cosformer"])
def test_both_forms_have_the_same_gradients(feature_map):
    # Those that are no example of the contract tests.
    module = attention(feature_map, chunk_size=4)
    padding = torch.arange(30) >= torch.tensor([[0], [7]])
    segments = (torch.arange(30) // 11).expand(2, -1)
    for causal in (True, False):
        for rows in ({}, {"padding_BK": padding}, {"padding_BK": padding, "segments_BK": segments}):
            mask, found = AttentionMask(2, 30, 30, causal=causal, **rows), []
            for form in (module.attend, lambda *x, **options: module.reference(*x, **options)[0]):
                leaves = [x.requires_grad_() for x in tensors(30, batch=2)]
                out = form(*leaves, mask=mask, scale=SCALE, dropout=0.0)
                if "padding_BK" in rows:
                    out = out * padding[:, None, :, None]
                found.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()])])
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def weights_of(module, q, k, causal=True):
    mask = AttentionMask(1, q.shape[2], k.shape[2], causal=causal)
    return module.reference(q, k, k, mask=mask, scale=SCALE, dropout=0.0)[1]


def test_t2r_starts_as_relu():
    heads = HeadShape(num_heads=2, num_key_value_heads=1, head_dim=8, value_dim=8)
    t2r, plain = (LinearAttention(LinearAttention.Config(feature_map=name), heads).double() for name in ("t2r", "relu"))
    q, k, _ = tensors(9)
    torch.testing.assert_close(weights_of(t2r, q, k), weights_of(plain, q, k))


def test_taylor_starts_at_the_polynomial_of_the_scores_where_it_has_the_dimensions():
    heads = HeadShape(num_heads=2, num_key_value_heads=1, head_dim=8, value_dim=8)
    module = LinearAttention(LinearAttention.Config(feature_map="taylor", feature_dim=8), heads).double()
    q, k, _ = tensors(9)
    s = SCALE * q @ k.mT
    polynomial = (1 + s + s**2 / 2).tril()
    torch.testing.assert_close(weights_of(module, q, k), polynomial / (polynomial.sum(-1, keepdim=True) + 1e-6))


def test_taylor_with_fewer_dimensions_keeps_the_scores_on_average():
    heads = HeadShape(num_heads=200, num_key_value_heads=100, head_dim=32, value_dim=32)
    module = LinearAttention(LinearAttention.Config(feature_map="taylor", feature_dim=8), heads)
    products = module.query_weight.mT @ module.key_weight.repeat_interleave(2, dim=0)
    torch.testing.assert_close(products.mean(dim=0), torch.eye(32), rtol=0, atol=0.12)


def test_favor_estimates_softmax_attention():
    q, k, _ = (x / 2 for x in tensors(40))
    want = (SCALE * q @ k.mT).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
    errors = [(weights_of(attention("favor", num_features=n), q, k) - want).norm() / want.norm() for n in (16, 4096)]
    assert errors[0] > 0.1
    assert errors[1] < 0.08


def test_favor_s_directions_are_orthogonal_and_as_long_as_gaussian_ones():
    module = attention("favor", head_dim=64, num_features=256)
    for block in module.projection.split(64):
        lengths = block.norm(dim=1)
        torch.testing.assert_close(block @ block.T, torch.diag(lengths**2), rtol=0, atol=1e-4)
        assert lengths.std() > 0.3
    assert abs((module.projection**2).mean() - 1) < 0.05
    assert torch.equal(attention("favor", head_dim=64, num_features=256).projection, module.projection)
    assert not torch.equal(attention("favor", head_dim=64, num_features=256, seed=1).projection, module.projection)
    assert attention("favor", head_dim=64, num_features=100).projection.shape == (100, 64)
    assert "projection" in module.state_dict()


@pytest.mark.parametrize("offset", [0.0, 40.0])
@pytest.mark.parametrize("causal", [True, False])
def test_favor_stays_exact_in_float32_where_each_exponential_would_be_zero(monkeypatch, causal, offset):
    # Keys far from zero have exponents of about -offset^2 / 2; exp(-104) is 0 in float32.
    monkeypatch.setitem(kernel.ROWS_A_BLOCK, "cpu", 16)
    module, (q, k, v) = attention("favor", chunk_size=4, dtype=torch.float32), tensors(60, dtype=torch.float32)
    k = k + offset
    mask = AttentionMask(1, 60, 60, causal=causal)
    got = module.attend(q, k, v, mask=mask, scale=SCALE, dropout=0.0)
    want = module.double().reference(q.double(), k.double(), v.double(), mask=mask, scale=SCALE, dropout=0.0)[0]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 if offset == 0 else 2e-2)


def test_favor_s_level_rises_from_block_to_block(monkeypatch):
    # Later keys outweigh earlier ones beyond float32's range; earlier queries must not notice.
    monkeypatch.setitem(kernel.ROWS_A_BLOCK, "cpu", 16)
    module, (q, k, v) = attention("favor", chunk_size=4, dtype=torch.float32), tensors(64, dtype=torch.float32)
    far = k.clone()
    far[:, :, :32] = 40 + far[:, :, :32] / 10
    mask = AttentionMask(1, 64, 64, causal=True)
    leaves = [x.requires_grad_() for x in (q, far, v)]
    got = module.attend(*leaves, mask=mask, scale=SCALE, dropout=0.0)
    alone = module.attend(
        q[:, :, 32:], far[:, :, 32:], v[:, :, 32:], mask=AttentionMask(1, 32, 32, causal=True), scale=SCALE, dropout=0.0
    )
    torch.testing.assert_close(got[:, :, 32:], alone)
    only = AttentionMask(1, 32, 32, causal=True)
    before = module.attend(q[:, :, :32], far[:, :, :32], v[:, :, :32], mask=only, scale=SCALE, dropout=0.0)
    torch.testing.assert_close(got[:, :, :32], before)
    assert before[:, :, 1:].any(dim=-1).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(got.sum(), leaves))


@pytest.mark.parametrize("feature_map", ["exp", "identity", "taylor"])
def test_kernel_gradients_equal_finite_differences(monkeypatch, feature_map):
    monkeypatch.setitem(kernel.ROWS_A_BLOCK, "cpu", 4)
    q, k, v = tensors(7, head_dim=3, batch=2)
    k, padding = k.abs(), torch.arange(7) >= torch.tensor([[0], [2]])
    q = q.abs()
    w_q, w_k = (torch.eye(3, dtype=torch.float64).repeat(n, 1, 1) + 0.1 for n in (2, 1))
    size = kernel.FEATURE_MAPS[feature_map].size(3)
    state = torch.rand(2, 1, size, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    running_max = torch.full((2, 1, size), 0.7, dtype=torch.float64) if feature_map == "exp" else None

    def run(*leaves):
        return kernel.causal_linear(*leaves[:5], padding, None, leaves[5], running_max, feature_map, 2, 1e-6, 0)[:2]

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (q, k, v, w_q, w_k, state)], fast_mode=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (q, k, v, w_q, w_k, padding, None, state, running_max, feature_map, 2, 1e-6, 0)
    torch.library.opcheck(kernel.causal_linear, arguments, test_utils=checks)


def test_cosformer_decodes_and_counts_from_the_first_real_token():
    module, (q, k, v) = attention("cosformer", chunk_size=4, max_length=30), tensors(30)
    want = module.attend(q, k, v, mask=AttentionMask(1, 30, 30, causal=True), scale=SCALE, dropout=0.0)
    for low, high in ((0, 9), (9, 29), (29, 30)):
        mask = AttentionMask(1, high - low, high, causal=True)
        got = module.attend(q[:, :, low:high], k[:, :, :high], v[:, :, :high], mask=mask, scale=SCALE, dropout=0.0)
        torch.testing.assert_close(got, want[:, :, low:high])
    # Padding does not count towards max_length, and changes no distance.
    padded = [torch.nn.functional.pad(x, (0, 0, 6, 0), value=3.0) for x in (q, k, v)]
    mask = AttentionMask(1, 36, 36, causal=True, padding_BK=torch.arange(36).unsqueeze(0) >= 6)
    got = module.attend(*padded, mask=mask, scale=SCALE, dropout=0.0)
    torch.testing.assert_close(got[:, :, 6:], want)


def test_cosformer_refuses_what_has_no_distance_in_its_range():
    module = attention("cosformer", max_length=20)
    with pytest.raises(ValueError, match="got a sequence of 21 tokens; allowed: at most max_length=20"):
        module.attend(*tensors(21), mask=AttentionMask(1, 21, 21, causal=True), scale=SCALE, dropout=0.0)
    mask = AttentionMask(1, 9, 9, causal=False, cross=True)
    with pytest.raises(
        ValueError, match="tokens of different sequences do not have; allowed in cross-attention: the o"
    ):
        module.attend(*tensors(9), mask=mask, scale=SCALE, dropout=0.0)


@pytest.mark.parametrize("feature_map", ["t2r", "favor", "taylor"])
def test_maps_with_weights_need_the_sizes_of_the_heads(feature_map):
    with pytest.raises(ValueError, match=f"feature_map='{feature_map}' has weights a head and needs the sizes"):
        LinearAttention(LinearAttention.Config(feature_map=feature_map))


@pytest.mark.parametrize("option", ["feature_dim", "num_features", "max_length"])
def test_bad_sizes_are_refused(option):
    with pytest.raises(ValueError, match=f"{option}=0; allowed: an integer from 1 on"):
        LinearAttention.Config(**{option: 0})
    with pytest.raises(ValueError, match="seed=-1; allowed: an integer from 0 on"):
        LinearAttention.Config(seed=-1)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_favor_equals_performer_pytorch():
    peer = pytest.importorskip("performer_pytorch.performer_pytorch", reason="pip install performer-pytorch")
    module = attention("favor", 2, 2, num_features=64, dtype=torch.float32)
    q, k, v = tensors(100, 2, 2, dtype=torch.float32)

    def theirs(k, eps, causal):
        options = {"projection_matrix": module.projection, "eps": eps}
        phi_q, phi_k = (
            peer.softmax_kernel(q, is_query=True, **options),
            peer.softmax_kernel(k, is_query=False, **options),
        )
        if not causal:
            return peer.linear_attention(phi_q, phi_k, v)
        return peer.causal_linear_attention_noncuda(phi_q, phi_k, v, chunk_size=25, eps=0.0)

    def ours(k, causal):
        mask = AttentionMask(1, 100, 100, causal=causal)
        return module.attend(q, k, v, mask=mask, scale=8**-0.5, dropout=0.0)

    for causal in (True, False):
        # Theirs adds 1e-4 to each feature, which ours does not.
        torch.testing.assert_close(ours(k, causal), theirs(k, 0.0, causal), rtol=1e-4, atol=1e-5)
    changed = k.clone()
    changed[:, :, -1] = 4.0
    # Their maximum over all keys with that 1e-4 lets earlier outputs depend on the last key; ours do not.
    assert (theirs(k, 1e-4, True) - theirs(changed, 1e-4, True))[:, :, :-1].abs().max() > 1e-3
    torch.testing.assert_close(ours(changed, True)[:, :, :-1], ours(k, True)[:, :, :-1])


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_token_alone_has_the_features_that_it_has_among_others(feature_map, dtype):
    module, (q, k, v) = attention(feature_map).to(dtype), tensors(9, dtype=dtype)
    mask = AttentionMask(1, 9, 9, causal=True)

    def made(q, k, since):
        prepared = moved(module.prepare(q, k, mask, SCALE, since))
        weights = projections(prepared)
        return [module.phi.features(project(x, w)) for x, w in zip(prepared[:2], weights, strict=True)]

    sums, state = (torch.zeros(1, 1, made(q, k, 0)[1].shape[3], 9, dtype=torch.float64) for _ in range(2))
    for token in range(9):
        alone = made(q[:, :, token : token + 1], k[:, :, token : token + 1], token)
        for one, many in zip(alone, made(q, k, 0), strict=True):
            torch.testing.assert_close(one, many[:, :, token : token + 1], rtol=1e-5, atol=1e-6)
        if not module.phi.exponential:
            given = k[:, :, token : token + 1], v[:, :, token : token + 1].double()
            prepared = moved(module.prepare(q[:, :, :1], given[0], mask, SCALE, token))
            what = prepared.k_BGKD, given[1], projections(prepared)[1], prepared.options["feature_map"]
            seen = torch.tensor([[token != 4]])
            state, _ = absorb(state, None, *what, seen)
            sums = sums + sum_keys(*what, seen)[0]
            torch.testing.assert_close(state, sums.to(state.dtype), rtol=1e-5, atol=1e-6)
