"""Compiled steps of one token from a state equal PyTorch's and the dense form, with every instruction set."""

import copy

import pytest
import tiny
import torch
import transformers
from cases import CASES, Case, inputs, left_padding, rounds
from torch.utils._python_dispatch import TorchDispatchMode

import attn_plugins as ap
from attn_plugins.backends.cpp import Cpp
from attn_plugins.core.backend import register_backend
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops.linear.attention import FeatureAttention
from attn_plugins.ops.recurrent.attention import RecurrentAttention

HEADS = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "value_dim": 16}
LENGTH, PROMPT = 21, 6
LENGTHS = (LENGTH, 18, 9)
"""Real tokens of the rows: the last begins after the prompt."""
MAPS = ("elu", "relu", "relu2", "hedgehog", "t2r", "cosformer")
LINEAR = [Case(get_attention("linear"), {"feature_map": name}, True) for name in MAPS]
RECURRENT = [case for case in CASES if case.cls.attend_from is RecurrentAttention.attend_from]
WINDOW = [
    Case(get_attention("linear_window"), {"window_size": 5, **options}, True)
    for options in (
        {},
        {"feature_map": "t2r", "num_sink_tokens": 0},
        {"branch": "window", "num_sink_tokens": 1},
        {"branch": "linear", "feature_map": "elu"},
        {"window_size": 30},
    )
]
STEPPING = [*LINEAR, *RECURRENT, *WINDOW]
TOLERANCE = 2e-5


STEPS = {f"attn_plugins_cpp::{name}_step" for name in ("linear", "window", "recurrent")}


