"""Patterns as calls of a fused kernel, with kernels for a CPU in place of that for CUDA; and how that one is called."""

import pytest
import torch
from cases import (
    CASES,
    Case,
    assert_forms_agree,
    cotangent_for,
    inputs,
    left_padding,
    outcome,
    rounds,
    seeded,
)

from attn_plugins.backends import flash
from attn_plugins.backends.flash import Flash
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops.reference import accumulation_dtype
from attn_plugins.ops.softmax import fused_calls
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.fused_calls import Call, Kernel, Rows


def pairs(call):
    """(queries, keys) bool: what the kernel shows, places counted from the ends of sequences as it does."""

    def told(rows):
        lengths = rows.bounds_L.diff().long()
        assert lengths.amax() <= rows.longest
        of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return of, torch.arange(len(of)) - rows.bounds_L[1:].long()[of], lengths

    (of_q, q, q_lengths), (of_k, k, k_lengths) = told(call.queries), told(call.keys)
    assert ((q_lengths == 0) == (k_lengths == 0)).all(), "gradients of keys without queries would be left unwritten"
    before, after = (-1 if x >= call.keys.longest else x for x in call.window)
    distance = k.unsqueeze(0) - q.unsqueeze(1)
    seen = of_q.unsqueeze(1) == of_k.unsqueeze(0)
    if before >= 0:
        seen &= distance >= -before
    return seen & (distance <= after) if after >= 0 else seen


def scores(q_THD, k_TGD, call, scale):
    k_THD = k_TGD.repeat_interleave(q_THD.shape[1] // k_TGD.shape[1], dim=1)
    assert (q_THD.stride(2), k_TGD.stride(2), q_THD.shape[2] % 8) == (1, 1, 0)
    return (torch.einsum("qhd,khd->hqk", q_THD, k_THD) * scale).masked_fill(~pairs(call), -torch.inf), k_THD


def dense_forward(q_THD, k_TGD, v_TGD, call, scale):
    dtype = accumulation_dtype(q_THD)
    s_HQK, _ = scores(q_THD.to(dtype), k_TGD.to(dtype), call, scale)
    lse_HQ = s_HQK.logsumexp(dim=2)
    v_THD = v_TGD.to(dtype).repeat_interleave(q_THD.shape[1] // v_TGD.shape[1], dim=1)
    out_THD = torch.einsum("hqk,khd->qhd", torch.exp(s_HQK - lse_HQ.unsqueeze(2)), v_THD).to(q_THD.dtype)
    assert lse_HQ.isfinite().all(), "a query sees no key"
    return out_THD, lse_HQ, ("known", call)


def dense_backward(dout_THD, q_THD, k_TGD, v_TGD, out_THD, lse_HT, known, call, scale):
    """By the given output and logarithm of sums alone, as fused kernels do it."""
    assert known == ("known", call)
    assert all(x.is_contiguous() for x in (dout_THD, out_THD, lse_HT))
    assert lse_HT.shape == q_THD.shape[1::-1]
    dtype, group = q_THD.dtype, q_THD.shape[1] // v_TGD.shape[1]
    dout_THD, q_THD, k_TGD, v_TGD, out_THD = (x.to(lse_HT.dtype) for x in (dout_THD, q_THD, k_TGD, v_TGD, out_THD))
    s_HQK, k_THD = scores(q_THD, k_TGD, call, scale)
    p_HQK = torch.exp(s_HQK - lse_HT.unsqueeze(2))
    dp_HQK = torch.einsum("qhd,khd->hqk", dout_THD, v_TGD.repeat_interleave(group, dim=1))
    ds_HQK = p_HQK * (dp_HQK - (dout_THD * out_THD).sum(dim=2).T.unsqueeze(2)) * scale
    dk, dv = torch.einsum("hqk,qhd->khd", ds_HQK, q_THD), torch.einsum("hqk,qhd->khd", p_HQK, dout_THD)
    dk, dv = (x.unflatten(1, (-1, group)).sum(dim=2) for x in (dk, dv))
    return tuple(x.to(dtype) for x in (torch.einsum("hqk,khd->qhd", ds_HQK, k_THD), dk, dv))


def _of_heads(x_TGD, heads):
    return x_TGD.repeat_interleave(heads // x_TGD.shape[1], dim=1).transpose(0, 1).unsqueeze(0)


def cpu_forward(q_THD, k_TGD, v_TGD, call, scale):
    heads, seen = q_THD.shape[1], pairs(call)
    bias = torch.zeros(seen.shape, dtype=q_THD.dtype).masked_fill(~seen, -1e30)[None, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_of_heads(x, heads) for x in (q_THD, k_TGD, v_TGD)), 0.0, False, attn_mask=bias, scale=scale
    )
    return out[0].transpose(0, 1), lse[0], bias


def cpu_backward(dout_THD, q_THD, k_TGD, v_TGD, out_THD, lse_HT, bias, call, scale):
    heads, groups = q_THD.shape[1], k_TGD.shape[1]
    tensors = (_of_heads(x, heads) for x in (dout_THD, q_THD, k_TGD, v_TGD, out_THD))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse_HT.unsqueeze(0), 0.0, False, attn_mask=bias, scale=scale
    )
    dq, dk, dv = (x[0].transpose(0, 1) for x in found)
    return dq, *(x.unflatten(1, (groups, -1)).sum(dim=2) for x in (dk, dv))


@pytest.fixture
def on_cpu(monkeypatch):
    """The backend for CPU tensors, with the definition of a kernel as its kernel, and few queries in a piece."""
    monkeypatch.setattr(Flash, "devices", ("cpu",))
    monkeypatch.setattr(Flash, "dtypes", (torch.float64, torch.float32, torch.bfloat16))
    monkeypatch.setattr(Flash, "kernel", Kernel(dense_forward, dense_backward))
    monkeypatch.setattr(Flash, "missing", lambda self: None)
    monkeypatch.setattr(fused_calls, "PIECE", 8)


OPTIONS = [
    ("local", {"window_size": 5, "look_forward": 2}),
    ("local", {"window_size": 4, "num_sink_tokens": 3}),
    ("local", {"window_size": 2, "num_sink_tokens": 5, "look_forward": 1}),
    ("local", {"window_size": 3, "dilation": 3, "num_sink_tokens": 0}),
    ("local", {}),
    ("longformer", {"window_size": 4, "num_global_tokens": 2}),
    ("longformer", {"window_size": 2, "num_global_tokens": 5}),
    ("longformer", {"window_size": 3, "num_global_tokens": 0}),
    ("block_local", {"block_size": 5, "look_backward": 0, "look_forward": 0, "num_sink_tokens": 0}),
    ("block_local", {"block_size": 5, "look_backward": 0, "look_forward": 0, "num_sink_tokens": 5}),
    ("shifted_block", {"group_size": 6, "num_sink_tokens": 3}),
    ("shifted_block", {"group_size": 5, "num_sink_tokens": 0}),
    ("shifted_block", {"group_size": 7, "num_sink_tokens": 1}),
]


def cases():
    return [Case(get_attention(name), options, causal) for name, options in OPTIONS for causal in (True, False)]


def packed(*lengths):
    return torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)])


