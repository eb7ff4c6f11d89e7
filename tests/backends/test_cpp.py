"""Kernels in C++ hold the contract, with every instruction set of this machine; marked cpp where they are built."""

import copy

import pytest
import torch
from cases import (
    CASES,
    Case,
    Inputs,
    MostZeros,
    assert_forms_agree,
    assert_same,
    cotangent_for,
    inputs,
    left_padding,
    outcome,
    rounds,
    seeded,
)

from attn_plugins.backends import cpp, cpp_build
from attn_plugins.backends.cpp_linear import MAPS, runs_of
from attn_plugins.backends.cpp_tiles import compiled_attention, tables_of
from attn_plugins.benchmark.cost.timing import cpu_rates
from attn_plugins.core.backend import fastest, usual
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.ops.blocks.gather import ChoosesBlocks
from attn_plugins.ops.linear.attention import FeatureAttention
from attn_plugins.ops.linear.window_attention import WindowAndSumsAttention
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.band import Band
from attn_plugins.ops.softmax.patterns.with_first import with_first
from attn_plugins.ops.softmax.tiles import tiled_attention

LENGTH = 150
"""Several blocks of 64, and one that is not full."""
HEADS = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "value_dim": 16}
FLOAT = {"dtype": torch.float32, "tolerance": 3e-5, "backend": "cpp", **HEADS}
PATTERNS = [case for case in CASES if case.cls.attend is PatternAttention.attend]
CHOOSING = [case for case in CASES if isinstance(case.module(), ChoosesBlocks)]
FEATURES = [case for case in CASES if case.cls.attend is FeatureAttention.attend]
WINDOWS = [case for case in CASES if isinstance(case.module(), WindowAndSumsAttention)]
GRIDS = [cls for cls in map(get_attention, list_attentions()) if issubclass(cls, PatternAttention) and cls.wants_grid]
SERVED = {"elu", "relu", "relu2", "hedgehog", "t2r", "cosformer"}


