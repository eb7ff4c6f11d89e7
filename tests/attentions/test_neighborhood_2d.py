"""Neighbourhoods on a grid: who sees whom, tiles, what is refused, and the contract at lengths that are grids."""

import itertools
import math

import pytest
import test_capabilities
import test_contract
import test_dropping
import torch
from cases import SCALE, Case, assert_forms_agree, assert_same, inputs, kept_for_backward, left_padding, outcome
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from attn_plugins.attentions.neighborhood_2d import Neighborhood2dAttention
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.grid import Grid
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.softmax.patterns.neighborhood import Neighborhood

FORMS = ["torch", "batched"]


def neighborhood_2d(**options):
    return Case(Neighborhood2dAttention, options, False)


def whole(batch, length, **options):
    return AttentionMask(batch, length, length, causal=False, **options)


def nearest(place, length, kernel_size, dilation):
    """Of the runs of kernel_size places of the same phase, the one whose middle is nearest to the place."""
    phase = list(range(place % dilation, length, dilation))
    if len(phase) <= kernel_size:
        return phase
    runs = [phase[start : start + kernel_size] for start in range(len(phase) - kernel_size + 1)]
    return min(runs, key=lambda run: abs(run[kernel_size // 2] - place))


PATTERNS = list(
    itertools.product([(5, 5), (4, 7), (1, 6), (13, 3), (19, 18)], [(1, 1), (3, 1), (4, 1), (3, 2), (2, 3)], [0, 1, 3])
)


@pytest.mark.parametrize(("grid_size", "window", "num_prefix_tokens"), PATTERNS)
def test_each_patch_sees_the_nearest_and_the_prefix(grid_size, window, num_prefix_tokens):
    (height, width), (kernel_size, dilation) = grid_size, window
    length = num_prefix_tokens + height * width
    options = {"kernel_size": kernel_size, "dilation": dilation, "num_prefix_tokens": num_prefix_tokens}
    module = neighborhood_2d(**options, grid_size=grid_size).module(1, 1, value_dim=length)
    given = inputs(1, length, num_heads=1, num_key_value_heads=1)
    given.v = torch.eye(length, dtype=torch.float64).expand(1, 1, -1, -1)
    got = given.run(module, whole(1, length))[0, :, 0] > 0
    want = torch.zeros(length, length, dtype=torch.bool)
    want[:num_prefix_tokens], want[:, :num_prefix_tokens] = True, True
    for row, column in itertools.product(range(height), range(width)):
        down, across = nearest(row, height, kernel_size, dilation), nearest(column, width, kernel_size, dilation)
        if min(grid_size) >= kernel_size * dilation:
            assert len(down) == len(across) == kernel_size
        for i, j in itertools.product(down, across):
            want[num_prefix_tokens + row * width + column, num_prefix_tokens + i * width + j] = True
    assert torch.equal(got, want)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # flex_attention's, uncompiled
@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (4, 1), (5, 2), (4, 2), (3, 3)])
def test_equals_natten(kernel_size, dilation):
    """Ours differs on purpose where the grid is smaller than kernel_size x dilation, which NATTEN refuses."""
    natten = pytest.importorskip("natten", reason="natten is not installed")
    given = inputs(2, 11 * 13, num_key_value_heads=4).to(torch.float32)
    grids = [x.transpose(1, 2).reshape(2, 11, 13, 4, 8) for x in (given.q, given.k, given.v)]
    options = {"kernel_size": kernel_size, "dilation": dilation}
    want = natten.na2d(*grids, **options, scale=SCALE, backend="flex-fna")
    case = neighborhood_2d(**options, num_prefix_tokens=0, grid_size=(11, 13))
    got = given.run(case.module(4, 4, dtype=torch.float32), whole(2, 11 * 13))
    assert_same({"out": got}, {"out": want.flatten(1, 2)}, 2e-6)


@pytest.mark.parametrize("backend", FORMS)
@settings(max_examples=40, deadline=None, derandomize=True)
@drawn(data=st.data())
def test_forms_agree_on_any_grid(backend, data):
    grid_size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)), "grid")
    options = {
        "kernel_size": data.draw(st.integers(1, 8), "kernel"),
        "dilation": data.draw(st.integers(1, 4), "dilation"),
        "num_prefix_tokens": data.draw(st.integers(0, 5), "prefix"),
        "grid_size": grid_size,
    }
    length = math.prod(grid_size) + options["num_prefix_tokens"]
    groups, shared = data.draw(st.integers(1, 2), "G"), data.draw(st.integers(1, 2), "H / G")
    shape = {"num_heads": groups * shared, "num_key_value_heads": groups, "head_dim": 4, "value_dim": 6}
    given = inputs(2, length, **shape)
    assert_forms_agree(neighborhood_2d(**options), given, whole(2, length), backend=backend, **shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("options", [{}, *Neighborhood2dAttention.examples])
@pytest.mark.parametrize("backend", FORMS)
def test_forms_agree_in_other_dtypes(backend, options, dtype, tolerance):
    length = 100 + options.get("num_prefix_tokens", 1)
    given, case = inputs(2, length).to(dtype).to(torch.float64), neighborhood_2d(**options)
    assert_forms_agree(case, given, whole(2, length), dtype=dtype, tolerance=tolerance, backend=backend)


def test_the_batched_form_is_part_of_a_graph():
    given, mask = inputs(2, 40).to(torch.float32), whole(2, 40)
    module = neighborhood_2d(kernel_size=3, grid_size=(3, 13)).module(backend="batched", dtype=torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled.wants_hidden, compiled.parameters = False, module.parameters
    cotangent = torch.ones(2, 40, 4, 8)
    assert_same(outcome(compiled, given, mask, cotangent), outcome(module, given, mask, cotangent), 1e-4)


CONTRACT = {
    test_contract.test_config_survives_json.of_case: (3, 3),
    test_contract.test_output_is_laid_out_as_transformers_expects.of_case: (3, 3),
    test_contract.test_values_may_differ_in_size_from_keys_or_are_refused: (1, 11),
    test_contract.test_state_dict_carries_everything.of_case: (4, 5),
    test_contract.test_large_scores_stay_finite: (5, 6),
    test_contract.test_dropout_is_drawn_from_the_global_generator: (6, 5),
    test_contract.test_mixed_dtypes_of_autocast_are_taken: (4, 5),
    test_contract.test_a_compiled_model_gives_the_same: (7, 10),
}
"""Tests of sequences without padding, and a grid of the length that they have."""


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_keeps_the_contract(test):
    test(neighborhood_2d(kernel_size=3, num_prefix_tokens=0, grid_size=CONTRACT[test]))


@pytest.mark.parametrize("form", [*FORMS, "reference"])
def test_keeps_the_contract_on_dropout(form):
    case = neighborhood_2d(kernel_size=3, num_prefix_tokens=0, grid_size=(3, 4))
    test_dropping.test_dropout_keeps_the_mean_or_is_left_out_with_a_warning(case, form=form)


@pytest.mark.parametrize("capability", test_capabilities.NEEDS)
def test_honours_what_it_declares(capability):
    extras, options, need = test_capabilities.NEEDS[capability]
    given, mask = inputs(2, 10), AttentionMask(2, 10, 10, **{"causal": False, **options})
    given.extras = extras
    module = neighborhood_2d(kernel_size=3).module()
    if getattr(Neighborhood2dAttention, capability):
        assert given.run(module, mask).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"this call needs {need}.*, which attention 'neighborhood_2d' cannot honour"):
        given.run(module, mask)


@pytest.mark.parametrize("extras", ["position_bias", "softcap", "sinks", "position_bias softcap sinks"])
@pytest.mark.parametrize("backend", FORMS)
def test_extras_equal_the_reference(backend, extras):
    generator = torch.Generator().manual_seed(1)
    every = {
        "position_bias": torch.randn(1, 4, 41, 41, generator=generator, dtype=torch.float64),
        "softcap": 0.5,
        "sinks": torch.randn(4, generator=generator, dtype=torch.float64),
    }
    given = inputs(2, 41)
    case, plain = neighborhood_2d(kernel_size=3, dilation=2, grid_size=(4, 10)), given.run
    before = plain(case.module(), whole(2, 41))
    given.extras = {name: every[name] for name in extras.split()}
    assert_forms_agree(case, given, whole(2, 41), backend=backend)
    assert not torch.allclose(given.run(case.module(), whole(2, 41)), before)


@pytest.mark.parametrize("backend", FORMS)
def test_a_mask_of_the_models_own_hides_patches_within(backend):
    def rule(b, h, q, k):
        return (q + k + b) % 3 > 0

    case = neighborhood_2d(kernel_size=3, dilation=2)  # four tiles that would hide the same without the mask
    lazy = whole(2, 65, plain=False, rule=rule)
    assert_forms_agree(case, inputs(2, 65), lazy, backend=backend)
    dense = whole(2, 65, plain=False, dense_BQK=lazy.dense()[:, 0])
    assert_forms_agree(case, inputs(2, 65), dense, backend=backend)
    assert not torch.allclose(inputs(2, 65).run(case.module(), lazy), inputs(2, 65).run(case.module(), whole(2, 65)))


def test_gradients_equal_finite_differences():
    shape = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "value_dim": 4}
    given, module = inputs(1, 7, **shape), neighborhood_2d(kernel_size=2, grid_size=(2, 3)).module(**shape)
    for dropout in (0.0, 0.3):

        def attend(q, k, v, dropout=dropout):
            torch.manual_seed(5)
            return module(q, k, v, mask=whole(1, 7), scale=SCALE, dropout=dropout)[0]

        torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (given.q, given.k, given.v)])


