"""Several attentions in one slot: each serves its heads as if they were all, whatever a call brings for all of them."""

import math

import pytest
import torch

import attn_plugins as ap
from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import list_attentions
from attn_plugins.hf.split import Heads, Part, SplitAttention

GRID = (4, 5)
SHAPE = HeadShape(num_heads=6, num_key_value_heads=3, head_dim=8, value_dim=8, hidden_size=12, layer=2, grid_size=GRID)


def part(name, kv_heads, **options):
    attention = ap.get_attention(name)
    return Part(kv_heads, attention(attention.Config(**options), Heads(kv_heads, 2).shape(SHAPE)))


def split_of(*parts):
    """The split attention, with weights that have moved from where they start."""
    torch.manual_seed(0)
    split = SplitAttention(parts, 2, SHAPE)
    with torch.no_grad():
        for weight in split.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return split


def tokens(length):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, heads, length, 8, generator=generator, requires_grad=True) for heads in (6, 3, 3)]


def taken(kv_heads, q, k, v):
    """Queries, keys and values of some heads, by their numbers."""
    queries = [2 * head + i for head in kv_heads for i in range(2)]
    return queries, (q[:, queries], k[:, kv_heads], v[:, kv_heads])


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


EXAMPLES = [(name, options) for name in list_attentions() for options in ap.get_attention(name).examples]


@pytest.mark.parametrize(("number", "name", "options"), [(n, *example) for n, example in enumerate(EXAMPLES)])
def test_each_attention_equals_itself_alone_on_its_heads(number, name, options):
    """Beside softmax attention on heads that do not follow one another, or on those between; gradients too."""
    others, mine = ((1,), (0, 2)) if number % 2 else ((0, 2), (1,))
    split = split_of(part("softmax", others), part(name, mine, **options))
    causal = split.parts[1].causal
    length = math.prod(GRID) + getattr(split.parts[1].config, "num_prefix_tokens", 0)
    q, k, v = tokens(length)
    given = {"scale": 8**-0.5, "mask": AttentionMask(2, length, length, causal=causal)}
    if split.wants_hidden:
        given["hidden"] = torch.randn(2, length, 12)
    out, weights = split(q, k, v, **given)
    assert weights is None
    weights = split(q, k, v, **given, need_weights=True)[1]
    expected = {}
    for kv_heads, alone in zip((others, mine), split.parts, strict=True):
        queries, heads = taken(kv_heads, q, k, v)
        given["mask"] = AttentionMask(2, length, length, causal=causal)
        expected |= dict(zip(queries, alone(*heads, **given)[0].unbind(2), strict=True))
        assert_close(weights[:, queries], alone(*heads, **given, need_weights=True)[1])
    whole = torch.stack([expected[head] for head in range(6)], dim=2)
    assert_close(out, whole)
    of = [q, k, v, *split.parameters()]
    gradients = [torch.autograd.grad(x.square().sum(), of) for x in (out, whole)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("extra", ["position_bias", "one position_bias", "softcap", "sinks", "segments", "padding"])
def test_what_a_call_brings_for_all_heads_is_shared_out(extra):
    q, k, v = tokens(20)
    sizes = (2, 20, 20)
    brought = {
        "position_bias": {"position_bias": torch.randn(1, 6, 20, 20)},
        "one position_bias": {"position_bias": torch.randn(2, 1, 20, 20)},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.randn(6)},
    }.get(extra, {})
    mask = AttentionMask(
        *sizes,
        causal=True,
        segments_BK=(torch.arange(20) // 7).expand(2, -1) if extra == "segments" else None,
        padding_BK=torch.arange(20).expand(2, -1) > torch.tensor([[4], [0]]) if extra == "padding" else None,
    )
    capable = [name for name in list_attentions() if getattr(ap.get_attention(name), extra.split()[-1], True)]
    for name in [name for name in capable if ap.get_attention(name).causal]:
        split = split_of(part(name, (0, 2)), part("softmax", (1,)))
        hidden = {"hidden": torch.randn(2, 20, 12)} if split.wants_hidden else {}
        given = {"mask": mask, "scale": 0.5, **hidden}
        out, _ = split(q, k, v, **given, **brought)
        for kv_heads, alone in zip(((0, 2), (1,)), split.parts, strict=True):
            queries, heads = taken(kv_heads, q, k, v)
            own = dict(brought)
            if extra == "position_bias":
                own = {"position_bias": brought["position_bias"][:, queries]}
            elif extra == "sinks":
                own = {"sinks": brought["sinks"][queries]}
            assert_close(out[:, :, queries], alone(*heads, **given, **own)[0])


def test_what_one_part_cannot_honour_is_refused():
    split = split_of(part("linear", (0, 2)), part("softmax", (1,)))
    with pytest.raises(ValueError, match="learned sink logits, which attention 'linear' cannot honour"):
        split(*tokens(5), mask=AttentionMask(2, 5, 5, causal=True), scale=1.0, sinks=torch.zeros(6))


def test_other_heads_than_it_was_built_for_are_refused():
    split = split_of(part("local", (0, 2)), part("softmax", (1,)))
    q, k, v = tokens(5)
    with pytest.raises(ValueError, match=r"built for \(query heads, key/value heads\) = \(6, 3\), got \(6, 6\)"):
        split(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), mask=AttentionMask(2, 5, 5, causal=True), scale=1.0)


def test_it_says_what_is_in_it():
    split = split_of(part("local", (0, 2), window_size=3), Part((1,), None))
    assert "kv_heads [0, 2]: local(window_size=3, " in repr(split)
    assert "kv_heads [1]: own" in repr(split)
    assert [type(module).name for module in split.modules() if isinstance(module, Attention)] == ["split", "local"]


def test_heads_that_follow_one_another_are_views():
    x = torch.zeros(2, 12, 5, 8)
    held = Heads((1, 2), 2).of_queries(x, 1)
    assert held.data_ptr() == x[:, 2:].data_ptr()
    assert held.shape == (2, 4, 5, 8)
    assert Heads((0, 1, 3, 5), 1).runs() == [(0, 2), (3, 4), (5, 6)]