MASKS = {
    "one token": (1, {}),
    "plain": (37, {}),
    "left padding": (37, {"padding_BK": left_padding([37, 22], 37)}),
    "right padding": (37, {"padding_BK": left_padding([37, 9], 37).flip(1)}),
    "a row of padding": (12, {"padding_BK": left_padding([12, 0], 12)}),
    "packed": (37, {"segments_BK": torch.stack([packed(9, 20, 8), packed(1, 1, 35)])}),
    "packed, each row alike": (37, {"segments_BK": packed(12, 12, 13).unsqueeze(0)}),
    "packed, then padding": (
        37,
        {
            "segments_BK": torch.stack([packed(9, 20, 8), packed(30, 7)]),
            "padding_BK": left_padding([37, 30], 37).flip(1),
        },
    ),
}
every_mask = rounds("length, tables", list(MASKS.values()))


@every_mask
@pytest.mark.parametrize("case", cases(), ids=str)
def test_equals_reference(on_cpu, case, length, tables):
    """Outputs, and gradients with grouped heads and learned sinks."""
    for heads, groups, with_sinks in ((4, 2, False), (3, 1, True)):
        given = inputs(2, length, num_heads=heads, num_key_value_heads=groups)
        if with_sinks:
            given.extras = {"sinks": torch.randn(heads, generator=seeded(2), dtype=torch.float64)}
        shape = {"num_heads": heads, "num_key_value_heads": groups}
        assert_forms_agree(case, given, case.mask(2, length, length, **tables), backend="flash", **shape)