def test_dropout_keeps_the_mean():
    given, module, mask = inputs(1, 26), neighborhood_2d(kernel_size=3).module(), whole(1, 26)
    torch.manual_seed(0)
    mean = torch.stack([given.run(module, mask, dropout=0.3) for _ in range(200)]).mean(dim=0)
    torch.testing.assert_close(mean, given.run(module, mask), rtol=0, atol=0.3)


def test_limit_case_is_softmax_attention():
    given, mask = inputs(2, 50), whole(2, 50)
    want, _ = dense_attention(given.q, given.k, given.v, mask.dense(), scale=SCALE)
    got = given.run(neighborhood_2d(**Neighborhood2dAttention.limit).module(), mask)
    assert_same({"out": got}, {"out": want.transpose(1, 2)}, 1e-12)
    smaller = given.run(neighborhood_2d(kernel_size=6).module(), mask)
    assert not torch.allclose(smaller, got)


@pytest.mark.parametrize(("kernel_size", "dilation", "waste"), [(7, 1, 4.1), (7, 4, 4.1), (13, 1, 2.5)])
def test_tiles_hold_few_pairs_beside_the_visible_ones_and_share_what_they_hide(kernel_size, dilation, waste):
    pattern = Neighborhood(Grid((64, 64)), 0, (kernel_size,) * 2, (dilation,) * 2, (False, False))
    tiles = list(pattern.tiles(whole(1, 64 * 64)))
    pairs = sum(tile.queries.numel() * tile.extra.numel() for tile in tiles)
    assert pairs <= waste * 64 * 64 * kernel_size**2
    assert len({id(tile.hidden) for tile in tiles}) <= 9  # corners, edges and the middle


