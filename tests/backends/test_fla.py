"""The backend fla, without the library: what it serves, and that what it asks of kernels gives what is promised.

Naive functions stand in for the kernels, token by token, with the arguments that these take.
"""

import itertools

import pytest
import torch
from cases import CASES, assert_forms_agree, inputs, left_padding, rounds

from attn_plugins.backends import fla
from attn_plugins.core.backend import get_backend, why_not
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.linear.attention import FeatureAttention
from attn_plugins.ops.recurrent.attention import RecurrentAttention

WRONG_WITH_GATES = fla._wrong_with_gates.__wrapped__
FLA = {"backend": "fla", "dtype": torch.float32, "tolerance": 2e-5}


def is_served(case):
    exponential = getattr(case.module().phi, "exponential", False) if issubclass(case.cls, FeatureAttention) else False
    return issubclass(case.cls, (RecurrentAttention, FeatureAttention)) and case.causal and not exponential


SERVED, DEFAULTS = (
    pytest.mark.parametrize(
        "case", [case for case in CASES if is_served(case) and (every or not case.options)], ids=str
    )
    for every in (True, False)
)


def spans(length, cu_seqlens):
    limits = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(limits)]


def recurrence(q, k, v, g=None, beta=None, *, scale, cu_seqlens=None, cu_seqlens_cpu=None):
    """The definition of every rule that is taken: g is (B, T, H) or (B, T, H, K)."""
    assert q.shape[:3] == k.shape[:3] == v.shape[:3]
    assert q.dtype == k.dtype == v.dtype
    assert all(x.is_contiguous() and x.shape[-1] % 16 == 0 for x in (q, k, v))
    assert cu_seqlens is None or (len(q) == 1 and cu_seqlens.equal(cu_seqlens_cpu))
    dtype, out = q.dtype, []
    q, k, v = q.float(), k.float(), v.float()
    for span in spans(q.shape[1], cu_seqlens):
        state = q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3])
        for t in range(span.start, span.stop):
            if g is not None:
                assert g.isfinite().all()
                gate = g[:, t] if g.ndim == 4 else g[:, t].unsqueeze(-1)
                state = state * gate.exp().unsqueeze(-1)
            new = v[:, t]
            if beta is not None:
                new = beta[:, t].unsqueeze(-1) * (new - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
            state = state + k[:, t].unsqueeze(-1) * new.unsqueeze(-2)
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(out, dim=1).to(dtype), None


def hgrn(x, g):
    state, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = g[:, t].exp() * state + x[:, t]
        out.append(state)
    return torch.stack(out, dim=1), None


@pytest.fixture
def naive(monkeypatch):
    """The backend runs on CPU tensors, on naive functions."""

    def simple(q, k, v, g=None, **options):
        assert g is None or g.ndim == 3
        return recurrence(q, k, v, g, **options)

    def delta_rule(q, k, v, beta, **options):
        assert q.dtype != torch.float32, "the library refuses it"
        return recurrence(q, k, v, None, beta, **options)

    def simple_delta(q, k, v, g, beta, **options):
        assert g.ndim == 3
        return recurrence(q, k, v, g, beta, **options)

    def kda(q, k, v, g, beta, **options):
        assert g.shape == q.shape
        assert g.dtype == beta.dtype == torch.float32
        return recurrence(q, k, v, g, beta, **options)

    stand_ins = fla.Kernels(simple, recurrence, delta_rule, simple_delta, kda, hgrn)
    monkeypatch.setattr(fla, "kernels", lambda: stand_ins)
    monkeypatch.setattr(fla, "COUNT_SPAN", 8)
    monkeypatch.setattr(fla.Fla, "devices", ("cpu",))
    monkeypatch.setattr(fla.Fla, "missing", lambda self: None)


def test_serves_what_is_a_recurrence_or_linear():
    served = {case.cls.name for case in CASES if is_served(case)}
    assert {"linear", "retention", "gated_linear", "delta", "gated_delta", "kimi_delta"} <= served


@pytest.mark.usefixtures("naive")
@SERVED
@rounds("length", [1, 19])
def test_equals_reference(case, length):
    assert_forms_agree(case, inputs(2, length), case.mask(2, length, length), **FLA)


@pytest.mark.usefixtures("naive")
@SERVED
@rounds("flip", [False, True])
def test_equals_reference_with_padding_on_either_side(case, flip):
    padding = left_padding([21, 12], 21)
    mask = case.mask(2, 21, 21, padding_BK=padding.flip(1) if flip else padding)
    assert_forms_agree(case, inputs(2, 21), mask, **FLA)


@pytest.mark.usefixtures("naive")
@SERVED
def test_equals_reference_for_packed_rows(case):
    own = torch.cat([torch.full((n,), number) for number, n in enumerate([9, 4, 1, 7])])
    segments = torch.stack([own, own.flip(0).neg()])
    for padding in ({}, {"padding_BK": left_padding([21, 17], 21).flip(1)}):
        assert_forms_agree(case, inputs(2, 21), case.mask(2, 21, 21, segments_BK=segments, **padding), **FLA)


@pytest.mark.usefixtures("naive")
@SERVED
def test_equals_reference_for_the_last_queries(case):
    if not case.module().wants_hidden:
        mask = case.mask(2, 5, 21, padding_BK=left_padding([21, 12], 21))
        assert_forms_agree(case, inputs(2, 5, 21), mask, **FLA)


def of_map(feature_map):
    return next(case for case in CASES if is_served(case) and case.options.get("feature_map") == feature_map)


def softmax_features(case):
    return issubclass(case.cls, FeatureAttention) and case.module().config.feature_map == "hedgehog"


@pytest.mark.usefixtures("naive")
@pytest.mark.parametrize(
    "case",
    [
        *(case for case in CASES if is_served(case) and not case.options and not softmax_features(case)),
        of_map("elu"),
    ],
    ids=str,
)
@rounds("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_equals_reference_in_half_precision(case, dtype, tolerance):
    given = inputs(2, 17).to(dtype).to(torch.float64)
    mask = case.mask(2, 17, 17, padding_BK=left_padding([17, 9], 17))
    assert_forms_agree(case, given, mask, backend="fla", dtype=dtype, tolerance=tolerance)


@pytest.mark.usefixtures("naive")
@pytest.mark.parametrize("case", [case for case in CASES if is_served(case) and softmax_features(case)], ids=str)
@rounds("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_softmax_as_features_costs_more_of_half_precision(case, dtype, tolerance):
    """Gradients of a softmax are differences of what kernels have rounded."""
    given = inputs(2, 17).to(dtype).to(torch.float64)
    mask = case.mask(2, 17, 17, padding_BK=left_padding([17, 9], 17))
    assert_forms_agree(case, given, mask, backend="fla", dtype=dtype, tolerance=tolerance)


@pytest.mark.usefixtures("naive")
def test_features_that_may_be_negative_are_not_rounded():
    case = of_map("taylor")
    given = inputs(2, 33).to(torch.bfloat16).to(torch.float64)
    mask = case.mask(2, 33, 33, padding_BK=left_padding([33, 17], 33))
    assert_forms_agree(case, given, mask, backend="fla", dtype=torch.bfloat16, tolerance=1e-2)


@pytest.mark.usefixtures("naive")
def test_rows_are_read_once_for_all_layers(monkeypatch):
    case = next(case for case in CASES if case.cls.name == "gated_delta")
    segments = torch.tensor([[0] * 4 + [1] * 5])
    mask, given = case.mask(1, 9, 9, segments_BK=segments), inputs(1, 9).to(torch.float32)
    given.run(case.module(backend="fla", dtype=torch.float32), mask)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    given.run(case.module(backend="fla", dtype=torch.float32), mask)


def reason(name, *, dtype=torch.float32, head_dim=8, mask=None, **options):
    cls = next(case.cls for case in CASES if case.cls.name == name)
    case = next(case for case in CASES if case.cls is cls and case.options.items() >= options.items())
    given = inputs(1, 9, head_dim=head_dim, value_dim=head_dim).to(dtype)
    mask = mask or AttentionMask(1, 9, 9, causal=True)
    module = case.module(head_dim=head_dim, value_dim=head_dim, dtype=dtype)
    return why_not(get_backend("fla"), module, given.q, given.k, given.v, mask=mask, scale=1.0, dropout=0.0)


@pytest.mark.usefixtures("naive")
def test_what_it_cannot_honour_is_refused_with_the_reason():
    assert reason("gated_delta") is None
    assert reason("linear") is None
    assert reason("softmax") == "it serves recurrences and linear attention"
    assert reason("delta", dtype=torch.float64) == "it computes in float32 at most, got float64"
    assert reason("delta", head_dim=264) == "heads may have 256 channels, got 264"
    assert "go by a running maximum" in reason("linear", feature_map="favor")
    for mask in (AttentionMask(1, 9, 9, causal=False), AttentionMask(1, 9, 9, causal=False).as_cross()):
        assert reason("linear", mask=mask) == "of linear attention it serves the causal one, got one that is not"


@pytest.mark.usefixtures("naive")
@rounds(
    "version, capability, tilelang, wrong",
    [
        ("3.6.0", (9, 0), None, True),
        ("3.7.0", (9, 0), None, True),
        ("3.7.1+git1", (9, 0), None, False),
        ("3.3.1", (9, 0), None, False),
        ("3.6.0", (9, 0), "there", False),
        ("3.6.0", (8, 0), None, False),
        ("3.6.0", (10, 0), None, False),
    ],
)
def test_where_triton_compiles_wrong_gradients_gates_are_refused(monkeypatch, version, capability, tilelang, wrong):
    monkeypatch.setattr(fla.metadata, "version", lambda package: version)
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda module: tilelang)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    here = WRONG_WITH_GATES(torch.device("cuda"))
    assert here == wrong
    monkeypatch.setattr(fla, "_wrong_with_gates", lambda device: here)
    message = f"one gate a token, got Triton {version}: pip install 'triton>=3.7.1'"
    for name, options in (
        ("retention", {}),
        ("gated_delta", {}),
        ("gated_delta", {"gate_input": "hidden"}),
        ("kimi_delta", {}),
        ("delta", {}),
    ):
        assert (message in (reason(name, **options) or "")) == wrong, name
    assert reason("delta", dtype=torch.bfloat16) is None
    assert reason("gated_linear") is None
    assert reason("linear") is None
    with torch.no_grad():
        assert reason("retention") is None


def test_its_absence_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(fla.Fla, "devices", ("cpu",))
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda module: None if module == "fla" else module)
    case = next(case for case in CASES if case.cls.name == "delta")
    with pytest.raises(ValueError, match=r"backend 'fla' cannot serve .*: it needs fla-core: pip install fla-core"):
        inputs(1, 9).run(case.module(backend="fla"), case.mask(1, 9, 9))


def test_queries_beyond_the_keys_are_refused(naive):
    case = next(case for case in CASES if case.cls.name == "delta")
    mask = AttentionMask(1, 5, 9, causal=True, q_offset=6)
    with pytest.raises(ValueError, match="5 queries from key 6 on; allowed: queries within 9 keys"):
        inputs(1, 5, 9).to(torch.float32).run(case.module(backend="fla", dtype=torch.float32), mask)
