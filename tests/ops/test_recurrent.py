"""Retention, gated linear attention and the delta rules: the formulas, their three forms, and published code."""

import functools
import sys

import pytest
import torch
from cases import assert_same
from torch.nn.functional import logsigmoid, scaled_dot_product_attention, softplus

from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops import sizes
from attn_plugins.ops.recurrent import chunked as recurrence
from attn_plugins.ops.recurrent.attention import RecurrentAttention
from attn_plugins.ops.recurrent.chunked import Tokens

NAMES = ["retention", "gated_linear", "delta", "gated_delta", "kimi_delta"]
GATED = ["gated_linear", "gated_delta", "kimi_delta"]
SCALE = 0.3
every_name = pytest.mark.parametrize("name", NAMES)
both_forms = pytest.mark.parametrize("form", ["attend", "attend_batched"])


def attention(name, num_heads=4, groups=2, size=8, value_dim=6, *, dtype=torch.float64, noise=0.3, **options):
    cls = get_attention(name)
    shape = {"num_heads": num_heads, "num_key_value_heads": groups, "head_dim": size, "value_dim": value_dim}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = cls(cls.Config(**options), HeadShape(**shape))
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(noise * torch.randn(weight.shape))
    return module.to(dtype)


def tensors(batch, queries, keys, num_heads=4, groups=2, size=8, value_dim=6, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_heads, queries, size), (groups, keys, size), (groups, keys, value_dim))
    return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(module, q, k, v, mask=None, *, form="attend", **options):
    if mask is None:
        mask = AttentionMask(q.shape[0], q.shape[2], k.shape[2], causal=True, **options)
    out = getattr(module, form)(q, k, v, mask=mask, scale=SCALE, dropout=0.0)
    return out[0] if form == "reference" else out


def outcome_of(module, inputs, mask, cotangent, form="attend"):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(module, *leaves, mask, form=form).transpose(1, 2)
    names = ["q", "k", "v", *(name for name, _ in module.named_parameters())]
    gradients = torch.autograd.grad(out, [*leaves, *module.parameters()], cotangent)
    return {"out": out.detach(), **{f"gradient to {n}": g for n, g in zip(names, gradients, strict=True)}}


def prepared(module, q, k, v):
    """What the attention hands to the recurrence."""
    prepare = sys.modules[type(module).__module__].tokens
    if module.name == "gated_linear":
        prepare = functools.partial(prepare, normalizer=module.config.gate_logit_normalizer)
    return prepare(q, k, v, *module.parameters(), scale=SCALE)


def gates_of(tokens: Tokens):
    """(B, G, T, F or 1), written out."""
    batch, heads, length, _ = tokens.k.shape
    log_gate = tokens.k.new_zeros(1, 1, 1, 1) if tokens.log_gate is None else tokens.log_gate
    return log_gate.expand(batch, heads, length, -1)


def counts(log_gate):
    """The decayed number of tokens, n_t = e^g_t n_{t-1} + 1."""
    n, rows = torch.zeros_like(log_gate[:, :, 0]), []
    for t in range(log_gate.shape[2]):
        n = log_gate[:, :, t].exp() * n + 1
        rows.append(n)
    return torch.stack(rows, dim=2)


def recurrent(tokens: Tokens):
    """Token by token, with values in the state."""
    log_gate, group = gates_of(tokens), tokens.q.shape[1] // tokens.k.shape[1]
    state = tokens.k.new_zeros(*tokens.k.shape[:2], tokens.k.shape[3], tokens.v.shape[3])
    total, rows = torch.zeros_like(tokens.v[:, :, 0]), []
    n = counts(log_gate)
    for t in range(tokens.k.shape[2]):
        k, v, gate = tokens.k[:, :, t, :, None], tokens.v[:, :, t, None, :], log_gate[:, :, t, :, None].exp()
        gate, last = gate[:, :, : tokens.k.shape[3]], gate[:, :, -1]
        q = tokens.q[:, :, t].unflatten(1, (-1, group))
        if tokens.beta is None:
            state = gate * state + k * v
            rows.append(((q / n[:, :, t, None]) @ state).flatten(1, 2))
        else:
            state = gate * state
            state = state + tokens.beta[:, :, t, None] * k * (v - k.mT @ state)
            total = last * total + v[..., 0, :]
            average = (total / n[:, :, t, -1:]).repeat_interleave(group, dim=1)
            rows.append((q @ state).flatten(1, 2) + tokens.average_weight[:, None] * average)
    return torch.stack(rows, dim=2)


