"""FlexAttention equals ``reference`` for every attention with a pattern, as its dense form computes it on a CPU.

That form asks the rule for every pair, whichever blocks are listed: tests/ops/test_block_limits.py holds these to the
rule, and tests/kernels/test_flex_kernels.py runs the kernels that leave blocks out.
"""

import functools

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
from cases import CASES, Case, assert_forms_agree, inputs, left_padding, seeded
from test_capabilities import RULES
from torch._dynamo.testing import CompileCounterWithBackend

from attn_plugins.backends import flex
from attn_plugins.backends.flex_masks import flex_mask
from attn_plugins.benchmark.cost.launches import MOST_OF_A_MASK, SYNCS_OF_A_MASK
from attn_plugins.benchmark.cost.operations import counted
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.ops.softmax.attention import FollowsRules

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at views

SHAPE = {"head_dim": 16, "value_dim": 16}
FLEX = {"backend": "flex", "dtype": torch.float32, "tolerance": 2e-5, **SHAPE}
PATTERNS = [case for case in CASES if issubclass(case.cls, FollowsRules)]
GRIDS = [cls for cls in map(get_attention, list_attentions()) if cls.wants_grid and issubclass(cls, FollowsRules)]
CROSS = [cls for cls in map(get_attention, list_attentions()) if cls.cross and issubclass(cls, FollowsRules)]
every_pattern = pytest.mark.parametrize("case", PATTERNS, ids=str)
every_pattern_by_default = pytest.mark.parametrize("case", [case for case in PATTERNS if not case.options], ids=str)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """What needs a GPU is left out: compiling, and torch's refusal of gradients on CPUs."""
    monkeypatch.setattr(flex.Flex, "devices", ("cpu",))
    monkeypatch.setattr(flex.Flex, "missing", lambda self: None)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(flex, "compiled", functools.cache(flex.compiled.__wrapped__))


def some_inputs(queries, keys=None):
    return inputs(2, queries, keys, **SHAPE)