@every_mask
def test_equals_reference_by_the_fused_kernel_of_cpus(on_cpu, monkeypatch, length, tables):
    """Its backward takes output and logarithm as they are given, as those for GPUs do."""
    monkeypatch.setattr(Flash, "kernel", Kernel(cpu_forward, cpu_backward))
    for case in cases():
        assert_forms_agree(case, inputs(2, length), case.mask(2, length, length, **tables), backend="flash")


@rounds("batch", [1, 3])
def test_a_batch_without_padding_is_many_sequences(on_cpu, batch):
    for case in cases():
        assert_forms_agree(case, inputs(batch, 23), case.mask(batch, 23, 23), backend="flash")


def test_head_sizes_are_filled_up(on_cpu):
    shape = {"head_dim": 6, "value_dim": 11}
    for case in cases()[2:4]:
        assert_forms_agree(case, inputs(1, 23, **shape), case.mask(1, 23, 23), backend="flash", **shape)


def test_half_precision(on_cpu):
    for case in cases():
        given = inputs(2, 65).to(torch.bfloat16).to(torch.float64)
        mask = case.mask(2, 65, 65, padding_BK=left_padding([65, 33], 65))
        assert_forms_agree(case, given, mask, backend="flash", dtype=torch.bfloat16, tolerance=1e-2)


def test_a_second_layer_looks_at_no_value(on_cpu, monkeypatch):
    case = cases()[2]
    given = inputs(2, 37)
    mask = case.mask(2, 37, 37, **MASKS["packed, then padding"][1])
    cotangent = cotangent_for(given, mask)
    ((_, pattern),) = case.module().patterns(4, mask)
    assert len(fused_calls.calls_of(mask, pattern)) == 3

    def refuse(*args):
        pytest.fail("a value was asked for")

    q = given.q.detach().requires_grad_()
    for name in ("tolist", "item", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    kernel = Kernel(lambda q, k, v, *_: (q, q.new_zeros(q.shape[1::-1]), None), lambda d, q, k, v, *_: (q, k, v))
    out = fused_calls.fused_attention(q, given.k, given.v, mask, pattern, kernel=kernel, scale=1.0)
    out.backward(cotangent.transpose(1, 2))


def test_torchs_kernel_takes_the_arguments():
    """On a device without values: their names, order and shapes."""
    options = {"device": "meta", "dtype": torch.bfloat16}
    q, k = torch.empty(20, 4, 8, **options), torch.empty(12, 2, 8, **options)
    bounds = torch.empty(4, dtype=torch.int32, device="meta")
    call = Call(Rows(slice(None), bounds, 9), Rows(slice(None), bounds, 5), (3, -1))
    out, lse, known = flash.forward(q, k, k, call, 0.5)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 20), torch.float32)
    found = flash.backward(out, q, k, k, out, lse, known, call, 0.5)
    assert [x.shape for x in found] == [q.shape, k.shape, k.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernel runs on a GPU alone")
@rounds("window", [(-1, -1), (-1, 0), (0, -1), (5, 0), (5, 3), (0, 0), (255, 0), (1023, 1023)])
@rounds("lengths, keys", [([300], [300]), ([100, 1, 57], [100, 1, 57]), ([50, 70], [90, 300]), ([0, 9, 0], [0, 9, 0])])
def test_torchs_kernel_is_what_stands_in_its_place(window, lengths, keys):
    """Windows at their edges, sequences of which some are empty, more keys than queries: values and gradients."""
    generator, options = seeded(3), {"dtype": torch.float64}
    sides = [
        Rows(slice(None), torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32), max(x))
        for x in (lengths, keys)
    ]
    given = [
        torch.randn(sum(n), h, 64, generator=generator, **options) for n, h in ((lengths, 4), (keys, 2), (keys, 2))
    ]
    dout, *given = (x.bfloat16() for x in (torch.randn(given[0].shape, generator=generator, **options), *given))
    call = Call(*sides, window)
    on_gpu = Call(*(side._replace(bounds_L=side.bounds_L.cuda()) for side in sides), window)
    wide, there = [x.float() for x in given], [x.cuda() for x in given]
    want, want_lse, known = dense_forward(*wide, call, 0.125)
    out, lse, known_there = flash.forward(*there, on_gpu, 0.125)
    want_gradients = dense_backward(dout.float(), *wide, want.contiguous(), want_lse.contiguous(), known, call, 0.125)
    gradients = flash.backward(dout.cuda(), *there, out, lse, known_there, on_gpu, 0.125)
    torch.testing.assert_close(lse.cpu(), want_lse, atol=1e-2, rtol=1e-2)
    for got, wanted in zip((out, *gradients), (want, *want_gradients), strict=True):
        torch.testing.assert_close(got.cpu().float(), wanted, atol=2e-2, rtol=2e-2)


