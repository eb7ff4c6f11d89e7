"""Attentions on a grid of patches: who sees whom by definition, tiles, orders of tokens, what is refused."""

import itertools
import math

import pytest
import test_capabilities
import test_contract
import test_dropping
import torch
from cases import Case, assert_forms_agree, assert_same, inputs, outcome
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from test_neighborhood_2d import CONTRACT, FORMS, nearest, whole

from attn_plugins.attentions.axial import AxialAttention
from attn_plugins.attentions.neighborhood_2d import Neighborhood2dAttention
from attn_plugins.attentions.neighborhood_3d import Neighborhood3dAttention
from attn_plugins.attentions.window_2d import Window2dAttention
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.grid import Grid, order_of, tokens_of
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops.reference import dense_attention
from attn_plugins.ops.softmax.block_limits import MaskOfBlocks, visible_blocks
from attn_plugins.ops.softmax.tiles import dense_pattern

NAMES = ["neighborhood_3d", "axial", "window_2d"]
IMAGES, VIDEOS = [(5, 5), (4, 7), (1, 6), (13, 3), (19, 18)], [(3, 4, 5), (1, 6, 6), (5, 2, 9), (2, 9, 10)]
OPTIONS = {
    "neighborhood_3d": [
        {"kernel_size": (3, 3, 3)},
        {"kernel_size": (2, 3, 4), "dilation": (1, 2, 2)},
        {"kernel_size": (3, 5, 1), "dilation": (2, 1, 1), "causal_time": True},
    ],
    "axial": [{}, {"axes": ("width", "time")}, {"axes": ("height",)}, {"axes": ("height+width", "time")}],
    "window_2d": [
        {"window_size": 3, "shift_size": 0},
        {"window_size": 4, "shift_size": 3},
        {"window_size": 30, "shift_size": 1},
    ],
}


def grids_of(name):
    return {"neighborhood_3d": VIDEOS, "window_2d": IMAGES, "axial": [*IMAGES, *VIDEOS]}[name]


def case_of(name, **options):
    return Case(get_attention(name), options, False)


def neighbours(place, length, kernel_size, dilation, causal):
    if not causal:
        return nearest(place, length, kernel_size, dilation)
    return list(range(place % dilation, place + 1, dilation))[-kernel_size:]


def sees(name, options, sides, q, k):
    """Whether the patch at q sees that at k, as the docstrings say it."""
    if name == "neighborhood_3d":
        dilation, causal = options.get("dilation", (1, 1, 1)), (options.get("causal_time", False), False, False)
        each = zip(q, k, sides, options["kernel_size"], dilation, causal, strict=True)
        return all(b in neighbours(a, side, size, step, until) for a, b, side, size, step, until in each)
    if name == "window_2d":
        size, shift = options["window_size"], options["shift_size"]
        return all((a + shift) // size == (b + shift) // size for a, b in zip(q, k, strict=True))
    differ = {axis for axis, a, b in zip(("width", "height", "time"), q[::-1], k[::-1], strict=False) if a != b}
    return any(differ <= {*span.split("+")} for span in options.get("axes", ("time", "height", "width")))


def definition(name, options, sides, prefix):
    places = list(itertools.product(*map(range, sides)))
    seen = torch.ones(prefix + len(places), prefix + len(places), dtype=torch.bool)
    seen[prefix:, prefix:] = torch.tensor([[sees(name, options, sides, q, k) for k in places] for q in places])
    return seen


def seen_by(case, grid, prefix, **call):
    """Who sees whom: weights on values that are the unit vectors."""
    length = prefix + math.prod(grid)
    given = inputs(1, length, num_heads=1, num_key_value_heads=1)
    given.v = torch.eye(length, dtype=torch.float64).expand(1, 1, -1, -1)
    module = case.module(1, 1, value_dim=length)
    return module(given.q, given.k, given.v, mask=whole(1, length), scale=0.4, **call)[0][0, :, 0] > 0


SEEN = [
    (name, options, grid, prefix)
    for name in NAMES
    for options, grid, prefix in itertools.product(OPTIONS[name], grids_of(name), [0, 3])
    if math.prod(grid) < 200 and not (options.get("axes") == ("width", "time") and len(grid) == 2 and prefix)
]


@pytest.mark.parametrize("name", NAMES)
def test_each_patch_sees_what_the_definition_says(name):
    for _, options, grid, prefix in (case for case in SEEN if case[0] == name):
        case = case_of(name, **options, num_prefix_tokens=prefix, grid_size=grid)
        assert torch.equal(seen_by(case, grid, prefix), definition(name, options, grid, prefix)), (options, grid)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None, derandomize=True)
