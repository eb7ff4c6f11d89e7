"""What every attention in the registry keeps, ours and installed plug-ins' alike."""

import copy
import dataclasses
import json

import pytest
import torch
from cases import (
    EXACT,
    SCALE,
    Case,
    Inputs,
    assert_forms_agree,
    assert_same,
    cases_together,
    choice_loss,
    cotangent_for,
    every_case,
    every_class,
    head_shape,
    inputs,
    left_padding,
    one_direction,
    outcome,
    rounds,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attn_plugins.core.learned_choice import LearnsChoice
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.rules import parse_rules
from attn_plugins.ops.reference import dense_attention


@cases_together()
def test_config_survives_json(case):
    (rule,) = parse_rules({"type": case.cls.name, **case.options})
    assert parse_rules(json.loads(json.dumps(rule.to_dict()))) == [rule]


@every_class()
def test_misspelt_and_mistyped_options_are_refused(cls):
    with pytest.raises(ValueError, match="unknown option 'no_such_option'"):
        parse_rules({"type": cls.name, "no_such_option": 1})
    for option in (field.name for field in dataclasses.fields(cls.Config)):
        with pytest.raises(ValueError, match=f"{option}=.*allowed: "):
            parse_rules({"type": cls.name, option: {"no": "such value"}})


@every_case()
@rounds("length", [150])
def test_fast_form_equals_reference_in_float32(case, length):
    """Shorter texts are drawn below, and one of 65 tokens has half the precision."""
    given = inputs(2, length)
    assert_forms_agree(case, given, case.mask(2, length, length), dtype=torch.float32, tolerance=2e-5)


@every_case()
@rounds("length, dtype, tolerance", [(1, torch.bfloat16, 1e-2), (65, torch.bfloat16, 1e-2), (65, torch.float16, 2e-3)])
def test_fast_form_equals_reference_in_half_precision(case, length, dtype, tolerance):
    given = inputs(2, length).to(dtype).to(torch.float64)
    mask = case.mask(2, length, length, padding_BK=left_padding([length, length // 2 + 1], length))
    assert_forms_agree(case, given, mask, dtype=dtype, tolerance=tolerance)


@every_case(options={})
def test_fast_form_equals_reference_beyond_the_default_sizes(case):
    given = inputs(1, 331, num_heads=2, num_key_value_heads=1)
    mask = case.mask(1, 331, 331, padding_BK=left_padding([320], 331))
    assert_forms_agree(case, given, mask, dtype=torch.float32, tolerance=2e-5, num_heads=2, num_key_value_heads=1)


def assert_forms_agree_on_any_shape(case, data, **options):
    keys = data.draw(st.integers(1, 40), "K")
    fewer = case.causal and not case.module().wants_hidden_of_keys  # else a state alone goes on from earlier keys
    queries = data.draw(st.integers(1, keys), "Q") if fewer else keys
    groups, shared = data.draw(st.integers(1, 3), "G"), data.draw(st.integers(1, 3), "H / G")
    shared *= 1 if groups * shared % case.cls.heads_multiple_of == 0 else case.cls.heads_multiple_of
    lengths = data.draw(st.lists(st.integers(0, keys), min_size=1, max_size=3), "real keys")
    segments = None
    if case.cls.segments and data.draw(st.booleans(), "packed"):
        segments = torch.arange(keys).expand(len(lengths), -1) // data.draw(st.integers(1, 12), "segment length")
    shape = {"num_heads": groups * shared, "num_key_value_heads": groups, "head_dim": 4, "value_dim": 4}
    given = inputs(len(lengths), queries, keys, **shape)
    mask = case.mask(len(lengths), queries, keys, padding_BK=left_padding(lengths, keys), segments_BK=segments)
    assert_forms_agree(case, given, mask, **shape, **options)


@every_case()
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_fast_form_equals_reference_for_any_shape(case, data):
    assert_forms_agree_on_any_shape(case, data)


@every_case(causal=False)
def test_queries_may_be_the_last_of_more_keys(case):
    """As beside a prefix that a cache holds: the same as with a query for every key, or an error."""
    given, keys, queries = inputs(2, 23), 23, 18
    padding = left_padding([23, 15], keys).flip(1)
    whole = given.run(case.module(), case.mask(2, keys, keys, padding_BK=padding))[:, keys - queries :]
    module, mask = case.module(), case.mask(2, queries, keys, padding_BK=padding)
    try:
        got = given.queries(slice(keys - queries, None)).run(module, mask)
    except ValueError as error:
        hidden = f"needs the hidden states of all {keys} keys, got those of {queries} queries"
        if not any(why in str(error) for why in (f"got {queries} queries and {keys} keys; allowed: as many", hidden)):
            raise
        return
    real = padding[:, keys - queries :]
    torch.testing.assert_close(got[real], whole[real], atol=1e-9, rtol=1e-9)


@every_class()
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_fast_form_equals_reference_for_any_options(cls, data):
    """Each option at its default or at a value of an example, in any combination that the attention allows."""
    options = {}
    for field in dataclasses.fields(cls.Config):
        values = [example[field.name] for example in cls.examples if field.name in example]
        if values and data.draw(st.booleans(), f"{field.name} is set"):
            options[field.name] = data.draw(st.sampled_from(values), field.name)
    try:
        cls.Config(**options)
    except ValueError:
        assume(False)
    directions = [causal for causal in (True, False) if (cls.causal if causal else cls.bidirectional)]
    assert_forms_agree_on_any_shape(Case(cls, options, data.draw(st.sampled_from(directions), "causal")), data)


@every_case()
def test_gradients_equal_finite_differences(case):
    shape = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "value_dim": 4}
    given = inputs(2, 6, **shape)
    module = case.module(**shape)
    mask = case.mask(2, 6, 6, padding_BK=left_padding([6, 4], 6))
    leaves = [x.requires_grad_() for x in given.of_tokens()]

    def attend(q, k, v, hidden, *weights):
        return Inputs(q, k, v, hidden).run(module, mask) * mask.padding_BK[:, :, None, None]

    # Along random directions, which is quick; entry by entry gradients are compared with the reference above.
    torch.autograd.gradcheck(attend, (*leaves, *module.parameters()), fast_mode=True)


@cases_together()
def test_output_is_laid_out_as_transformers_expects(case):
    given = inputs(2, 9).to(torch.float32)
    module = case.module(dtype=torch.float32)
    mask = case.mask(2, 9, 9)
    out, weights = given.call(module, mask)
    assert out.shape == (2, 9, 4, 8)
    assert out.is_contiguous()
    assert weights is None
    same, weights = given.call(module, mask, need_weights=True)
    assert weights.shape == (2, 4, 9, 9)
    torch.testing.assert_close(same, out, rtol=1e-4, atol=1e-5)


@every_case()
def test_values_may_differ_in_size_from_keys_or_are_refused(case):
    given, mask = inputs(2, 11, value_dim=6), case.mask(2, 11, 11)
    refusal = None
    try:
        given.run(case.module(value_dim=6), mask)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert_forms_agree(case, given, mask, value_dim=6)
    else:
        assert "value" in refusal, "a refusal names the size that it refuses"


@every_case(causal=True)
@rounds("form", ["torch", "reference"])
def test_future_tokens_do_not_matter_when_causal(case, form):
    given, mask = inputs(2, 40), case.mask(2, 40, 40)
    module = case.module(backend=form)
    out = given.run(module, mask)
    for now in (0, 1, 7, 22, 38):
        changed = inputs(2, 40, seed=5)
        for x, other in zip(changed.of_tokens(), given.of_tokens(), strict=True):
            x.mul_(10)
            x[:, :, : now + 1] = other[:, :, : now + 1]
        assert_same({"out": changed.run(module, mask)[:, : now + 1]}, {"out": out[:, : now + 1]}, EXACT)


@every_case()
@rounds("form", ["torch", "reference"])
def test_left_padding_does_not_matter(case, form):
    given, module = inputs(1, 21), case.module(backend=form)
    alone = given.run(module, case.mask(1, 21, 21))
    for pad in (1, 4, 13):
        padded = inputs(1, 21 + pad, seed=3)
        for x, real in zip(padded.of_tokens(), given.of_tokens(), strict=True):
            x.mul_(10)
            x[:, :, pad:] = real
        mask = case.mask(1, 21 + pad, 21 + pad, padding_BK=left_padding([21], 21 + pad))
        assert_same({"out": padded.run(module, mask)[:, pad:]}, {"out": alone}, EXACT, f"{pad} pads: ")


@every_case()
def test_right_padding_does_not_matter(case):
    given, module = inputs(1, 21), case.module()
    alone = given.run(module, case.mask(1, 21, 21))
    padded = inputs(1, 30, seed=3)
    for x, real in zip(padded.of_tokens(), given.of_tokens(), strict=True):
        x[:, :, :21] = real
    mask = case.mask(1, 30, 30, padding_BK=torch.arange(30).unsqueeze(0) < 21)
    assert_same({"out": padded.run(module, mask)[:, :21]}, {"out": alone}, EXACT)


@every_case()
@rounds("form", ["torch", "reference"])
def test_half_of_the_heads_is_attended_to_alone_alike_or_refused(case, form):
    """As tensor parallelism does, where each process has some of the heads."""
    given, module = inputs(2, 26), case.module(backend=form)
    whole = given.run(module, case.mask(2, 26, 26))
    for part in (slice(0, 2), slice(2, 4)):
        pair = slice(part.start // 2, part.stop // 2)
        half = Inputs(given.q[:, part], given.k[:, pair], given.v[:, pair], given.hidden)
        if module.needs_all_heads:
            with pytest.raises(ValueError, match=r"was built for \(query heads.*\) = \(4, 2, 8\), got \(2, 1, 8\)"):
                half.run(module, case.mask(2, 26, 26))
            continue
        got = half.run(module, case.mask(2, 26, 26))
        torch.testing.assert_close(got, whole[:, :, part], rtol=0, atol=1e-9)


@every_case()
def test_rows_of_a_batch_do_not_matter_to_each_other(case):
    given, module = inputs(3, 24), case.module()
    padding = left_padding([24, 9, 17], 24)
    out = given.run(module, case.mask(3, 24, 24, padding_BK=padding))
    order = [2, 0, 1]
    reordered = given.rows(order).run(module, case.mask(3, 24, 24, padding_BK=padding[order]))
    for place, row in enumerate(order):
        real = padding[row]
        assert_same({"out": reordered[place, real]}, {"out": out[row, real]}, EXACT, f"row {row} reordered: ")
        alone = given.rows([row]).run(module, case.mask(1, 24, 24, padding_BK=padding[[row]]))
        assert_same({"out": alone[0, real]}, {"out": out[row, real]}, EXACT, f"row {row} alone: ")


@every_case(segments=True)
@rounds("form", ["torch", "reference"])
def test_packed_segments_do_not_leak(case, form):
    lengths = (5, 1, 19, 8)
    given, module = inputs(2, sum(lengths)), case.module(backend=form)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    packed = given.run(module, case.mask(2, sum(lengths), sum(lengths), segments_BK=segments))
    for segment, length in enumerate(lengths):
        inside = segments[0] == segment
        alone = given.tokens(inside).run(module, case.mask(2, length, length))
        assert_same({"out": packed[:, inside]}, {"out": alone}, EXACT, f"segment {segment}: ")


@every_case(segments=True)
def test_packed_segments_do_not_leak_through_gradients(case):
    given, module = inputs(1, 20), case.module()
    segments = (torch.arange(20) >= 8).long().unsqueeze(0)
    cotangent = cotangent_for(given, case.mask(1, 20, 20))
    cotangent[:, 8:] = 0
    got = outcome(module, given, case.mask(1, 20, 20, segments_BK=segments), cotangent)
    for name in ("q", "k", "v", "hidden"):
        gradient = got[f"gradient to {name}"]
        assert gradient is None or not gradient[:, :, 8:].any(), (
            f"the second segment gets a gradient to {name} of the first"
        )


@every_case(causal=True)
@rounds("pad", [0, 6])
def test_cached_decoding_equals_one_pass(case, pad):
    given, module = inputs(2, 37), case.module()
    padding = left_padding([37, 37 - pad], 37) if pad else None

    def mask(queries, keys):
        return case.mask(2, queries, keys, padding_BK=None if padding is None else padding[:, :keys])

    out = given.run(module, mask(37, 37))
    if module.wants_hidden_of_keys:
        with pytest.raises(ValueError, match="needs the hidden states of all 37 keys, got those of 1 queries"):
            given.queries(slice(36, None)).run(module, mask(1, 37))
        return
    for now in (pad, pad + 1, 14, 15, 16, 23, 31, 32, 35, 36):  # around ends of blocks of 2 to 16 too
        step = given.tokens(slice(now + 1)).queries(slice(now, None))
        decoded = step.run(module, mask(1, now + 1))
        assert_same({"out": decoded[:, 0]}, {"out": out[:, now]}, EXACT, f"token {now}: ")


@every_case(causal=True)
@rounds("chunk", [2, 11, 16])
def test_prefill_in_chunks_equals_one_pass(case, chunk):
    given, module = inputs(2, 37), case.module()
    padding = left_padding([37, 30], 37)
    out = given.run(module, case.mask(2, 37, 37, padding_BK=padding))
    for low in range(0, 37, chunk):
        high = min(low + chunk, 37)
        part = given.tokens(slice(high)).queries(slice(low, None))
        if module.wants_hidden_of_keys and low:
            break  # as above: they go on from a state alone, which the tests of states hold to one pass
        got = part.run(module, case.mask(2, high - low, high, padding_BK=padding[:, :high]))
        real = padding[:, low:high, None, None]
        assert_same({"out": got * real}, {"out": out[:, low:high] * real}, EXACT, f"tokens {low} to {high}: ")


@every_case()
def test_effective_weights_give_the_output(case):
    given, module = inputs(2, 23), case.module()
    mask = case.mask(2, 23, 23, padding_BK=left_padding([23, 14], 23))
    out, weights = given.call(module, mask, need_weights=True)
    assert weights.shape == (2, 4, 23, 23)
    assert not weights.masked_select(~mask.dense()).any(), "reference gives an invisible key a weight"
    if not case.cls.convex:
        return
    real = mask.padding_BK[:, None, :, None]
    assert (weights >= 0).all(), "weights are below 0: set `convex = False`"
    total = weights.sum(dim=-1, keepdim=True)
    assert ((total - 1).abs() < 1e-3).logical_or(total < 1e-3).logical_or(~real).all(), (
        "weights do not sum to 1: set `convex = False`"
    )
    assert (total > 0.5).double().mean() > 0.5, "most queries have no weights: set `convex = False`"
    from_weights = weights @ given.v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(out * real.transpose(1, 2), from_weights.transpose(1, 2) * real.transpose(1, 2))


@every_class()
def test_limit_case_is_softmax_attention(cls):
    none = "Limit case: none" in cls.__doc__
    assert cls.limit is not None or none, (
        "say 'Limit case: none.' in the docstring, or set `limit` to options under which it equals softmax attention"
    )
    assert cls.limit is None or not none, "the docstring says 'Limit case: none.': say which `limit` is, or set none"
    if cls.limit is None:
        return
    for causal in (True, False):
        if not (cls.causal if causal else cls.bidirectional):
            continue
        module = cls(cls.Config(**cls.limit), head_shape())
        module.reset_parameters()
        given = inputs(2, 50)
        mask = AttentionMask(2, 50, 50, causal=causal, padding_BK=left_padding([50, 33], 50))
        want, _ = dense_attention(given.q, given.k, given.v, mask.dense(), scale=SCALE)
        real = mask.padding_BK[:, :, None, None]
        got = given.run(module.double(), mask)
        assert_same({"out": got * real}, {"out": want.transpose(1, 2) * real}, EXACT)


@cases_together()
def test_every_weight_gets_a_gradient(case):
    module = case.cls(case.cls.Config(**case.options), head_shape())
    module.reset_parameters()
    given, mask = inputs(2, 150).to(torch.float32), case.mask(2, 150, 150)
    # After one step, since a weight may be fed by another that starts at zero.
    for _ in range(2):
        out = given.run(module, mask)
        module.zero_grad()
        if not list(module.parameters()):
            return
        (out * cotangent_for(given, mask)).sum().backward()
        if isinstance(module, LearnsChoice):  # whose weights have a gradient of zero there, and learn from this alone
            assert not any(weight.grad is None or weight.grad.any() for weight in module.parameters())
            choice_loss(module, given, mask).backward()
        with torch.no_grad():
            for weight in module.parameters():
                weight.sub_(0.1 * weight.grad)
    for name, weight in module.named_parameters():
        assert weight.grad is not None, f"{name} has no gradient"
        assert weight.grad.isfinite().all(), f"the gradient to {name} is not finite"
        assert weight.grad.any(), f"the gradient to {name} is zero"


@cases_together()
def test_reset_parameters_initialises_everything(case):
    module = case.cls(case.cls.Config(**case.options), head_shape())
    states = []
    for _ in range(2):
        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        torch.manual_seed(3)
        module.reset_parameters()
        states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    for name, tensor in states[0].items():
        assert tensor.isfinite().all(), f"{name} is left as it was"
        assert torch.equal(tensor, states[1][name]), f"{name} is not the same after the same seed"


@cases_together()
def test_state_dict_carries_everything(case):
    given, mask = inputs(2, 20), case.mask(2, 20, 20)
    module = case.module()
    other = case.cls(module.config, module.heads).double()
    other.load_state_dict(module.state_dict())
    assert torch.equal(given.run(other, mask), given.run(module, mask))
    assert torch.equal(given.run(copy.deepcopy(module), mask), given.run(module, mask))


@every_case()
def test_rows_without_a_real_token_stay_finite(case):
    given, module = inputs(2, 12).to(torch.float32), case.module(dtype=torch.float32)
    mask = case.mask(2, 12, 12, padding_BK=left_padding([0, 12], 12))
    got = outcome(module, given, mask, torch.ones(2, 12, 4, 8))
    for name, tensor in got.items():
        assert tensor is None or tensor.isfinite().all(), f"{name} is not finite"
    alone = given.rows([1]).run(module, case.mask(1, 12, 12))
    assert_same({"out": got["out"][1:]}, {"out": alone}, 1e-5)


@every_case()
def test_large_scores_stay_finite(case):
    given, module = inputs(2, 30).to(torch.float32), case.module(dtype=torch.float32)
    given.q, given.k = 60 * given.q, 60 * given.k
    got = outcome(module, given, case.mask(2, 30, 30), torch.ones(2, 30, 4, 8))
    for name, tensor in got.items():
        assert tensor is None or tensor.isfinite().all(), f"{name} is not finite"


@every_case(dropout=True)
def test_dropout_is_drawn_from_the_global_generator(case):
    given, module, mask = inputs(2, 30), case.module(), case.mask(2, 30, 30)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(outcome(module, given, mask, cotangent_for(given, mask), dropout=0.4))
    assert_same(runs[1], runs[0], 0.0)
    for name, tensor in runs[2].items():
        assert tensor is None or tensor.isfinite().all(), f"{name} is not finite"


@every_case()
def test_mixed_dtypes_of_autocast_are_taken(case):
    given, module = inputs(2, 20).to(torch.bfloat16).to(torch.float32), case.module(dtype=torch.float32)
    mask = case.mask(2, 20, 20)
    cotangent = cotangent_for(given, mask)
    want = outcome(module, given, mask, cotangent)
    # Rotary positions leave queries and keys in float32 under autocast, values come from a linear layer in bfloat16.
    given.v = given.v.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outcome(module, given, mask, cotangent)
    assert got["out"].dtype == torch.bfloat16
    assert_same(got, want, 2e-2)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's own, at a graph break
@one_direction(options={}, causal=False)
def test_a_compiled_model_gives_the_same(case):
    given, module = inputs(2, 70), case.module()

    def layer(q, k, v, hidden):
        wanted = {"hidden": hidden.squeeze(1)} if module.wants_hidden else {}
        return 2 * module(q + 1, k, v, mask=case.mask(2, 70, 70, device=q.device), scale=SCALE, **wanted)[0]

    leaves = [x.requires_grad_() for x in given.of_tokens()]
    torch.compiler.reset()
    got, want = torch.compile(layer, backend="eager")(*leaves), layer(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(out.sum(), leaves, allow_unused=True) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """Notes the largest storage that any operation makes, in elements."""

    def __init__(self):
        super().__init__()
        self.elements, self.made_by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if elements > self.elements:
                    self.elements, self.made_by = elements, str(func)
        return result


@every_case(subquadratic=True)
@rounds("padded", [False, True])
def test_nothing_of_length_squared_is_allocated(case, padded):
    """At 512 tokens, or at up to 2,048 where a tensor of another size is still the largest there."""
    shape = {"num_heads": case.cls.heads_multiple_of, "num_key_value_heads": 1}
    module = case.module(**shape, dtype=torch.float32)
    for length in (512, 1024, 2048):
        given = inputs(1, length, **shape).to(torch.float32)
        mask = case.mask(1, length, length, padding_BK=left_padding([length - 5], length) if padded else None)
        cotangent = cotangent_for(given, mask)
        with Largest() as largest:
            outcome(module, given, mask, cotangent)
        assert largest.elements > 0
        if largest.elements < length * length:
            return
    raise AssertionError(f"{largest.made_by} makes a tensor of {largest.elements} elements")