def at_most_causal(batch, head, query, key):
    return query >= key


def call(name, options=None, *, causal=True, mask=None, dtype=torch.bfloat16, head_dim=8, **extras):
    cls = get_attention(name)
    given = inputs(2, 20, dtype=dtype, head_dim=head_dim)
    mask = mask or AttentionMask(2, 20, 20, causal=causal)
    return cls(cls.Config(**(options or {})), backend="flash")(
        given.q, given.k, given.v, **{"mask": mask, "scale": 0.4, **extras}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "softmax"}, "it serves softmax attention over a pattern"),
        ({"name": "local", "dtype": torch.float16}, "must all be of one of torch.bfloat16, .* got torch.float16"),
        ({"name": "local", "head_dim": 264}, "head dimensions of at most 256 are served, got 264"),
        ({"name": "local", "dropout": 0.1}, "attention dropout is not served"),
        ({"name": "local", "softcap": 2.0}, "softcap is not served"),
        ({"name": "local", "position_bias": torch.zeros(20, 20)}, "position_bias is not served"),
        ({"name": "local", "options": {"dilation": 2, "num_sink_tokens": 1}}, "a dilated window beside tokens that"),
        ({"name": "block_local", "options": {"num_sink_tokens": 0}}, "blocks that see other blocks are not served"),
        ({"name": "block_local"}, "blocks that see other blocks are not served"),
        (
            {"name": "fixed", "options": {"num_sink_tokens": 4}},
            "tokens that are seen from everywhere, beside the pattern",
        ),
        (
            {"name": "shifted_block", "options": {"group_size": 5, "num_sink_tokens": 4}},
            "more tokens that are seen from everywhere than the first block has are not served",
        ),
        ({"name": "strided", "options": {"num_sink_tokens": 0}}, "the pattern Strided.* is not served"),
        (
            {"name": "local", "mask": AttentionMask(2, 20, 24, causal=True)},
            r"as many queries as keys, got AttentionMask\(B=2, Q=20, K=24",
        ),
        (
            {
                "name": "local",
                "mask": AttentionMask(2, 20, 20, causal=True, plain=False, rule=lambda b, h, q, k: q >= k),
            },
            "it serves causality, padding and packed sequences, got",
        ),
        (
            {"name": "local", "mask": AttentionMask(2, 20, 20, causal=True, padding_BK=packed(5, 5, 10)[None] != 1)},
            "a row has padding within a sequence",
        ),
        (
            {"name": "local", "mask": AttentionMask(2, 20, 20, causal=True, segments_BK=packed(5, 5, 10)[None] % 2)},
            "or a sequence in several pieces",
        ),
    ],
    ids=lambda x: str(x)[:60] if isinstance(x, str) else "",
)
def test_what_it_cannot_honour_is_refused(on_cpu, arguments, message):
    with pytest.raises(ValueError, match=f"backend 'flash' cannot serve this call of attention .*: .*{message}"):
        call(**arguments)


def test_it_says_what_is_missing():
    with pytest.raises(ValueError, match=r"backend 'flash' cannot serve .*: it runs on cuda, not on cpu"):
        call("local")
    if not torch.backends.cuda.is_flash_attention_available():
        assert "install a build of torch for CUDA" in Flash().missing()


def test_every_pattern_is_served_or_refused(on_cpu):
    served = set()
    for case in CASES:
        if not issubclass(case.cls, PatternAttention):
            continue
        given, mask, module = inputs(2, 20), case.mask(2, 20, 20), case.module(backend="flash")
        options = {"mask": mask, "scale": 0.4}
        reason = Flash().refuses(module, given.q, given.k, given.v, **options)
        if reason is None:
            served.add(case.cls.name)
            outcome(module, given, mask, cotangent_for(given, mask))
        else:
            assert "not served" in reason
    assert {"local", "longformer", "block_local", "shifted_block"} >= served >= {"local", "longformer", "shifted_block"}