@drawn(data=st.data())
def test_forms_agree_on_any_grid(name, backend, data):
    options = dict(data.draw(st.sampled_from(OPTIONS[name]), "options"))
    grid = data.draw(st.sampled_from([grid for grid in grids_of(name) if math.prod(grid) < 200]), "grid")
    options |= {"grid_size": grid, "num_prefix_tokens": data.draw(st.integers(0, 3), "prefix")}
    length = math.prod(grid) + options["num_prefix_tokens"]
    groups, shared = data.draw(st.integers(1, 2), "G"), data.draw(st.integers(1, 2), "H / G")
    shape = {"num_heads": groups * shared, "num_key_value_heads": groups, "head_dim": 4, "value_dim": 6}
    assert_forms_agree(case_of(name, **options), inputs(2, length, **shape), whole(2, length), backend=backend, **shape)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize(
    ("name", "options", "grid"),
    [
        ("axial", {"axes": ("width",)}, (1, 300)),
        ("axial", {}, (3, 129)),
        ("axial", {"axes": ("height+width", "time")}, (2, 12, 13)),
        ("window_2d", {"window_size": 15, "shift_size": 2}, (19, 18)),
        ("neighborhood_3d", {"kernel_size": (3, 3, 3), "causal_time": True}, (4, 9, 10)),
    ],
)
def test_forms_agree_where_a_line_or_window_is_several_tiles(name, options, grid, backend):
    case, length = case_of(name, **options, grid_size=grid), math.prod(grid) + 1
    assert_forms_agree(case, inputs(1, length), whole(1, length), backend=backend)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_forms_agree_in_other_dtypes(name, backend, dtype, tolerance):
    for options in get_attention(name).examples:
        length = 36 + options.get("num_prefix_tokens", 1)
        given = inputs(2, length).to(dtype).to(torch.float64)
        assert_forms_agree(
            case_of(name, **options), given, whole(2, length), dtype=dtype, tolerance=tolerance, backend=backend
        )


SMALL = {
    "neighborhood_3d": {"kernel_size": (1, 3, 3)},
    "axial": {},
    "window_2d": {"window_size": 3, "shift_size": 1},
}


def on(name, grid, **options):
    grid = (1, *grid) if name == "neighborhood_3d" else grid
    return case_of(name, **SMALL[name], num_prefix_tokens=0, grid_size=grid, **options)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contract(name, test):
    test(on(name, CONTRACT[test]))