class Steps(TorchDispatchMode):
    """Counts the compiled steps."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.name() in STEPS
        return func(*args, **(kwargs or {}))


def module_of(case, backend="auto", dtype=torch.float32, **shape):
    return case.module(backend=backend, dtype=dtype, **{**HEADS, **shape})


def generated(module, given, padding_BK=None, state=None):
    """(Outputs of a prompt and of each token after it, or after a state's; how many compiled steps; the state)."""
    state = module.new_state() if state is None else state
    outs, start = [], state.seen
    with Steps() as steps:
        for end in [PROMPT, *range(PROMPT + 1, LENGTH + 1)] if not start else range(start + 1, LENGTH + 1):
            padding = None if padding_BK is None else padding_BK[:, :end]
            mask = AttentionMask(len(given.q), end - start, end, causal=True, padding_BK=padding)
            outs.append(given.tokens(slice(start, end)).run(module, mask, state=state))
            start = end
    return torch.cat(outs, dim=1), steps.number, state


def dense(case, module, given, padding_BK=None):
    oracle = copy.deepcopy(module).double()
    oracle.backend = "reference"
    return given.to(torch.float64).run(oracle, case.mask(len(given.q), LENGTH, LENGTH, padding_BK=padding_BK))


def assert_near(got, want, padding_BK=None, tolerance=TOLERANCE):
    assert got.isfinite().all(), "padding too is finite: layers above compute with it"
    real = torch.ones(want.shape[:2], dtype=torch.bool) if padding_BK is None else padding_BK
    got, want = got[real].double(), want[real].double()
    error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error <= tolerance, f"differs by {error:.2e}"


@pytest.mark.cpp
@pytest.mark.parametrize("case", STEPPING, ids=str)
@torch.no_grad()
def test_steps_equal_those_of_pytorch_and_the_dense_form(isa, case):
    """Rows with and without padding; keys shared by as many heads as are treated apart; values of any size."""
    for heads, groups, value_dim in ((3, 3, 40), (8, 2, 96), (9, 1, 7), (2, 1, 16), (3, 1, 16)):
        value_dim = 16 * -(-value_dim // 16) if case in WINDOW else value_dim
        shape = {**HEADS, "num_heads": heads, "num_key_value_heads": groups, "value_dim": value_dim}
        given = inputs(len(LENGTHS), LENGTH, **shape, dtype=torch.float32)
        module, plain = (module_of(case, backend, **shape) for backend in ("auto", "torch"))
        for padding_BK in (None, left_padding(LENGTHS, LENGTH)):
            got, steps, state = generated(module, given, padding_BK)
            want, none, held = generated(plain, given, padding_BK)
            assert (steps, none) == (LENGTH - PROMPT, 0)
            assert_near(got, want, padding_BK)
            assert_near(got, dense(case, plain, given, padding_BK), padding_BK)
            for name in state.tensors if case in WINDOW else state.tensors.keys() - {"k", "v"}:
                assert state.tensors[name].shape == held.tensors[name].shape
                assert_near(state.tensors[name], held.tensors[name])


@pytest.mark.cpp
@pytest.mark.parametrize("case", [LINEAR[0], LINEAR[4], WINDOW[0], RECURRENT[0], RECURRENT[-1]], ids=str)
@torch.no_grad()
def test_tokens_in_half_precision_are_converted_on_the_way(built, case):
    padding_BK = left_padding(LENGTHS, LENGTH)
    for dtype in (torch.bfloat16, torch.float16):
        given = inputs(len(LENGTHS), LENGTH, **HEADS, dtype=dtype)
        module, plain = (module_of(case, backend, dtype) for backend in ("cpp", "torch"))
        got, steps, state = generated(module, given, padding_BK)
        want, _, held = generated(plain, given, padding_BK)
        assert (got.dtype, steps) == (dtype, LENGTH - PROMPT)
        # The same sums in float32, up to the one rounding of what comes out.
        assert_near(got, want, padding_BK, tolerance=2 * torch.finfo(dtype).eps)
        for name in state.tensors.keys() - {"k", "v"}:
            assert state.tensors[name].dtype == torch.float32
            assert_near(state.tensors[name], held.tensors[name])


@pytest.mark.cpp
@pytest.mark.parametrize("case", [LINEAR[3], WINDOW[0], RECURRENT[0], RECURRENT[-1]], ids=str)
@torch.no_grad()
def test_states_go_on_by_themselves(built, case):
    """As beams, copies and cuts of a cache have it: what another holds of a state stays as it was."""
    given, padding_BK = inputs(len(LENGTHS), LENGTH, **HEADS, dtype=torch.float32), left_padding(LENGTHS, LENGTH)
    module = module_of(case)
    want, state = dense(case, module, given, padding_BK), module.new_state()
    for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1)):
        mask = AttentionMask(3, end - start, end, causal=True, padding_BK=padding_BK[:, :end])
        given.tokens(slice(start, end)).run(module, mask, state=state)
    shallow, before = copy.copy(state), {name: x.clone() for name, x in state.tensors.items()}
    shallow.tensors = dict(state.tensors)
    copied, order = copy.deepcopy(state), torch.tensor([2, 0, 0, 1])
    beams = copy.deepcopy(state)
    beams.apply(lambda x: x.index_select(0, order))
    got, steps, _ = generated(module, given, padding_BK, state)
    assert steps == LENGTH - PROMPT - 1
    for name in shallow.tensors.keys() - {"k", "v"}:
        x = shallow.tensors[name]
        assert torch.equal(x, before[name]), f"{name} was written where it lay"
    rest, seen_BK = want[:, PROMPT + 1 :], padding_BK[:, PROMPT + 1 :]
    assert_near(got, rest, seen_BK)
    assert_near(generated(module, given, padding_BK, copied)[0], rest, seen_BK)
    got, _, _ = generated(module, given.rows(order), padding_BK[order], beams)
    assert_near(got, rest[order], seen_BK[order])
    recording = module.new_state()
    recording.record(True)
    whole, _, _ = generated(module, given, padding_BK, recording)
    recording.crop(2)
    again, _, _ = generated(module, given, padding_BK, recording)
    assert_near(again, whole[:, -2:], padding_BK[:, -2:])


@pytest.mark.cpp
@pytest.mark.parametrize("case", [LINEAR[3], WINDOW[0], RECURRENT[0], RECURRENT[-1]], ids=str)
@torch.no_grad()
def test_a_state_of_fixed_length_keeps_its_place(built, case):
    given, module = inputs(2, LENGTH, **HEADS, dtype=torch.float32), module_of(case)
    state = module.new_state(LENGTH)
    mask = AttentionMask(2, PROMPT, PROMPT, causal=True)
    given.tokens(slice(0, PROMPT)).run(module, mask, state=state)
    places = {name: x.data_ptr() for name, x in state.tensors.items()}
    got, steps, _ = generated(module, given, None, state)
    assert steps == LENGTH - PROMPT
    assert_near(got, dense(case, module, given)[:, PROMPT:])
    assert {name: x.data_ptr() for name, x in state.tensors.items()} == places