def quadratic(tokens: Tokens):
    """Through T x T matrices, one channel at a time."""
    log_gate, group = gates_of(tokens), tokens.q.shape[1] // tokens.k.shape[1]
    k, v, log_gate = (x.repeat_interleave(group, dim=1) for x in (tokens.k, tokens.v, log_gate))
    length, features = k.shape[2:]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    since, n = log_gate.cumsum(2, dtype=torch.float64).to(k.dtype), counts(log_gate)

    def between(channel):
        exponent = since[..., channel].unsqueeze(3) - since[..., channel].unsqueeze(2)
        return exponent.masked_fill_(future, -torch.inf).exp_()

    def read(a):
        if log_gate.shape[3] == 1:
            return a @ k.mT * between(0)
        return sum(a[..., c : c + 1] @ k[..., c : c + 1].mT * between(c) for c in range(features))

    if tokens.beta is None:
        return read(tokens.q / n) @ v
    beta = tokens.beta.repeat_interleave(group, dim=1)
    written = torch.linalg.solve_triangular(beta * read(k), beta * v, upper=False, unitriangular=True)
    return read(tokens.q) @ written + tokens.average_weight[:, None, None] * (between(-1) / n[..., -1:]) @ v


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@every_name
def test_equals_the_formula_of_its_docstring(name):
    options = {"initial_memory": 5.0} if name in GATED else {}
    module, (q, k, v) = attention(name, **options), tensors(1, 11, 11)
    out = run(module, q, k, v)
    with torch.no_grad():
        for head in range(4):
            group = head // 2
            a, b = module.score_weight[head], module.average_weight[head]
            for t in range(11):
                want = torch.zeros(6, dtype=torch.float64)
                query, keys, values = q[0, head, t], k[0, group, : t + 1], v[0, group, : t + 1]
                if name == "retention":
                    fade = (1 - 2.0 ** (-5 - head)) ** torch.arange(t, -1, -1)
                    want = (fade * (a * SCALE * keys @ query + b)) @ values / fade.sum()
                elif name == "gated_linear":
                    logits = values @ module.gate_down_weight[group].T @ module.gate_up_weight[group].T
                    gates = (logsigmoid(logits + module.gate_bias[group]) / 16).exp()
                    state, n = torch.zeros(9, 6, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
                    for j in range(t + 1):
                        key = torch.cat([keys[j], torch.ones(1)])
                        state = gates[j][:, None] * state + key[:, None] * values[j]
                        n = gates[j] * n + 1
                    want = (torch.cat([a * SCALE * query, b[None]]) / n) @ state
                else:
                    state, total, n = torch.zeros(8, 6, dtype=torch.float64), want, 0.0
                    for key, value in zip(unit(keys), values, strict=True):
                        beta = torch.sigmoid(module.beta_weight[group] @ value + module.beta_bias[group])
                        if name != "delta":
                            weight = (
                                module.gate_weight[group]
                                if name == "gated_delta"
                                else (module.gate_up_weight[group] @ module.gate_down_weight[group])
                            )
                            dt = softplus(weight @ value + module.dt_bias[group])
                            gates = torch.exp(-module.A_log[group].exp() * dt).expand(9)
                            state, total, n = gates[:8, None] * state, gates[8] * total, gates[8] * n
                        state = state - beta * torch.outer(key, key @ state - value)
                        total, n = total + value, n + 1
                    want = a * SCALE * unit(query) @ state + b * total / n
                torch.testing.assert_close(out[0, head, t], want)


@every_name
def test_recurrent_chunked_and_quadratic_forms_agree_over_4096_tokens(name):
    options = {"initial_memory": 300.0} if name in GATED else {}
    module = attention(name, 1, 1, 4, 4, dtype=torch.float32, noise=0.1, **options)
    q, k, v = tensors(1, 4096, 4096, 1, 1, 4, 4, dtype=torch.float32)
    with torch.no_grad():
        chunked, tokens = run(module, q, k, v), prepared(module, q, k, v)
        token_by_token, matrix = recurrent(tokens), quadratic(tokens)
    assert chunked.dtype == token_by_token.dtype == matrix.dtype == torch.float32
    torch.testing.assert_close(chunked, token_by_token, rtol=0, atol=1e-5)
    torch.testing.assert_close(chunked, matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [32, 64])
def test_corrections_of_keys_that_are_alike_keep_their_digits(chunk_size):
    """Each then corrects what the last one wrote. The terms of a power series of such a chunk grow to 2^chunk_size."""
    module = attention("delta", 1, 1, initial_beta=0.995, chunk_size=chunk_size, noise=0.0)
    q, k, v = tensors(1, 150, 150, 1, 1)
    k = k[:, :, :1] + 0.01 * k
    cotangent = torch.randn(1, 150, 1, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want = outcome_of(module, (q, k, v), None, cotangent, "reference")
    single = outcome_of(module.float(), [x.float() for x in (q, k, v)], None, cotangent.float())
    for name, x in single.items():
        torch.testing.assert_close(x.double(), want[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@both_forms
@every_name
def test_neither_chunks_nor_spans_change_anything(monkeypatch, name, form):
    q, k, v = tensors(2, 45, 45)
    padding = torch.arange(45) >= torch.tensor([[0], [20]])
    segments = torch.bucketize(torch.arange(45), torch.tensor([9, 10, 30]), right=True).expand(2, -1)
    cotangent = torch.randn(2, 45, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for pad, packed in ((None, None), (padding, None), (padding, segments)):
        seen = []
        for chunk_size, rows in ((1, 32), (4, 64), (16, 1), (64, 1 << 12)):
            monkeypatch.setitem(recurrence.ROWS_A_SPAN, "cpu", rows)
            monkeypatch.setitem(sizes.SCORES_AT_ONCE, "cpu", 4 * 8 * rows)
            module = attention(name, chunk_size=chunk_size)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = run(module, *leaves, form=form, padding_BK=pad, segments_BK=packed).transpose(1, 2)
            seen.append([out, *torch.autograd.grad(out, [*leaves, *module.parameters()], cotangent)])
        for other in seen[1:]:
            torch.testing.assert_close(other, seen[0], rtol=1e-10, atol=1e-10)


@both_forms
@pytest.mark.parametrize("name", GATED)
def test_strong_decay_neither_overflows_nor_loses_what_follows(name, form):
    # Every fifth token wipes the state: sums of log gates fall by thousands within a chunk.
    module, (q, k, v) = attention(name, noise=0.0, dtype=torch.float32), tensors(1, 90, 90, dtype=torch.float32)
    v[..., 0] = torch.where(torch.arange(90) % 5 == 4, 1.0, 0.0)
    with torch.no_grad():
        if name != "gated_delta":
            module.gate_down_weight.zero_()[:, 0, 0] = 1.0
            module.gate_up_weight[:, :, 0] = -50000.0 if name == "gated_linear" else 4000.0
        else:
            module.gate_weight[:, 0] = 4000.0
    mask, cotangent = AttentionMask(1, 90, 90, causal=True), torch.ones(1, 90, 4, 6)
    tokens = prepared(module, q, k, v)
    assert tokens.log_gate.min() < -2000
    got = run(module, q, k, v, mask, form=form)
    torch.testing.assert_close(got, recurrent(tokens), rtol=1e-5, atol=1e-6)
    for what, tensor in outcome_of(module, (q, k, v), mask, cotangent, form).items():
        assert tensor.isfinite().all(), f"{what} is not finite"


@every_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_stay_float32_under_half_precision(monkeypatch, name, dtype):
    states, scan = set(), recurrence.scan

    def spy(step, span, state, sequences, weights):
        def watched(state, parts, weights):
            out, after = step(state, parts, weights)
            states.update((state.dtype, after.dtype))
            return out, after

        return scan(watched, span, state, sequences, weights)

    monkeypatch.setattr(recurrence, "scan", spy)
    monkeypatch.setitem(recurrence.ROWS_A_SPAN, "cpu", 64)
    module = attention(name, 1, 1, 16, 16, dtype=dtype, noise=0.1)
    q, k, v = tensors(1, 4096, 4096, 1, 1, 16, 16, dtype=dtype)
    got = run(module, q, k, v + 0.5)
    assert states == {torch.float32}
    assert got.dtype == dtype
    want = run(module.double(), q.double(), k.double(), (v + 0.5).double())
    assert (got - want).norm() / want.norm() < {torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@every_name
def test_autocast_does_not_reach_the_recurrence(name):
    module, given = attention(name, dtype=torch.float32), tensors(1, 50, 50, dtype=torch.float32)
    cotangent, mask, seen = torch.ones(1, 50, 4, 6), AttentionMask(1, 50, 50, causal=True), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            seen.append(outcome_of(module, given, mask, cotangent))
    assert_same(seen[1], seen[0], 0.0)


@both_forms
@every_name
def test_autograd_keeps_the_inputs_and_one_state_a_span(monkeypatch, name, form):
    monkeypatch.setitem(recurrence.ROWS_A_SPAN, "cpu", 256)
    monkeypatch.setitem(sizes.SCORES_AT_ONCE, "cpu", 256 * 4 * 16)
    module, given = attention(name, 1, 1, 8, 8, chunk_size=16), tensors(1, 2048, 2048, 1, 1, 8, 8)
    leaves = [x.requires_grad_() for x in given]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(module, *leaves, form=form)
    inputs, states = 3 * 2048 * 8, 2048 // 256 * 9 * 9
    weights = sum(weight.numel() for weight in module.parameters())
    assert inputs < sum(kept.values()) <= inputs + states + 2 * weights


@both_forms
@every_name
def test_huge_values_of_one_packed_sequence_leave_no_trace_in_another(name, form):
    module, (q, k, v) = attention(name, dtype=torch.float32, chunk_size=8), tensors(1, 60, 60, dtype=torch.float32)
    segments = (torch.arange(60) >= 21).long().unsqueeze(0)
    before = run(module, q, k, v, form=form, segments_BK=segments)
    huge = torch.where(segments[0, :, None] == 0, 1e20 * v, v)
    assert torch.equal(run(module, q, k, huge, form=form, segments_BK=segments)[:, :, 21:], before[:, :, 21:])


@every_name
def test_padding_between_real_tokens_neither_enters_nor_decays(name):
    # As a prompt padded on the right and then continued: the distance counts real tokens.
    module, (q, k, v) = attention(name, chunk_size=4), tensors(1, 30, 30)
    real = torch.ones(30, dtype=torch.bool)
    real[[0, 7, 8, 9, 20]] = False
    want = run(module, q[:, :, real], k[:, :, real], v[:, :, real])
    for form in ("attend", "attend_batched", "reference"):
        got = run(module, q, k, v, form=form, padding_BK=real.unsqueeze(0))
        torch.testing.assert_close(got[:, :, real], want)


@every_name
def test_room_for_keys_to_come_is_not_read(name):
    module, (q, k, v) = attention(name, chunk_size=4), tensors(1, 20, 64)
    padding = torch.arange(64).unsqueeze(0) >= 2
    fixed = AttentionMask(1, 20, 64, causal=True, padding_BK=padding, q_offset=13)
    for form in ("attend", "attend_batched", "reference"):
        got = run(module, q, k, v, fixed, form=form)
        want = run(module, q, k[:, :, :33], v[:, :, :33], form=form, padding_BK=padding[:, :33])
        torch.testing.assert_close(got, want)
        with pytest.raises(ValueError, match="20 queries from key 50 on; allowed: queries within 64 keys"):
            run(module, q, k, v, AttentionMask(1, 20, 64, causal=True, q_offset=50), form=form)


@every_name
def test_packed_sequences_in_pieces_are_refused(name):
    module, (q, k, v) = attention(name), tensors(1, 40, 40)
    segments = torch.zeros(1, 40, dtype=torch.long)
    segments[0, 10:20] = 1
    for form in ("attend", "reference"):
        with pytest.raises(ValueError, match="row 0 has 2 packed sequences in 3 pieces"):
            run(module, q, k, v, form=form, segments_BK=segments)


@pytest.mark.parametrize(
    ("name", "at_most"),
    [("retention", 0.95), ("gated_linear", 0.98), *((name, 0.7 if name == "delta" else 0.85) for name in NAMES[2:])],
)
def test_starts_better_than_zeros_and_than_a_plain_average(name, at_most):
    """Where scores are as in a pretrained model: far from small, half of each softmax with a sink that has no value."""
    q, k, _ = tensors(1, 512, 512, 4, 4, 64, 64, dtype=torch.float32)
    k = 2 * k
    v = torch.tanh(k @ torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1)) / 8)
    q[..., 0], k[..., 0] = torch.arange(1, 513).log() + 2.0, 0.0  # as the sum of e^s over others, of variance 4
    k[:, :, 0], v[:, :, 0] = 8.0 * torch.eye(64)[0], 0.0
    average = v.cumsum(2) / torch.arange(1, 513).view(-1, 1)
    module = attention(name, 4, 4, 64, 64, dtype=torch.float32, noise=0.0)
    out = module.attend(q, k, v, mask=AttentionMask(1, 512, 512, causal=True), scale=0.125, dropout=0.0)
    want = scaled_dot_product_attention(q, k, v, is_causal=True)
    error, plain = ((x - want).square().sum() / want.square().sum() for x in (out, average))
    assert error < at_most < 1 < plain


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("memory", [2.0, 4096.0])
def test_gates_start_with_the_memory_asked_for(name, memory):
    module, given = attention(name, noise=0.0, initial_memory=memory), tensors(1, 9, 9)
    gates = prepared(module, *given).log_gate
    torch.testing.assert_close(gates, torch.full_like(gates, -1 / memory), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NAMES[2:])
def test_rates_start_as_asked_for(name):
    beta = prepared(attention(name, noise=0.0, initial_beta=0.25), *tensors(1, 9, 9)).beta
    torch.testing.assert_close(beta, torch.full_like(beta, 0.25), rtol=1e-6, atol=0)


def test_scan_passes_gradients_through_states_weights_and_spans():
    generator = torch.Generator().manual_seed(0)
    state, x, w = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3), (2, 1, 7, 3), (3,))
    )

    def step(state, parts, weights):
        nothing, x = parts
        assert nothing is None
        outs = []
        for t in range(x.shape[2]):
            state = torch.tanh(state * weights[0] + x[:, 0, t])
            outs.append(state)
        return torch.stack(outs, dim=1).unsqueeze(1), state

    def joined(span):
        return lambda state, x, w: recurrence.scan(step, span, state, [None, x], [w])

    for span in (2, 3, 7, 10):
        torch.testing.assert_close(joined(span)(state, x, w), step(state, [None, x], [w]))
        assert torch.autograd.gradcheck(joined(span), (state, x, w))
    frozen = joined(3)(state.detach(), x, w.detach())
    (got,) = torch.autograd.grad(frozen[0].sum(), x)
    (want,) = torch.autograd.grad(step(state, [None, x], [w])[0].sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (NAMES, {"chunk_size": 0}, "chunk_size=0; allowed: a power of two from 1 on"),
        (NAMES, {"chunk_size": 48}, "chunk_size=48; allowed: a power of two from 1 on"),
        (GATED, {"initial_memory": 0.0}, "initial_memory=0.0; allowed: a number above 0"),
        (NAMES[2:], {"initial_beta": 1.0}, "initial_beta=1.0; allowed: a number between 0 and 1"),
        (GATED[::2], {"gate_low_rank_dim": 0}, "gate_low_rank_dim=0; allowed: an integer from 1 on"),
        (["gated_linear"], {"gate_logit_normalizer": 0.0}, "gate_logit_normalizer=0.0; allowed: a number above 0"),
    ],
)
def test_bad_options_are_refused(names, options, message):
    for name in names:
        with pytest.raises(ValueError, match=message):
            get_attention(name).Config(**options)


@every_name
def test_needs_the_sizes_of_the_heads(name):
    cls = get_attention(name)
    with pytest.raises(ValueError, match=f"'{name}' has weights a head and needs the sizes of the heads, got None"):
        cls(cls.Config())


@every_name
def test_a_prompt_in_a_state_goes_by_the_form_that_was_asked_for(monkeypatch, name):
    module, (q, k, v) = attention(name, chunk_size=4), tensors(2, 30, 30)
    want, module.backend = run(module, q, k, v), "batched"
    monkeypatch.setattr(sys.modules[RecurrentAttention.__module__], "IN_ORDER", None)
    state, outs = module.new_state(), []
    for start, stop in ((0, 11), (11, 29), (29, 30)):
        mask, new = AttentionMask(2, stop - start, stop, causal=True), (x[:, :, start:stop] for x in (q, k, v))
        outs.append(module.attend_from(*new, state=state, mask=mask, scale=SCALE, dropout=0.0))
    torch.testing.assert_close(torch.cat(outs, dim=2), want)
