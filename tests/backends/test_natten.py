"""What NATTEN is given, with a definition of its function in its place; and itself, where it is installed."""

import itertools
import sys
import types

import pytest
import torch
from cases import Case, assert_forms_agree, inputs, left_padding
from test_on_grid import neighbours
from torch.nn.attention import flex_attention

from attn_plugins.attentions.neighborhood_2d import Neighborhood2dAttention
from attn_plugins.attentions.neighborhood_3d import Neighborhood3dAttention
from attn_plugins.backends import natten as backend
from attn_plugins.backends.natten import Natten
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.ops.reference import dense_attention

OPTIONS = [
    {"kernel_size": 3, "num_prefix_tokens": 0},
    {"kernel_size": 3, "dilation": 2, "num_prefix_tokens": 2},
    {"kernel_size": 4, "num_prefix_tokens": 1},
]
OF_VIDEO = [
    {"kernel_size": (3, 3, 4), "num_prefix_tokens": 0},
    {"kernel_size": (2, 2, 3), "dilation": (1, 2, 2), "causal_time": True, "num_prefix_tokens": 1},
]
GRID = (6, 7)


def neighborhood(**options):
    return Case(Neighborhood2dAttention, {"grid_size": GRID, **options}, False)


def whole(prefix, **options):
    return AttentionMask(2, prefix + 42, prefix + 42, causal=False, **options)


def kernel(q, k, v, *, kernel_size, dilation, is_causal, scale, additional_keys=None, additional_values=None):
    """As NATTEN documents na2d and na3d: (batch, places along each axis, heads, size), of heads of keys as many or
    fewer."""
    sides = q.shape[1:-2]
    visible = torch.zeros(*sides, *sides, dtype=torch.bool)
    for place in itertools.product(*map(range, sides)):
        seen = zip(place, sides, kernel_size, dilation, is_causal, strict=True)
        visible[place][torch.meshgrid(*(torch.tensor(neighbours(*axis)) for axis in seen), indexing="ij")] = True
    visible = visible.flatten(len(sides)).flatten(0, len(sides) - 1)
    assert all(x.is_contiguous() for x in (q, k, v))
    shape = q.shape
    q, k, v = (x.flatten(1, len(sides)) for x in (q, k, v))
    if additional_keys is not None:
        k, v = torch.cat([k, additional_keys], dim=1), torch.cat([v, additional_values], dim=1)
        visible = torch.cat([visible, visible.new_ones(len(visible), additional_keys.shape[1])], dim=1)
    out, _ = dense_attention(*(x.transpose(1, 2) for x in (q, k, v)), visible, scale=scale)
    return out.transpose(1, 2).reshape(shape)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(Natten, "devices", ("cpu",))
    monkeypatch.setattr(Natten, "missing", lambda self: None)
    monkeypatch.setattr(backend, "DTYPES", (torch.float64, torch.float32))


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_reference(on_cpu, monkeypatch, options):
    monkeypatch.setitem(sys.modules, "natten", types.SimpleNamespace(na2d=kernel))
    given = inputs(2, options["num_prefix_tokens"] + 42)
    assert_forms_agree(neighborhood(**options), given, whole(options["num_prefix_tokens"]), backend="natten")


@pytest.mark.parametrize("options", OF_VIDEO)
def test_equals_reference_on_videos(on_cpu, monkeypatch, options):
    monkeypatch.setitem(sys.modules, "natten", types.SimpleNamespace(na3d=kernel))
    case = Case(Neighborhood3dAttention, {"grid_size": (3, 4, 6), **options}, False)
    length = 72 + options["num_prefix_tokens"]
    assert_forms_agree(case, inputs(2, length), AttentionMask(2, length, length, causal=False), backend="natten")


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # flex_attention's, uncompiled
@pytest.mark.parametrize("options", OPTIONS)
def test_natten_itself_equals_reference(on_cpu, monkeypatch, options):
    """Of its kernels only FlexAttention's run here, uncompiled."""
    pytest.importorskip("natten", reason="natten is not installed")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # for gradients on a CPU
    given = inputs(2, options["num_prefix_tokens"] + 42)
    mask = whole(options["num_prefix_tokens"])
    assert_forms_agree(neighborhood(**options), given, mask, dtype=torch.float32, tolerance=1e-5, backend="natten")


def call(mask=None, *, heads=(8, 8), dtype=torch.float64, options=(), **extras):
    case = neighborhood(**{"kernel_size": 3, "num_prefix_tokens": 0, **dict(options)})
    shape = {"head_dim": heads[0], "value_dim": heads[1]}
    given = inputs(2, 42, **shape, dtype=dtype)
    given.extras = extras
    return given.run(case.module(**shape, backend="natten"), mask or whole(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "attention dropout is not served"),
        ({"softcap": 2.0}, "softcap is not served"),
        ({"sinks": torch.zeros(4)}, "sinks is not served"),
        ({"dtype": torch.bfloat16}, "must all be of one of torch.float32, torch.float64, got torch.bfloat16"),
        ({"heads": (8, 16)}, "must be of one size, a multiple of 8, got 8 and 16"),
        ({"heads": (12, 12)}, "must be of one size, a multiple of 8, got 12 and 12"),
        ({"options": {"dilation": 3}}, r"times dilation, at most the grid's sides \(6, 7\), got \(3, 3\) and \(3, 3\)"),
        ({"options": {"kernel_size": 1}}, "kernel_size must be from 2 on"),
        (
            {"mask": whole(0, plain=False, rule=lambda b, h, q, k: q >= 0 * k)},
            "it serves whole images, in which nothing is hidden, got AttentionMask",
        ),
    ],
    ids=lambda x: x[:50] if isinstance(x, str) else "",
)
def test_what_it_cannot_honour_is_refused(on_cpu, arguments, message):
    with pytest.raises(ValueError, match=f"'natten' cannot serve this call of attention .*: .*{message}"):
        call(**arguments)


def test_other_patterns_are_refused(on_cpu):
    for name, message in (("longformer", "the pattern Band is not served"), ("softmax", "neighbourhoods on a grid")):
        cls = get_attention(name)
        given = inputs(2, 20)
        with pytest.raises(ValueError, match=message):
            given.run(cls(cls.Config(), backend="natten"), AttentionMask(2, 20, 20, causal=False))


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "it needs NATTEN, built for this torch"), ("0.21.0+torch", "it needs NATTEN 0.21.7 or newer, got 0.21.0")],
)
def test_it_says_what_is_missing(monkeypatch, version, message):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: version)
    monkeypatch.setattr(backend.metadata, "version", lambda name: version)
    assert message in Natten().missing()


@pytest.mark.parametrize("version", ["0.21.7", "0.22.0.dev3", "1.0"])
def test_newer_versions_are_taken(monkeypatch, version):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: version)
    monkeypatch.setattr(backend.metadata, "version", lambda name: version)
    assert Natten().missing() is None


def test_padding_is_refused_by_the_attention_itself(on_cpu):
    with pytest.raises(ValueError, match="got padding; allowed: images of one size in a batch"):
        call(whole(0, padding_BK=left_padding([42, 30], 42)))