@pytest.mark.cpp
@pytest.mark.parametrize("case", [LINEAR[3], WINDOW[0], RECURRENT[0], RECURRENT[-1]], ids=str)
def test_gradients_are_those_of_pytorch(built, case):
    """Where any are wanted, of a token, of a state or of weights, no step is compiled."""
    given, module = inputs(2, LENGTH, **HEADS, dtype=torch.float32), module_of(case)
    assert generated(module, given)[1] == 0, "its weights want gradients"
    frozen = module_of(case).requires_grad_(False)
    assert generated(frozen, given)[1] == LENGTH - PROMPT
    # A window is written where it lies unless what is written wants gradients: there all three do.
    for names in ["qkv"] if case in WINDOW else "qkv":
        leaf = copy.deepcopy(given)
        leaves = [getattr(leaf, name).detach().clone().requires_grad_() for name in names]
        for name, x in zip(names, leaves, strict=True):
            setattr(leaf, name, x)
        with torch.no_grad():
            assert generated(frozen, leaf)[1] == LENGTH - PROMPT
        out, steps, _ = generated(frozen, leaf)
        assert steps == 0
        for name, grad in zip(names, torch.autograd.grad(out.square().sum(), leaves), strict=True):
            assert grad[:, :, 1:].abs().amax((1, 3)).all(), f"no gradient goes to {name}"


@pytest.mark.cpp
@torch.no_grad()
def test_threads_share_the_heads(built):
    """A state large enough for that."""
    shape = {"num_heads": 8, "num_key_value_heads": 4, "head_dim": 128, "value_dim": 128}
    before = torch.get_num_threads()
    for case in (LINEAR[3], WINDOW[0], RECURRENT[-1]):
        given, module = inputs(3, LENGTH, **shape, dtype=torch.float32), module_of(case, **shape)
        outs = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                outs.append(generated(module, given)[0])
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*outs)


@pytest.mark.cpp
@rounds("case", [LINEAR[0], RECURRENT[0]])
@torch.no_grad()
def test_who_asked_for_pytorch_gets_it_and_who_cannot_be_served_too(built, case):
    def steps(module, **shape):
        dtype = next((x.dtype for x in module.parameters()), torch.float32)
        return generated(module, inputs(2, LENGTH, **{**HEADS, **shape}, dtype=dtype))[1]

    for backend, want in (("auto", LENGTH - PROMPT), ("cpp", LENGTH - PROMPT), ("torch", 0), ("batched", 0)):
        assert steps(module_of(case, backend)) == want, backend
    if case.cls.name == "linear":
        odd, favor = {"head_dim": 9}, Case(case.cls, {"feature_map": "favor"}, True)
        assert (steps(module_of(case, **odd), **odd), steps(module_of(favor))) == (0, 0)
    else:
        assert steps(module_of(case, dtype=torch.float64)) == 0


@pytest.mark.cpp
@torch.no_grad()
def test_an_attention_with_a_way_of_its_own_from_a_state_keeps_it(built):
    class Own(get_attention("linear")):
        def attend_from(self, *tokens, **options):
            return super().attend_from(*tokens, **options)

    assert Cpp().steps(get_attention("linear"))
    assert not Cpp().steps(Own)
    assert not Cpp().steps(get_attention("local"))
    given = inputs(2, LENGTH, **HEADS, dtype=torch.float32)
    assert generated(module_of(Case(Own, {"feature_map": "elu"}, True)), given)[1] == 0
    assert FeatureAttention.attend_from is get_attention("linear").attend_from