@pytest.mark.parametrize("form", [*FORMS, "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contract_on_dropout(name, form):
    test_dropping.test_dropout_keeps_the_mean_or_is_left_out_with_a_warning(on(name, (3, 4)), form=form)


@pytest.mark.parametrize("name", NAMES)
def test_honours_what_it_declares(name):
    for capability, (extras, options, need) in test_capabilities.NEEDS.items():
        given, mask = inputs(2, 10), AttentionMask(2, 10, 10, **{"causal": False, **options})
        given.extras = extras
        module = on(name, (2, 5)).module()
        if getattr(get_attention(name), capability):
            assert given.run(module, mask).isfinite().all()
            continue
        with pytest.raises(ValueError, match=f"this call needs {need}.*, which attention '{name}' cannot honour"):
            given.run(module, mask)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_extras_and_a_mask_of_the_models_own_equal_the_reference(name, backend):
    def rule(b, h, q, k):
        return (q + k + b) % 3 > 0

    generator = torch.Generator().manual_seed(1)
    case = on(name, (9, 10))
    given = inputs(2, 90)
    assert_forms_agree(case, given, whole(2, 90, plain=False, rule=rule), backend=backend)
    before = given.run(case.module(), whole(2, 90))
    given.extras = {
        "position_bias": torch.randn(1, 4, 90, 90, generator=generator, dtype=torch.float64),
        "softcap": 0.5,
        "sinks": torch.randn(4, generator=generator, dtype=torch.float64),
    }
    assert_forms_agree(case, given, whole(2, 90), backend=backend)
    assert not torch.allclose(given.run(case.module(), whole(2, 90)), before)


@pytest.mark.parametrize("name", NAMES)
def test_limit_case_is_softmax_attention(name):
    given, mask = inputs(2, 50), whole(2, 50)
    want, _ = dense_attention(given.q, given.k, given.v, mask.dense(), scale=0.4)
    for form in ("reference", *FORMS):
        got = given.run(case_of(name, **get_attention(name).limit).module(backend=form), mask)
        assert_same({"out": got}, {"out": want.transpose(1, 2)}, 1e-12)


@pytest.mark.parametrize("name", ["axial", "window_2d"])
def test_the_batched_form_is_part_of_a_graph(name):
    given, mask = inputs(2, 40).to(torch.float32), whole(2, 40)
    module = on(name, (4, 10)).module(backend="batched", dtype=torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled.wants_hidden, compiled.parameters = False, module.parameters
    cotangent = torch.ones(2, 40, 4, 8)
    assert_same(outcome(compiled, given, mask, cotangent), outcome(module, given, mask, cotangent), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_length_squared_is_allocated(name):
    shape = {"num_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "value_dim": 8}
    given, mask = inputs(1, 2304, **shape).to(torch.float32), whole(1, 2304)
    with test_contract.Largest() as largest:
        outcome(on(name, (48, 48)).module(**shape, dtype=torch.float32), given, mask, torch.ones(1, 2304, 1, 8))
    assert 0 < largest.elements < 2304 * 50


@pytest.mark.parametrize(
    ("name", "options", "grid", "waste"),
    [
        ("neighborhood_3d", {"kernel_size": (3, 7, 7)}, (8, 32, 32), 4.1),
        ("neighborhood_3d", {"kernel_size": (3, 7, 7), "causal_time": True}, (8, 32, 32), 4.1),
        ("axial", {}, (64, 64), 1.1),
        ("axial", {}, (8, 32, 32), 2.7),  # of lines of 8 frames, 8 share a tile
        ("window_2d", {"window_size": 14, "shift_size": 7}, (64, 64), 1.0),
    ],
)
def test_tiles_hold_few_pairs_beside_the_visible_ones_and_share_what_they_hide(name, options, grid, waste):
    length = math.prod(grid)
    module = case_of(name, **options, num_prefix_tokens=0, grid_size=grid).module()
    ((_, pattern),) = module.patterns(1, whole(1, length))
    tiles = list(pattern.tiles(whole(1, length)))
    pairs = sum(tile.queries.numel() * tile.extra.numel() for tile in tiles)
    index = torch.arange(0, length, 31)
    rows = pattern.sees(whole(1, length), index.view(1, -1, 1), torch.arange(length).view(1, 1, -1))
    visible = rows.sum().item() * length / len(index)
    assert pairs <= waste * visible * 1.05  # of the rows that were counted
    assert len({id(tile.hidden) for tile in tiles}) <= 27


@pytest.mark.parametrize("name", [*NAMES, "neighborhood_2d"])
def test_tokens_may_come_in_blocks(name):
    """The same patches in another order are served alike, with the tokens before them."""
    sides = (2, 5, 6) if name == "neighborhood_3d" else (5, 6)
    grid, prefix = Grid(sides, (4, 2)), 2
    options = {**SMALL, "neighborhood_2d": {"kernel_size": 3}}[name]
    length = prefix + math.prod(sides)
    order = torch.tensor([*range(prefix), *(prefix + place for place in order_of(grid))])
    assert sorted(order.tolist()) == list(range(length)) != order.tolist()
    given, case = inputs(2, length), case_of(name, **options, num_prefix_tokens=prefix)
    want = case_of(name, **options, num_prefix_tokens=prefix, grid_size=sides).module()
    want = given.run(want, whole(2, length))[:, order]
    given.q, given.k, given.v = (x[:, :, order] for x in (given.q, given.k, given.v))
    given.extras = {"grid_size": grid}
    for form in ("reference", *FORMS):
        got = given.run(case.module(backend=form), whole(2, length))
        assert_same({"out": got}, {"out": want}, 1e-12)
    assert_forms_agree(case, given, whole(2, length))


def test_the_order_of_blocks_is_that_of_merged_patches_and_of_windows():
    places = torch.arange(6 * 10).view(6, 10)
    merged = places.view(3, 2, 5, 2).transpose(1, 2).flatten()
    assert order_of(Grid((6, 10), (2,))) == tuple(merged.tolist())
    windows = [places[i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4, 8)]
    within = [w.view(w.shape[0] // 2, 2, w.shape[1] // 2, 2).transpose(1, 2).flatten() for w in windows]
    grid = Grid((6, 10), (4, 2))
    assert order_of(grid) == tuple(torch.cat(within).tolist())
    video = Grid((3, 6, 10), (4, 2))
    assert order_of(video)[60:120] == tuple(60 + place for place in order_of(grid))
    assert [order_of(video)[token] for token in tokens_of(video)] == list(range(180))


@pytest.mark.parametrize("name", [*NAMES, "neighborhood_2d"])
@pytest.mark.parametrize("blocks", [(), (4, 2)])
def test_blocks_of_a_kernel_are_left_out_only_where_nothing_is_seen(name, blocks):
    sides = (3, 8, 8) if name == "neighborhood_3d" else (8, 24)
    options = {**SMALL, "neighborhood_2d": {"kernel_size": 3}}[name]
    module = case_of(name, **options, num_prefix_tokens=1).module()
    mask = whole(1, 193)
    ((_, pattern),) = module.patterns(1, mask, Grid(sides, blocks))
    found, seen = visible_blocks(MaskOfBlocks(mask), pattern, 16), dense_pattern(mask, pattern)[0, 0]
    padded = torch.zeros(208, 208, dtype=torch.bool)
    padded[:193, :193] = seen
    some = padded.view(13, 16, 13, 16).any(3).any(1)
    assert not (some & ~found.some[0]).any()
    assert not (found.every[0] & ~padded.view(13, 16, 13, 16).all(3).all(1)).any()
    if name != "axial" or not blocks:  # of a line across blocks nothing is known
        assert not found.some.all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_grid_is_refused(name):
    def run(tokens, told=None, **options):
        given = inputs(1, tokens)
        given.extras = {"grid_size": told}
        given.run(case_of(name, **options).module(), whole(1, tokens))

    video = name != "window_2d"
    grid, text = ((2, 3, 4), "2 x 3 x 4") if video else ((3, 4), "3 x 4")
    run(1 + math.prod(grid), grid_size=grid)
    run(1 + math.prod(grid), grid)
    with pytest.raises(ValueError, match=rf"'{name}' got 12 tokens, of which 1 come .*; allowed: {text} patches"):
        run(12, grid)
    run(26)
    run(26, (5, 5))  # an image is a video of one frame
    with pytest.raises(ValueError, match=r"allowed: a square number of patches, or the option grid_size=\("):
        run(25)
    with pytest.raises(ValueError, match=f"'{name}' takes whole images, got 5 queries and 26 keys"):
        inputs(1, 5, 26).run(case_of(name).module(), AttentionMask(1, 5, 26, causal=False))
    padding = torch.ones(1, 26, dtype=torch.bool)
    padding[0, -1] = False
    with pytest.raises(ValueError, match=f"'{name}' got padding; allowed: images of one size in a batch"):
        inputs(1, 26).run(case_of(name).module(), whole(1, 26, padding_BK=padding))


@pytest.mark.parametrize("name", ["neighborhood_2d", "window_2d"])
def test_a_video_is_refused_by_what_takes_images(name):
    given = inputs(1, 24)
    given.extras = {"grid_size": (2, 3, 4)}
    with pytest.raises(ValueError, match=rf"'{name}' got a video of 2 x 3 x 4 patches; allowed: images .*axial"):
        given.run(case_of(name, num_prefix_tokens=0).module(), whole(1, 24))


def test_an_image_has_no_time_to_attend_along():
    with pytest.raises(ValueError, match=r"'axial' got an image; allowed with axes=\['time'\]: videos"):
        inputs(1, 9).run(case_of("axial", axes=("time",), num_prefix_tokens=0).module(), whole(1, 9))
    both = case_of("axial", axes=("time+width", "time+height"), num_prefix_tokens=0, grid_size=(3, 3))
    assert torch.equal(seen_by(both, (3, 3), 0), definition("axial", {}, (3, 3), 0))


def test_frames_are_counted_where_the_config_knows_the_image():
    heads = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, grid_size=(3, 4))
    for cls, sides in ((Neighborhood3dAttention, (1, 3, 4)), (AxialAttention, (3, 4)), (Neighborhood2dAttention, None)):
        module = cls(cls.Config(num_prefix_tokens=0), heads)
        for tokens, told in ((12, sides), (24, (2, 3, 4))):
            if sides is None and tokens == 24:
                with pytest.raises(ValueError, match=r"got 24 tokens.*; allowed: 3 x 4 patches"):
                    module.patterns(4, whole(1, tokens))
            elif sides is not None:
                ((_, pattern),) = module.patterns(4, whole(1, tokens))
                assert pattern.grid.sides == told


def test_windows_are_shifted_in_every_second_layer_unless_told():
    def shift(layer, **options):
        heads = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, layer=layer)
        module = Window2dAttention(Window2dAttention.Config(num_prefix_tokens=0, window_size=5, **options), heads)
        return module.patterns(4, whole(1, 36))[0][1].shift

    assert [shift(layer) for layer in range(4)] == [(0, 0), (2, 2), (0, 0), (2, 2)]
    assert [shift(layer, shift_size=3) for layer in range(2)] == [(3, 3), (3, 3)]
    assert shift(None) == (0, 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("neighborhood_3d", {"kernel_size": (3, 3)}, r"kernel_size=\(3, 3\); allowed: \(frames, height, width\), each"),
        ("neighborhood_3d", {"dilation": (1, 0, 1)}, r"dilation=\(1, 0, 1\); allowed: \(frames, height, width\), each"),
        ("neighborhood_3d", {"grid_size": (3,)}, r"grid_size=\(3,\); allowed: None, \(height, width\) or \(frames,"),
        ("neighborhood_3d", {"num_prefix_tokens": -1}, "num_prefix_tokens=-1; allowed: None or an integer from 0 on"),
        ("axial", {"axes": ()}, r"axes=\(\); allowed: None or a list of"),
        ("axial", {"axes": ("rows",)}, r"axes=\('rows',\); allowed: None or a list of .time., .height., .width."),
        ("axial", {"axes": ("width", "height+width")}, "axes=.*none within another"),
        ("axial", {"num_prefix_tokens": -1}, "num_prefix_tokens=-1; allowed: None or an integer from 0 on"),
        ("axial", {"grid_size": (3,)}, r"grid_size=\(3,\); allowed: None, \(height, width\) or \(frames,"),
        ("window_2d", {"window_size": 0}, "window_size=0; allowed: an integer from 1 on"),
        ("window_2d", {"window_size": 4, "shift_size": 4}, "shift_size=4; allowed: None or an integer from 0 to below"),
        ("window_2d", {"num_prefix_tokens": -1}, "num_prefix_tokens=-1; allowed: None or an integer from 0 on"),
        ("window_2d", {"grid_size": (2, 3, 4)}, r"grid_size=\(2, 3, 4\); allowed: None or \(height, width\)"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_attention(name).Config(**options)