@pytest.fixture
def eager(monkeypatch):
    """Without Dynamo too, which takes longer than what it compiles; biases have no gradient then."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "compiled", lambda key: flex.attend_blocks)


LENGTH = 70


def packed(length=LENGTH):
    index = torch.arange(length)
    return {
        "segments_BK": torch.stack([index // 30, index // 50]),
        "padding_BK": left_padding([length, length - 9], length).flip(1),
    }


def rules_of(case, mask):
    q = torch.zeros(mask.batch_size, 4, mask.q_length, 16)
    return case.module().by_rules(q, q, mask)[2]


@every_pattern
def test_equals_reference_for_packed_rows(eager, case):
    mask = case.mask(2, LENGTH, LENGTH, **packed())
    assert_forms_agree(case, some_inputs(LENGTH), mask, **FLEX)


@every_pattern_by_default
def test_equals_reference_without_and_with_left_padding(eager, case):
    for padding in (None, left_padding([LENGTH, 41], LENGTH)):
        mask = case.mask(2, LENGTH, LENGTH, padding_BK=padding)
        assert_forms_agree(case, some_inputs(LENGTH), mask, **FLEX)


@every_pattern_by_default
def test_equals_reference_with_all_extras_for_fewer_queries(case):
    """A softcap, a bias and sinks with their gradients, all at once; the bias is that of all rows, or of all heads."""
    queries, bias_of = (13, (1, 4)) if case.causal else (LENGTH, (2, 1))
    given = some_inputs(queries, LENGTH)
    bias = torch.randn(*bias_of, queries, LENGTH, generator=seeded(2), dtype=torch.float64)
    sinks = torch.randn(4, generator=seeded(3), dtype=torch.float64)
    extras = {"position_bias": bias, "softcap": 0.5, "sinks": sinks}
    given.extras = {name: extra for name, extra in extras.items() if getattr(case.cls, name)}
    mask = case.mask(2, queries, LENGTH, padding_BK=left_padding([LENGTH, 41], LENGTH))
    assert_forms_agree(case, given, mask, **FLEX)


@every_pattern_by_default
def test_equals_reference_for_a_dense_mask(eager, case):
    dense_BQK = torch.rand(2, LENGTH, LENGTH, generator=seeded(4)) < 0.3
    if case.causal:
        dense_BQK = dense_BQK.tril()
    mask = case.mask(2, LENGTH, LENGTH, plain=False, dense_BQK=dense_BQK)
    assert_forms_agree(case, some_inputs(LENGTH), mask, **FLEX)


@pytest.mark.parametrize("cls", GRIDS, ids=lambda cls: cls.name)
def test_equals_reference_on_a_grid(eager, cls):
    for options in cls.examples:
        length = 48 + options.get("num_prefix_tokens", 1)
        mask = AttentionMask(1, length, length, causal=False)
        case = Case(cls, {**options, "grid_size": (6, 8)}, False)
        assert_forms_agree(case, inputs(1, length, **SHAPE), mask, **FLEX)


@pytest.mark.parametrize("rule", RULES)
def test_equals_reference_for_a_rule_of_the_model(rule):
    causal, rule = RULES[rule]
    for case in [case for case in PATTERNS if case.causal == causal and not case.options and case.cls.any_mask][:2]:
        mask = case.mask(2, 13, LENGTH, plain=False, rule=rule, padding_BK=left_padding([LENGTH, 41], LENGTH))
        assert_forms_agree(case, some_inputs(13, LENGTH), mask, **FLEX)


@pytest.mark.parametrize("cls", CROSS, ids=lambda cls: cls.name)
def test_equals_reference_for_keys_of_another_sequence(eager, cls):
    mask = AttentionMask(2, 33, 20, causal=False, cross=True, padding_BK=left_padding([20, 11], 20).flip(1))
    assert_forms_agree(Case(cls, {}, False), some_inputs(33, 20), mask, **FLEX)


@pytest.mark.parametrize("case", PATTERNS, ids=str)
def test_tables_of_a_mask_are_within_the_bars(case):
    """Packed rows included: the number of operations does not follow from the length."""
    numbers = []
    for length in (512, 1024):
        mask = case.mask(1, length, length, segments_BK=torch.arange(length).unsqueeze(0) // 300)
        with counted() as found:
            for _, pattern in rules_of(case, mask):
                flex_mask(mask, pattern)
        numbers.append(len(found.launches))
        assert found.syncs.total() <= SYNCS_OF_A_MASK
    assert numbers[1] <= numbers[0] <= MOST_OF_A_MASK


def test_masks_of_a_kind_share_what_is_compiled():
    """Neither a new mask nor a third length is compiled anew, nor what another kind of call has already compiled."""
    case = next(case for case in PATTERNS if case.options.get("num_sink_tokens"))
    module = case.module(backend="flex", dtype=torch.float32, **SHAPE)
    counter = CompileCounterWithBackend("eager")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", functools.partial(torch.compile.func, backend=counter))
        for length, compiled in ((40, 1), (40, 1), (40, 1), (50, 2), (60, 2), (70, 2)):
            for shift in (0, 1):
                given = inputs(2, length, **SHAPE).to(torch.float32)
                segments = ((torch.arange(length) + shift) // 20).expand(2, -1)
                out = given.run(module, case.mask(2, length, length, segments_BK=segments))
                assert out.isfinite().all()
            assert counter.frame_count == compiled, length


def test_the_blocks_are_made_once_for_all_layers():
    case = next(case for case in PATTERNS if case.causal)
    mask = case.mask(2, LENGTH, LENGTH, **packed())
    (_, pattern), *_ = rules_of(case, mask)
    assert flex_mask(mask, pattern) is flex_mask(mask, pattern)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout": 0.1}, "it drops no weights, got an attention dropout of 0.1"),
        ({"dtype": torch.float64}, "it takes one of torch.float32, .*, got torch.float64"),
        ({"head_dim": 8}, "its heads are of 16 to 256 channels, got 8"),
        ({"rule": True}, "it takes rules of the model's own on the device of the mask, cpu, got meta"),
    ],
)
def test_refuses_what_its_kernels_cannot(change, reason):
    case = next(case for case in PATTERNS if case.cls.any_mask and case.cls.dropout and case.causal)
    dtype = change.get("dtype", torch.float32)
    rule = {"plain": False, "rule": lambda b, h, q, k: k <= q, "device": "meta"} if change.get("rule") else {}
    given = inputs(1, 20, **{**SHAPE, "head_dim": change.get("head_dim", 16)}).to(dtype)
    module = case.module(backend="flex", dtype=dtype, **SHAPE)
    with pytest.raises(ValueError, match=f"backend 'flex' cannot serve this call of .*: {reason}"):
        given.run(module, case.mask(1, 20, 20, **rule).to("cpu"), dropout=change.get("dropout", 0.0))


def test_serves_what_has_a_pattern_alone():
    case = next(case for case in CASES if not issubclass(case.cls, FollowsRules))
    with pytest.raises(ValueError, match=r"it serves attentions whose visible pairs are known before the scores"):
        inputs(1, 20, **SHAPE).run(case.module(backend="flex", **SHAPE), case.mask(1, 20, 20))


def test_is_part_of_a_graph():
    """Inside torch.compile its blocks are made by the graph."""
    case = next(case for case in PATTERNS if case.options.get("num_sink_tokens"))
    module = case.module(backend="flex", dtype=torch.float32, **SHAPE)
    mask = case.mask(2, LENGTH, LENGTH, **packed())
    given = some_inputs(LENGTH).to(torch.float32)
    want = given.run(module, mask)
    compiled = torch.compile(module, fullgraph=True)
    compiled.wants_hidden = False
    torch.testing.assert_close(given.run(compiled, mask), want)