@pytest.mark.cpp
def test_what_does_not_fit_is_refused_by_the_operators(built):
    step = torch.ops.attn_plugins_cpp.linear_step.default
    q, k, v, sums = (torch.zeros(shape) for shape in ((1, 4, 1, 16), (1, 2, 1, 16), (1, 2, 1, 8), (1, 2, 16, 9)))
    nothing = (None,) * 5
    step(q, k, v, sums, *nothing, 0, 1e-6)
    for wrong, message in (
        ((q, k, torch.zeros(1, 2, 1, 9), sums), r"v must be \(1, 2, 1, 8\), got \[1, 2, 1, 9\]"),
        ((q, k, v, sums.double()), "of float32"),
        ((q[:, :3], k, v, sums), "3 query heads do not share 2 states"),
        ((q, k, v, torch.zeros(1, 2, 15, 9)), "a row of sums for each feature, got 16 and 15"),
        ((q[..., :15], k[..., :15], v, torch.zeros(1, 2, 15, 9)), "a multiple of 16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            step(*wrong, *nothing, 0, 1e-6)
    step = torch.ops.attn_plugins_cpp.recurrent_step.default
    with pytest.raises(RuntimeError, match="an average needs log gates"):
        step(q, k, v, sums, None, None, None, None)
    with pytest.raises(RuntimeError, match="states of 16 rows do not fit keys of size 16"):
        step(q, k, v, sums, None, None, torch.zeros(1, 2, 1, 1), torch.zeros(4))


@pytest.mark.cpp
def test_steps_are_what_torch_asks_of_operators(built):
    q, k, v, sums = (torch.randn(shape) for shape in ((1, 4, 1, 16), (1, 2, 1, 16), (1, 2, 1, 8), (1, 2, 16, 9)))
    checks = ("test_schema", "test_faketensor")
    linear, recurrent = torch.ops.attn_plugins_cpp.linear_step, torch.ops.attn_plugins_cpp.recurrent_step
    torch.library.opcheck(linear.default, (q, k, v, sums, *(None,) * 5, 0, 1e-6), test_utils=checks)
    gates = torch.zeros(1, 2, 1, 1)
    torch.library.opcheck(recurrent.default, (q, k, v, sums, None, gates, None, None), test_utils=checks)


FLAGS: list[dict] = [
    {"type": "linear"},
    {"type": "linear", "feature_map": "elu"},
    {"type": "retention"},
    {"type": "kimi_delta"},
    {"type": "linear_window", "window_size": 4},
]


@pytest.mark.cpp
@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: "-".join(map(str, flag.values())))
@torch.no_grad()
def test_models_generate_what_they_do_without(built, flag):
    """Beams beside left padding, drafts that are taken back, a static cache, a second turn."""
    config = transformers.LlamaConfig(**{**tiny.GROUPED, "hidden_size": 64, "head_dim": 16})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    models = []
    for backend in ("auto", "torch"):
        models.append(ap.swap_attention(copy.deepcopy(model), {**flag, "backend": backend}))
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    padding = left_padding((9, 5), 9).long()
    two, one = {"input_ids": ids, "attention_mask": padding}, {"input_ids": ids[:1].repeat(1, 2)}
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for given, options in (
        (two, {"num_beams": 3}),
        (one, {"prompt_lookup_num_tokens": 3}),
        (two, {"cache_implementation": "static"}),
    ):
        with Steps() as steps:
            got = models[0].generate(**given, **how, **options)
        assert torch.equal(got, models[1].generate(**given, **how, **options)), options
        assert steps.number, options
    turns = []
    for each in models:
        cache = transformers.DynamicCache(config=each.config)
        said = each.generate(one["input_ids"], **how, past_key_values=cache)
        turns.append(each.generate(torch.cat([said, ids[1:]], dim=1), **how, past_key_values=cache))
    assert torch.equal(*turns)


@torch.no_grad()
def test_a_backend_may_leave_a_call_to_the_attention(monkeypatch):
    """And is asked for one token alone."""
    from attn_plugins.core import backend as contract

    asked = []

    class Declines(Cpp):
        """Nothing."""

        def missing(self):
            return None

        def attend_from(self, attention, q, k, v, **options):
            asked.append(tuple(k.shape))

    monkeypatch.setattr(contract, "_instances", dict(contract._instances))
    monkeypatch.setattr(contract.BACKENDS, "classes", dict(contract.BACKENDS.classes))
    register_backend("declines")(Declines)
    case, given = LINEAR[0], inputs(2, LENGTH, **HEADS, dtype=torch.float32)
    got, _, _ = generated(module_of(case, "declines"), given)
    assert_near(got, dense(case, module_of(case), given))
    assert asked == [(2, 2, 1, 16)] * (LENGTH - PROMPT)


@torch.no_grad()
def test_a_step_beside_a_window_is_for_tokens_as_they_are():
    """Its scores and its sums are of the same queries and keys: another attention's may not be."""
    linear_window = get_attention("linear_window")

    class Own(linear_window):
        def prepare(self, q, k, *others, **options):
            return super().prepare(torch.nn.functional.normalize(q, dim=3), 2 * k, *others, **options)

    def attended(cls, feature_map, step):
        case = Case(cls, {"window_size": 3, "num_sink_tokens": 0, "feature_map": feature_map}, True)
        module, given, state = module_of(case), inputs(1, LENGTH, **HEADS, dtype=torch.float32), None
        module.requires_grad_(False)
        state = module.new_state()
        for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1)):
            mask, one = AttentionMask(1, end - start, end, causal=True), given.tokens(slice(start, end))
            how = {"state": state, "mask": mask, "scale": 0.25, "dropout": 0.0, "step": step}
            out = module.attend_from(one.q, one.k, one.v, **how)
        return out

    asked = []

    def step(prepared, k, v, *others):
        asked.append(1)
        return torch.zeros(len(v), prepared.q_BHQD.shape[1], 1, v.shape[3]), others[0]["sums"]

    attended(linear_window, "elu", step)
    attended(linear_window, "hedgehog", step)
    assert len(asked) == 2
    for cls, feature_map in ((Own, "elu"), (Own, "hedgehog"), (linear_window, "taylor")):
        assert torch.equal(attended(cls, feature_map, step), attended(cls, feature_map, None))
    assert len(asked) == 2