def masks(case):
    yield case.mask(2, LENGTH, LENGTH)
    yield case.mask(2, LENGTH, LENGTH, padding_BK=left_padding([LENGTH, 41], LENGTH))
    if case.cls.segments:
        index = torch.arange(LENGTH)
        padding = left_padding([LENGTH, LENGTH - 9], LENGTH).flip(1)
        yield case.mask(2, LENGTH, LENGTH, segments_BK=torch.stack([index // 30, index // 70]), padding_BK=padding)


def served(case):
    return case not in [*FEATURES, *WINDOWS] or case.cls.Config(**case.options).feature_map in SERVED


@pytest.mark.cpp
@pytest.mark.parametrize(
    "case", [case for case in [*PATTERNS, *CHOOSING, *FEATURES, *WINDOWS] if served(case)], ids=str
)
def test_equals_reference_by_every_instruction_set(isa, case):
    for mask in masks(case):
        assert_forms_agree(case, inputs(2, LENGTH, **HEADS), mask, **FLOAT)


@pytest.mark.cpp
@pytest.mark.parametrize("case", [case for case in PATTERNS if case.cls.softcap], ids=str)
def test_equals_reference_with_all_extras_for_fewer_queries_compiled(isa, case):
    """A softcap, a bias and sinks with their gradients; the bias is that of all rows, or of all heads."""
    queries, bias_of = (13, (1, 4)) if case.causal else (LENGTH, (2, 1))
    given = inputs(2, queries, LENGTH, **HEADS)
    bias = torch.randn(*bias_of, queries, LENGTH, generator=seeded(2), dtype=torch.float64)
    extras = {
        "position_bias": bias,
        "softcap": 0.5,
        "sinks": torch.randn(4, generator=seeded(3), dtype=torch.float64),
    }
    given.extras = {name: extra for name, extra in extras.items() if getattr(case.cls, name)}
    mask = case.mask(2, queries, LENGTH, padding_BK=left_padding([LENGTH, 41], LENGTH))
    assert_forms_agree(case, given, mask, **FLOAT)


@pytest.mark.cpp
@pytest.mark.parametrize("case", [case for case in PATTERNS if case.cls.any_mask], ids=str)
def test_equals_reference_for_a_mask_of_no_shape(built, case):
    dense_BQK = torch.rand(2, LENGTH, LENGTH, generator=seeded(4)) < 0.3
    mask = case.mask(2, LENGTH, LENGTH, plain=False, dense_BQK=dense_BQK.tril() if case.causal else dense_BQK)
    assert_forms_agree(case, inputs(2, LENGTH, **HEADS), mask, **FLOAT)


@pytest.mark.cpp
@pytest.mark.parametrize("cls", GRIDS, ids=lambda cls: cls.name)
def test_equals_reference_on_grids_compiled(built, cls):
    for options in cls.examples:
        case = Case(cls, {**options, "grid_size": (9, 8)}, False)
        length = 72 + options.get("num_prefix_tokens", 1)
        assert_forms_agree(case, inputs(1, length, **HEADS), case.mask(1, length, length), **FLOAT)


@pytest.mark.cpp
@rounds("block_size", [64, 100])
def test_blocks_as_large_as_tiles_and_larger(built, block_size):
    """Of several tiles of queries each, in packed rows and beside padding."""
    for name, options in (("block_topk", {}), ("infllm", {"local_blocks": 1, "dense_len": 150}), ("native_sparse", {})):
        options = {"block_size": block_size, "topk": 4, **options}
        case, length = Case(get_attention(name), options, True), 600
        segments_BK = torch.stack([torch.arange(length) // 350, torch.zeros(length, dtype=torch.long)])
        padding_BK = left_padding([length, length - 30], length)
        mask = case.mask(2, length, length, segments_BK=segments_BK, padding_BK=padding_BK)
        assert_forms_agree(case, inputs(2, length, **HEADS), mask, **FLOAT)


@pytest.mark.cpp
@pytest.mark.parametrize("case", [case for case in [*CHOOSING, *WINDOWS] if not case.options], ids=str)
def test_what_is_made_of_parts_has_them_computed_by_operators(built, case):
    """``auto``, forward and backward; a window beside chosen blocks, and beside sums over what has left it, too."""
    given, mask = inputs(1, 80, **HEADS, dtype=torch.float32), case.mask(1, 80, 80)
    given.q.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = given.run(case.module(backend="auto", dtype=torch.float32, **HEADS), mask)
        out.sum().backward()
    name = "attn_plugins_cpp::"
    called = sorted(x.key.removeprefix(name) for x in profile.key_averages() if x.key.startswith(name))
    parts = {"native_sparse": ("chosen", "softmax"), "linear_window": ("linear", "softmax")}
    parts = parts.get(case.cls.name, ("chosen",))
    assert [x for x in called if x != "cut_mask"] == [
        f"{part}_{way}" for part in parts for way in ("backward", "forward")
    ]


@pytest.mark.cpp
@rounds("feature_map, branch", [(x, "both") for x in ("elu", "relu", "relu2", "t2r")] + [("hedgehog", "linear")])
def test_sums_of_every_map_beside_a_window(built, feature_map, branch):
    """Packed rows with padding, for three query heads to a key/value head, and with more tokens than the window."""
    shape, length = {**HEADS, "num_heads": 3, "num_key_value_heads": 1}, 210
    case = Case(get_attention("linear_window"), {"feature_map": feature_map, "window_size": 20}, True)
    segments_BK = torch.stack([torch.arange(length) // 150, torch.zeros(length, dtype=torch.long)])
    mask = case.mask(2, length, length, segments_BK=segments_BK, padding_BK=left_padding([length, length - 30], length))
    given = inputs(2, length, **shape)
    module = case.module(backend="cpp", dtype=torch.float32, **shape)
    oracle = copy.deepcopy(module).double()
    module.branch = oracle.branch = branch
    oracle.backend, cotangent = "reference", cotangent_for(given, mask).float()
    assert_same(
        outcome(module, given.to(torch.float32), mask, cotangent), outcome(oracle, given, mask, cotangent), 3e-5
    )


@pytest.mark.cpp
@rounds("of", [("local", True), ("longformer", False), ("bigbird", False)])
def test_log_sum_exp_and_highest_score_have_gradients(built, of):
    """Equal keys among them, of which one has the gradient of the highest score, and queries that see nothing."""
    name, causal = of
    case = Case(get_attention(name), {}, causal)
    mask = case.mask(2, LENGTH, LENGTH, padding_BK=left_padding([LENGTH, 41], LENGTH))
    (_, pattern), *_ = case.module().patterns(4, mask)
    given = inputs(2, LENGTH, **HEADS)
    q, k, v = given.q, given.k.detach().clone(), given.v
    k[:, :, 1::2] = k[:, :, ::2]
    found = []
    for attend, dtype in ((compiled_attention, torch.float32), (tiled_attention, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse, top = attend(*leaves, mask, pattern, scale=0.4, return_lse=True)
        assert (lse == -torch.inf).any() == (name != "longformer")
        by = [
            torch.randn(x.shape, generator=seeded(i), dtype=torch.float64).to(dtype)
            for i, x in enumerate((out, lse, top))
        ]
        seen = lse != -torch.inf
        loss = (out * by[0]).sum() + (torch.where(seen, lse, 0.0) * by[1]).sum() + (top * seen * by[2]).sum()
        dq, dk, dv = torch.autograd.grad(loss, leaves)
        dk = dk.unflatten(2, (-1, 2)).sum(dim=3)  # whichever of two equal keys has it
        found.append(
            {"out": out.detach(), "lse": lse.detach().exp(), "top": (top * seen).detach(), "q": dq, "k": dk, "v": dv}
        )
    assert_same(*found, 3e-5)


@pytest.mark.cpp
@rounds("pattern", [Band(140, 139), with_first(Band(90, 89), 3)])
def test_of_equal_scores_in_several_blocks_one_has_the_gradient_of_the_highest(isa, pattern):
    """All keys are equal, of one tile or of several: what they get together is what one would."""
    mask = AttentionMask(1, LENGTH, LENGTH, causal=True)
    q = torch.randn(1, 2, LENGTH, 16, generator=seeded(0))
    k = torch.ones(1, 2, LENGTH, 16, requires_grad=True)
    _, _, top = compiled_attention(q, k, k.detach(), mask, pattern, scale=0.4, return_lse=True)
    by = torch.randn(top.shape, generator=seeded(1))
    (dk,) = torch.autograd.grad((top * by).sum(), k)
    torch.testing.assert_close(dk.sum(dim=2), 0.4 * (q * by).sum(dim=2), rtol=1e-4, atol=1e-5)


@pytest.mark.cpp
@rounds("loss_of", [1, 2])
def test_a_log_sum_exp_or_a_highest_score_alone_has_gradients(built, loss_of):
    """No gradient comes to the outputs beside it."""
    case = Case(get_attention("local"), {"window_size": 20}, True)
    mask = case.mask(1, LENGTH, LENGTH)
    (_, pattern), *_ = case.module().patterns(4, mask)
    found, given = [], inputs(1, LENGTH, **HEADS)
    for attend, dtype in ((compiled_attention, torch.float32), (tiled_attention, torch.float64)):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in (given.q, given.k, given.v))
        parts = attend(q, k, v, mask, pattern, scale=0.4, return_lse=True)
        dq, dk = torch.autograd.grad(parts[loss_of].square().sum(), (q, k))
        found.append({"q": dq, "k": dk})
    assert_same(*found, 3e-5)


@pytest.mark.cpp
@rounds(
    "name, causal",
    [("local", True), ("longformer", False), ("linear", True), ("linear", False), ("linear_window", True)],
)
def test_no_rows_have_outputs_and_gradients_of_no_rows(built, name, causal):
    case = Case(get_attention(name), {}, causal)
    given = inputs(1, LENGTH, **HEADS, dtype=torch.float32).rows(slice(0, 0))
    given = Inputs(*(x.detach().requires_grad_() for x in given.of_tokens()))
    out = given.run(case.module(backend="cpp", dtype=torch.float32, **HEADS), case.mask(0, LENGTH, LENGTH))
    grads = torch.autograd.grad(out.sum(), (given.q, given.k, given.v))
    assert [x.shape for x in grads] == [x.shape for x in (given.q, given.k, given.v)]


@pytest.mark.cpp
@rounds("shape", [(3, 1, 24, 40), (8, 8, 64, 64), (2, 2, 17, 5)])
def test_sizes_that_are_no_multiples_are_filled_up(built, shape):
    shape = dict(zip(HEADS, shape, strict=True))
    case = Case(get_attention("local"), {"window_size": 70, "num_sink_tokens": 3}, True)
    given = inputs(1, LENGTH, **shape)
    assert_forms_agree(case, given, case.mask(1, LENGTH, LENGTH), **{**FLOAT, **shape})


@pytest.mark.cpp
@rounds("feature_map", ["relu", "relu2", "cosformer"])
def test_features_of_zero_are_filled_up_too(built, feature_map):
    shape = {**HEADS, "head_dim": 9}
    case = Case(get_attention("linear"), {"feature_map": feature_map}, True)
    assert_forms_agree(case, inputs(1, LENGTH, **shape), case.mask(1, LENGTH, LENGTH), **{**FLOAT, **shape})


@pytest.mark.cpp
@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (2, 70, 32), (3, 7, 96), (6, 64, 64), (7, 5, 48), (65, 3, 80), (64, 100, 112)]
)
def test_products_of_tiles(isa, shape):
    rows, inner, columns = shape
    a, b = (torch.randn(size, generator=seeded(i)) for i, size in enumerate([(rows, inner), (inner, columns)]))
    torch.testing.assert_close(torch.ops.attn_plugins_cpp.tile_product(a, b, 2), a @ b, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="two dense float32 matrices"):
        torch.ops.attn_plugins_cpp.tile_product(a, b[:, :8], 1)


@pytest.mark.cpp
def test_what_kernels_can_reach_stands_beside_what_torch_does(built):
    rates = cpu_rates()
    assert set(rates) == {"mm", "attention", "cpp"}
    assert min(rates.values()) > 0


@pytest.mark.cpp
@pytest.mark.parametrize("divided", [True, False])
def test_linear_backward_makes_no_zeros_for_the_states_that_only_it_reads(built, divided):
    q, k, v = (torch.randn(1, 1, 64, 16, generator=seeded(i)).requires_grad_() for i in range(3))
    how = (runs_of(1, 64, None), None, MAPS["elu"], True, divided, 0.0)
    out, den, states = torch.ops.attn_plugins_cpp.linear_forward(q, k, v, *how)
    zeros = MostZeros()
    with zeros:
        out.sum().backward()
    assert zeros.number <= den.numel() < states.numel()


@pytest.mark.cpp
def test_dropped_weights_are_dropped_again_in_the_backward(built):
    case, n = Case(get_attention("local"), {"window_size": 100}, True), 128
    shape = {"num_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "value_dim": n}
    given, mask = inputs(1, n, **shape, dtype=torch.float32), case.mask(1, n, n)
    given.v = torch.eye(n).view(1, 1, n, n).requires_grad_()
    module = case.module(backend="cpp", dtype=torch.float32, **shape)
    whole = given.run(module, mask)[0, :, 0].detach()
    dropped = given.run(module, mask, dropout=0.25)[0, :, 0]
    kept = dropped.detach() != 0
    torch.testing.assert_close(dropped.detach(), torch.where(kept, whole / 0.75, 0.0))
    share = (kept & (whole > 1e-6)).sum() / (whole > 1e-6).sum()
    assert abs(share - 0.75) < 0.02, share
    cotangent = torch.randn(n, n, generator=seeded(1))
    (dv,) = torch.autograd.grad((dropped * cotangent).sum(), given.v)
    torch.testing.assert_close(dv[0, 0], dropped.detach().mT @ cotangent, rtol=1e-4, atol=1e-5)
    other = given.run(module, mask, dropout=0.25)[0, :, 0]
    assert ((other != 0) != kept).any(), "the same weights are dropped in every call"


@pytest.mark.cpp
@rounds("name", ["local", "linear", "linear_window"])
def test_half_precision_is_that_of_the_values(built, name):
    case = Case(get_attention(name), {}, True)
    given, mask = inputs(1, LENGTH, **HEADS), case.mask(1, LENGTH, LENGTH)
    for dtype in (torch.bfloat16, torch.float16):
        assert_forms_agree(case, given, mask, **{**FLOAT, "dtype": dtype, "tolerance": 2e-2})


@pytest.mark.cpp
def test_auto_takes_what_is_built_and_can_honour_a_call(built):
    case = Case(get_attention("local"), {}, True)
    given, mask = inputs(1, 40, **HEADS, dtype=torch.float32), case.mask(1, 40, 40)
    module = case.module(backend="auto", dtype=torch.float32, **HEADS)

    def taken(given):
        chosen = module.computed_by(given.q, given.k, given.v, mask=mask, scale=1.0, dropout=0.0)
        return chosen if isinstance(chosen, str) else chosen.name

    assert (taken(given), taken(given.to(torch.float64))) == ("cpp", "torch")
    assert usual(module, torch.device("cpu")) == "cpp"
    other = Case(get_attention("topk"), {}, True).module(backend="auto", dtype=torch.float32, **HEADS)
    assert usual(other, torch.device("cpu")) == "torch"
    assert fastest(other, given.q, given.k, given.v, mask=mask, scale=1.0, dropout=0.0) is None


@pytest.mark.cpp
def test_what_is_not_served_is_refused_with_a_reason(built):
    given, plain = inputs(1, 40, **HEADS, dtype=torch.float32), AttentionMask(1, 40, 40, causal=True)
    for name, options, reason in (
        ("topk", {}, "it serves softmax attention over a pattern or over blocks"),
        ("graph", {}, "it serves softmax attention over a pattern or over blocks"),
        ("linear", {"feature_map": "favor"}, "feature maps that come down to"),
        ("linear_window", {"feature_map": "taylor"}, "feature maps that come down to .*, got taylor"),
    ):
        case = Case(get_attention(name), options, name != "graph")
        module = case.module(backend="cpp", dtype=torch.float32, **HEADS)
        with pytest.raises(ValueError, match=f"backend 'cpp' cannot serve this call.*{reason}"):
            given.run(module, plain if case.causal else case.mask(1, 40, 40))
    module = Case(get_attention("linear"), {}, True).module(backend="cpp", dtype=torch.float32, **HEADS)
    odd = {**HEADS, "head_dim": 9}
    small, given_small = Case(get_attention("linear"), {}, True), inputs(1, 40, **odd, dtype=torch.float32)
    small = small.module(backend="cpp", dtype=torch.float32, **odd)
    with pytest.raises(ValueError, match="heads whose size is a multiple of 16, got 9"):
        given_small.run(small, plain)
    both = Case(get_attention("linear_window"), {}, True).module(backend="cpp", dtype=torch.float32, **HEADS)
    for served in (module, both):
        with pytest.raises(ValueError, match="as many queries as keys"):
            given.queries(slice(-4, None)).run(served, AttentionMask(1, 4, 40, causal=True, q_offset=36))
    module = Case(get_attention("local"), {}, True).module(backend="cpp", dtype=torch.float64, **HEADS)
    with pytest.raises(ValueError, match=r"must be of .*torch\.float32, got torch\.float64"):
        given.to(torch.float64).run(module, plain)


@pytest.mark.cpp
def test_tables_leave_out_what_is_hidden_and_keep_masks_of_edges_alone(built):
    """A window of 64 over 640 tokens: of each tile one block of its own and one before, and two looks of masks."""
    (_, pattern), *_ = (
        Case(get_attention("local"), {"window_size": 64, "num_sink_tokens": 0}, True)
        .module()
        .patterns(4, mask := AttentionMask(1, 640, 640, causal=True))
    )
    tables = tables_of(pattern.tiles(mask), pattern.merged)
    assert len(tables.tiles) == 10
    assert len(tables.blocks) == 19
    assert len(tables.masks) <= 4


@pytest.mark.cpp
def test_operators_are_what_torch_asks_of_operators(built):
    """Schemas, shapes without data, gradients that are registered."""
    case = Case(get_attention("local"), {"window_size": 20}, True)
    mask = case.mask(1, 70, 70)
    (_, pattern), *_ = case.module().patterns(2, mask)
    tables = tables_of(pattern.tiles(mask), pattern.merged)
    q, k, v = (torch.randn(1, 2, 70, 16, generator=seeded(i), requires_grad=True) for i in range(3))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    softmax = torch.ops.attn_plugins_cpp.softmax_forward.default
    torch.library.opcheck(softmax, (q, k, v, *tables, None, None, 0.3, 0.0, 0.0, 0), test_utils=checks)
    linear, runs = torch.ops.attn_plugins_cpp.linear_forward.default, torch.tensor([[0, 0, 70, 0]], dtype=torch.int32)
    torch.library.opcheck(linear, (q, k, v, runs, None, 0, True, True, 1e-6), test_utils=checks)
    torch.library.opcheck(linear, (q, k, v, runs, None, 3, False, True, 1e-6), test_utils=checks)
    torch.library.opcheck(linear, (q, k, v, runs, None, 0, True, False, 0.0), test_utils=checks)


@pytest.mark.cpp
def test_another_instruction_set_is_refused(built):
    with pytest.raises(ValueError, match=r"instruction set 'sse9' .*allowed: "):
        cpp.use_instruction_set("sse9")


def test_kernels_that_are_not_built_are_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp_build, "built", lambda: None)
    case = Case(get_attention("local"), {}, True)
    module = case.module(backend="cpp", dtype=torch.float32)
    with pytest.raises(ValueError, match="its kernels are not built for this torch: attn-plugins build"):
        inputs(1, 20, dtype=torch.float32).run(module, case.mask(1, 20, 20))


def test_without_a_library_auto_is_plain_pytorch(monkeypatch):
    monkeypatch.setattr(cpp_build, "built", lambda: None)
    case = Case(get_attention("local"), {}, True)
    module, given = case.module(backend="auto", dtype=torch.float32), inputs(1, 20, dtype=torch.float32)
    mask = case.mask(1, 20, 20)
    assert module.computed_by(given.q, given.k, given.v, mask=mask, scale=1.0, dropout=0.0) == "torch"
    assert usual(module, torch.device("cpu")) == "torch"


def test_a_library_that_a_wheel_brought_needs_no_compiler(monkeypatch, tmp_path):
    """It is found before that of the cache; with flags of one's own there is something to be made."""
    monkeypatch.setattr(cpp_build, "SOURCES", tmp_path)
    monkeypatch.setattr(cpp_build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    brought = cpp_build.places()[0]
    brought.parent.mkdir(parents=True)
    brought.touch()
    assert brought.is_relative_to(tmp_path)
    assert cpp_build.build() == brought
    with pytest.raises(ValueError, match=r"no C\+\+ compiler"):
        cpp_build.build(flags="-g")


def test_a_machine_without_a_compiler_is_told_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpp_build, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"no C\+\+ compiler: got none of no-such-compiler; install one"):
        cpp_build.build(tmp_path)
    monkeypatch.setenv("CXX", "/no/such/g++ -m64")
    with pytest.raises(ValueError, match=r"got CXX='/no/such/g\+\+ -m64', which is not there"):
        cpp_build.build(tmp_path)
    assert not list(tmp_path.iterdir()), "something is left of a build that failed"


def test_what_a_compiler_says_is_told(monkeypatch, tmp_path):
    failing = tmp_path / "cxx"
    failing.write_text("#!/bin/sh\necho kernels.cpp:1: this is wrong\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(ValueError, match=r"compiling failed: (.|\n)*kernels\.cpp:1: this is wrong"):
        cpp_build.build(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.so"))


def test_kernels_are_left_alone_where_a_variable_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTN_PLUGINS_CACHE", str(tmp_path))
    library = cpp_build.places()[-1]
    library.parent.mkdir(parents=True)
    library.touch()
    for value, found in (("0", None), ("1", library), ("avx2", library)):
        cpp_build.built.cache_clear()
        monkeypatch.setenv(cpp_build.SWITCH, value)
        assert cpp_build.built() == found
    cpp_build.built.cache_clear()


def test_a_library_that_another_process_has_made_since_is_taken_by_a_build(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTN_PLUGINS_CACHE", str(tmp_path))
    monkeypatch.setenv(cpp_build.SWITCH, "1")
    monkeypatch.setattr(cpp_build, "SOURCES", tmp_path)
    cpp_build.built.cache_clear()
    try:
        assert cpp_build.built() is None
        library = cpp_build.places()[-1]
        library.parent.mkdir(parents=True)
        library.touch()
        assert cpp_build.build() == library
        assert cpp_build.built() == library
    finally:
        cpp_build.built.cache_clear()