def test_nothing_of_length_squared_is_allocated():
    shape = {"num_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "value_dim": 8}
    given, mask = inputs(1, 2305, **shape).to(torch.float32), whole(1, 2305)
    with test_contract.Largest() as largest:
        outcome(neighborhood_2d().module(**shape, dtype=torch.float32), given, mask, torch.ones(1, 2305, 1, 8))
    assert 0 < largest.elements < 2305 * 50


def test_nothing_but_inputs_is_kept_for_the_backward():
    given = inputs(1, 401)
    kept = kept_for_backward(neighborhood_2d().module(), given, whole(1, 401))
    assert 0 < kept <= given.q.numel() + given.k.numel() + given.v.numel()


def test_transposed_inputs_are_not_copied_for_each_tile(monkeypatch):
    """index_select makes the whole of its input contiguous first: quadratic over the tiles."""
    given, select = inputs(1, 401), torch.Tensor.index_select

    def strict(x, dim, index):
        assert x.is_contiguous(), "a transposed view is copied for a few of its entries"
        return select(x, dim, index)

    assert not given.k.is_contiguous()
    monkeypatch.setattr(torch.Tensor, "index_select", strict)
    outcome(neighborhood_2d().module(), given, whole(1, 401), torch.ones(401, 1, 4, 8).transpose(0, 1))


def test_lengths_that_are_no_grid_are_refused():
    def run(tokens, **options):
        return inputs(1, tokens).run(neighborhood_2d(**options).module(), whole(1, tokens))

    run(26)
    run(13, grid_size=(3, 4))
    with pytest.raises(
        ValueError, match=r"got 25 tokens, of which 1 come before .*; allowed: a square number of patches"
    ):
        run(25)
    with pytest.raises(ValueError, match=r"got 26 tokens, of which 0 come before the patches .*; allowed: a square"):
        run(26, num_prefix_tokens=0)
    with pytest.raises(
        ValueError, match=r"got 12 tokens, of which 1 come before .*; allowed: 3 x 4 patches \(grid_size\)"
    ):
        run(12, grid_size=(3, 4))
    for tokens in (1, 3):
        with pytest.raises(ValueError, match=f"got {tokens} tokens, of which 3 come before the patches"):
            run(tokens, num_prefix_tokens=3)
    with pytest.raises(
        ValueError, match="takes whole images, got 5 queries and 26 keys; allowed: as many queries as keys"
    ):
        inputs(1, 5, 26).run(neighborhood_2d().module(), AttentionMask(1, 5, 26, causal=False))


def test_padding_is_refused_unless_there_is_none():
    module = neighborhood_2d(kernel_size=3).module()
    inputs(2, 26).run(module, whole(2, 26, padding_BK=left_padding([26, 26], 26)))
    with pytest.raises(ValueError, match="got padding; allowed: images of one size in a batch"):
        inputs(2, 26).run(module, whole(2, 26, padding_BK=left_padding([26, 25], 26)))


def test_options_out_of_range_are_refused():
    for option, least, none in (("kernel_size", 1, ""), ("dilation", 1, ""), ("num_prefix_tokens", 0, "None or ")):
        with pytest.raises(ValueError, match=f"{option}={least - 1}; allowed: {none}an integer from {least} on"):
            Neighborhood2dAttention.Config(**{option: least - 1})
    for grid in ((3,), (0, 4), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"grid_size=.*; allowed: None or \(height, width\)"):
            Neighborhood2dAttention.Config(grid_size=grid)


def test_the_grid_of_the_model_is_taken_where_it_has_as_many_patches():
    heads = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "value_dim": 8}
    options = {"kernel_size": 3, "num_prefix_tokens": 0}

    def run(length, known, **more):
        module = Neighborhood2dAttention(
            Neighborhood2dAttention.Config(**options, **more), HeadShape(**heads, grid_size=known)
        )
        return inputs(1, length).run(module, AttentionMask(1, length, length, causal=False))

    told = {grid: run(16, None, grid_size=grid) for grid in ((2, 8), (4, 4), (8, 2))}
    assert torch.equal(run(16, (2, 8)), told[2, 8])
    assert not torch.equal(told[2, 8], told[4, 4])
    assert torch.equal(run(16, (2, 8), grid_size=(8, 2)), told[8, 2]), "the option counts first"
    with pytest.raises(ValueError, match=r"got 16 tokens.*; allowed: 3 x 3 patches \(grid_size\)"):
        run(16, (3, 3))


def test_the_grid_of_the_image_counts_before_that_of_the_model():
    heads = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, grid_size=(4, 4))
    given, mask = inputs(1, 16), AttentionMask(1, 16, 16, causal=False)

    def run(told=None, **options):
        config = Neighborhood2dAttention.Config(kernel_size=3, num_prefix_tokens=0, **options)
        module = Neighborhood2dAttention(config, heads)
        return module(given.q, given.k, given.v, mask=mask, scale=SCALE, grid_size=told)[0]

    assert torch.equal(run((2, 8)), run(grid_size=(2, 8)))
    assert torch.equal(run((2, 8), grid_size=(8, 2)), run(grid_size=(8, 2))), "the option counts first"
    with pytest.raises(ValueError, match=r"got 16 tokens.*; allowed: 3 x 5 patches \(grid_size\)"):
        run((3, 5))
