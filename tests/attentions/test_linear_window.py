"""LoLCATs' hybrid against the recurrence of its paper, and what its two halves do alone."""

import pytest
import torch
from torch.nn.functional import elu, softplus

from attn_plugins.attentions.linear_window import LinearWindowAttention
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.rules import parse_rules
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.softmax.patterns.band import ROWS, Band

SCALE = 0.4


def attention(dtype=torch.float64, moved=True, **options):
    heads = HeadShape(num_heads=2, num_key_value_heads=1, head_dim=8, value_dim=8)
    torch.manual_seed(0)
    module = LinearWindowAttention(LinearWindowAttention.Config(**options), heads)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator) if moved else 0)
    return module.to(dtype)


def tensors(length, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, n, length, 8, generator=generator, dtype=torch.float64).to(dtype) for n in (2, 1, 1)]


def run(module, q, k, v, mask):
    return module.attend(q, k, v, mask=mask, scale=SCALE, dropout=0.0)


def phi(module, x, head, side):
    if module.config.feature_map == "elu":
        return elu(x) + 1
    x = x + getattr(module, f"{side}_weight")[head] @ x
    return torch.cat([x.softmax(0), (-x).softmax(0)])


@pytest.mark.parametrize("branch", ["both", "window", "linear"])
@pytest.mark.parametrize(("feature_map", "sinks"), [("hedgehog", 0), ("hedgehog", 4), ("elu", 9)])
def test_the_recurrence_of_the_paper_with_sinks(feature_map, sinks, branch):
    window_size, length = 6, 80
    sizes = {"window_size": window_size, "num_sink_tokens": sinks, "chunk_size": 8}
    module = attention(feature_map=feature_map, branch=branch, **sizes)
    q, k, v = tensors(length)
    mask = AttentionMask(1, length, length, causal=True)
    reference, _ = module.reference(q, k, v, mask=mask, scale=SCALE, dropout=0.0)
    got = run(module, q, k, v, mask)
    for head in range(2):
        factor = torch.exp(module.log_linear_factor[head])
        features = len(phi(module, k[0, 0, 0], 0, "key"))
        state, norm = torch.zeros(features, 8, dtype=torch.float64), torch.zeros(features, dtype=torch.float64)
        for t in range(length):
            if t >= window_size:
                left = t - window_size  # leaves the window, enters the state
                f = phi(module, k[0, 0, left], 0, "key") * (left >= sinks)
                state, norm = state + torch.outer(f, v[0, 0, left]), norm + f
            near = sorted({*range(min(sinks, t + 1)), *range(max(0, t - window_size + 1), t + 1)})
            s = SCALE * k[0, 0, near] @ q[0, head, t]
            e, f = torch.exp(s - s.max()), phi(module, q[0, head, t], head, "query")
            if branch == "window":
                want = e @ v[0, 0, near] / e.sum()
            elif branch == "linear":
                want = f @ state / (f @ norm + module.config.eps)
            else:
                want = (e @ v[0, 0, near] + factor * f @ state) / (e.sum() + factor * f @ norm)
            torch.testing.assert_close(got[0, head, t], want, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(reference[0, head, t], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("feature_map", ["hedgehog", "taylor"])
def test_chunked_and_quadratic_forms_agree_in_float32_at_4096_tokens(feature_map):
    q, k, v = tensors(4096, dtype=torch.float32)
    mask = AttentionMask(1, 4096, 4096, causal=True)
    options = {"feature_map": feature_map, "feature_dim": 4, "window_size": 100}
    want = attention(torch.float32, **options).reference(q, k, v, mask=mask, scale=SCALE, dropout=0.0)[0]
    for chunk_size in (16, 64):
        got = run(attention(torch.float32, **options, chunk_size=chunk_size), q, k, v, mask)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("branch", ["both", "window", "linear"])
@pytest.mark.parametrize("causal", [True, False])
def test_each_branch_s_gradients_equal_the_reference(branch, causal):
    module, padding = (
        attention(window_size=5, chunk_size=4, branch=branch),
        torch.arange(40) >= torch.tensor([[0], [9]]),
    )
    for segments in (None, (torch.arange(40) // 17).expand(2, -1)):
        mask, found = AttentionMask(2, 40, 40, causal=causal, padding_BK=padding, segments_BK=segments), []
        for form in ("attend", "attend_batched", "reference"):
            leaves = [x.requires_grad_() for x in tensors(40, batch=2)]
            out = getattr(module, form)(*leaves, mask=mask, scale=SCALE, dropout=0.0)
            out = (out[0] if form == "reference" else out) * padding[:, None, :, None]
            gradients = torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()], allow_unused=True)
            found.append([out, *gradients])
        for *both, want in zip(*found, strict=True):
            for got in both:
                if got is None or want is None:  # what has no part in a branch
                    assert all(x is None or x.abs().max() < 1e-12 for x in (got, want))
                    continue
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_branches_can_be_told_apart_on_a_built_module():
    module, (q, k, v) = attention(window_size=5, num_sink_tokens=2), tensors(60)
    mask = AttentionMask(1, 60, 60, causal=True)
    both = run(module, q, k, v, mask)
    module.branch = "window"
    index = torch.arange(60)
    near = ((index[:, None] - index < 5) | (index < 2)) & (index[:, None] >= index)
    torch.testing.assert_close(run(module, q, k, v, mask), dense_attention(q, k, v, near, scale=SCALE)[0])
    module.branch = "linear"
    linear = run(module, q, k, v, mask)
    assert not linear[:, :, :7].any(), "the window and sinks of the first 7 tokens hold all that came before"
    assert linear[:, :, 7:].any(dim=-1).all()
    torch.testing.assert_close(linear[:, 0, 7], v[:, 0, 2], rtol=1e-4, atol=1e-4)  # all that has left by then
    module.branch = "both"
    assert torch.equal(run(module, q, k, v, mask), both)
    module.branch = "neither"
    with pytest.raises(ValueError, match="branch='neither'; allowed: 'both', 'window', 'linear'"):
        run(module, q, k, v, mask)


def test_starts_near_the_window_with_its_sinks_and_at_hedgehog_s_identity():
    module, (q, k, v) = attention(moved=False, window_size=16), tensors(512)
    factor = torch.exp(module.log_linear_factor)
    torch.testing.assert_close(factor, torch.full((2,), 0.01, dtype=torch.float64), rtol=1e-6, atol=0)
    assert not module.query_weight.any()
    assert not module.key_weight.any()
    index = torch.arange(512)
    near = ((index[:, None] - index < 16) | (index < 4)) & (index[:, None] >= index)
    local = dense_attention(q, k, v, near, scale=SCALE)[0]
    got = run(module, q, k, v, AttentionMask(1, 512, 512, causal=True))
    assert (got - local).square().sum() < 0.1 * local.square().sum()


def test_a_key_s_weight_is_of_the_window_or_of_the_state():
    module, (q, k, v) = attention(window_size=4, num_sink_tokens=2, feature_map="elu"), tensors(12)
    found = {}
    for branch in ("both", "window", "linear"):
        module.branch = branch
        found[branch] = run_weights(module, q, k, v)
    near, index = found["window"] > 0, torch.arange(12)
    assert torch.equal(near[0, 0], ((index[:, None] - index < 4) | (index < 2)) & (index[:, None] >= index))
    assert torch.equal(near, ~(found["linear"] > 0) & torch.ones(12, 12, dtype=torch.bool).tril())
    assert ((found["both"] > 0) == (found["window"] + found["linear"] > 0)).all()


def run_weights(module, q, k, v):
    return module.reference(q, k, v, mask=AttentionMask(1, 12, 12, causal=True), scale=SCALE, dropout=0.0)[1]


def test_scores_are_made_for_the_window_only():
    for causal, sides in ((True, 1), (False, 2)):
        mask = AttentionMask(1, 4096, 4096, causal=causal)
        run(attention(window_size=100), *tensors(4096), mask)
        tiles = mask.memo[Band(100, 99, num_first=4)]
        beside = [0 if tile.extra is None else tile.extra.shape[1] for tile in tiles]
        assert max(beside) == 4
        pairs = sum(
            (t.queries.stop - t.queries.start) * (t.keys[0].stop - t.keys[0].start + extra)
            for t, extra in zip(tiles, beside, strict=True)
        )
        assert pairs <= 4096 * (4 + sides * 100 + ROWS)


def test_states_with_other_windows_and_sinks_share_a_mask():
    """Layers of a model do: what one has worked out of the mask is not another's."""
    q, k, v = tensors(30)
    whole = AttentionMask(1, 30, 30, causal=True)
    modules = [attention(window_size=w, num_sink_tokens=s) for w, s in ((5, 4), (7, 4), (7, 2), (5, 0))]
    states = [module.new_state() for module in modules]
    for start, stop in ((0, 12), (12, 29), (29, 30)):
        mask = AttentionMask(1, stop - start, stop, causal=True)
        for module, state in zip(modules, states, strict=True):
            new = [x[:, :, start:stop] for x in (q, k, v)]
            got = module.attend_from(*new, state=state, mask=mask, scale=SCALE, dropout=0.0)
            torch.testing.assert_close(got, run(module, q, k, v, whole)[:, :, start:stop])


def test_the_state_is_float32_in_half_precision():
    module, (q, k, v) = attention(torch.bfloat16, window_size=16), tensors(4096, dtype=torch.bfloat16)
    v, mask = v + 0.5, AttentionMask(1, 4096, 4096, causal=True)
    got = run(module, q, k, v, mask)
    want = run(module.double(), q.double(), k.double(), v.double(), mask)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() / want.norm() < 4e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size=0; allowed: an integer from 1 on"),
        ({"num_sink_tokens": -1}, "num_sink_tokens=-1; allowed: None or an integer from 0 on"),
        ({"chunk_size": 0}, "chunk_size=0; allowed: an integer from 1 on"),
        ({"eps": 0.0}, "eps=0.0; allowed: a number above 0"),
        ({"branch": "none"}, "branch='none'; allowed: 'both', 'window', 'linear'"),
        ({"feature_map": "favor"}, "feature_map='favor'; allowed: 'hedgehog', 'elu', "),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LinearWindowAttention.Config(**options)


def test_needs_the_sizes_of_the_heads():
    with pytest.raises(ValueError, match="'linear_window' has weights a head and needs the sizes of the heads"):
        LinearWindowAttention(LinearWindowAttention.Config())


def test_what_an_earlier_version_learned_can_be_carried_over():
    """As the refusal says: numbers are from when the window had the factor sigmoid(window_gate), and no sinks."""
    heads = HeadShape(num_heads=2, num_key_value_heads=1, head_dim=4, value_dim=4)
    config = LinearWindowAttention.Config(window_size=3, chunk_size=4, num_sink_tokens=0)
    module = LinearWindowAttention(config, heads).double()
    window_gate = torch.tensor([-2.0, 0.5], dtype=torch.float64)
    with torch.no_grad():
        module.log_linear_factor.copy_(softplus(-window_gate))
        for weight in (module.query_weight, module.key_weight):
            weight.copy_(torch.arange(weight.numel()).view_as(weight) % 5 * 0.1)
    waves = [
        torch.sin(torch.arange(n * 32, dtype=torch.float64) * step).view(1, n, 8, 4)
        for n, step in ((2, 0.7), (1, 1.3), (1, 2.1))
    ]
    mask = AttentionMask(1, 8, 8, causal=True)
    got = module.attend(*waves, mask=mask, scale=0.5, dropout=0.0)[0, :, -1]
    want = [
        [0.15588466774734064, 0.0020067845566627924, -0.15791090247974413, 0.15743462342483167],
        [0.17564434798213763, -0.09234533097244467, -0.0824039867432906, 0.17554799439414132],
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_rules_of_an_earlier_version_are_refused():
    saved = {"type": "linear_window", "window_size": 64, "feature_map": "hedgehog", "branch": "both"}
    saved |= {"chunk_size": 64, "eps": 1e-06, "feature_dim": 16}
    with pytest.raises(ValueError, match=r"\('linear_window'\) was saved .* num_sink_tokens: 0 .* softplus"):
        parse_rules([{**saved, "layers": "every:2"}])
    assert parse_rules({**saved, "num_sink_tokens": 0})[0].config.num_sink_tokens == 0
    assert parse_rules("linear_window", window_size=64)[0].config.settled(None).num_sink_tokens == 4
