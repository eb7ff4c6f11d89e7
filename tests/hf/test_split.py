"""Modules whose heads have several attentions: each serves its own as if they were all, the rest is the model's."""

import math

import pytest
import tiny
import torch

import attn_plugins as ap
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import list_attentions
from attn_plugins.hf.names import slot_of
from attn_plugins.hf.split import Heads, Part, SplitAttention

SOFTMAX = {"type": "softmax"}
"""Two of four query heads share a key/value head in the grouped models, none in the others."""


def part(name, kv_heads, shape, **options):
    attention = ap.get_attention(name)
    return Part(kv_heads, attention(attention.Config(**options), Heads(kv_heads, 2).shape(shape)))


EXAMPLES = [(name, options) for name in list_attentions() for options in ap.get_attention(name).examples]


@pytest.mark.parametrize("others", [(0,), (1,), (0, 2)])
@pytest.mark.parametrize(("name", "options"), EXAMPLES)
def test_each_attention_equals_itself_alone_on_its_heads(name, options, others):
    """Beside softmax attention, with learned weights that have moved from where they start."""
    causal, grid = ap.get_attention(name).causal, (4, 5)
    shape = HeadShape(
        num_heads=6, num_key_value_heads=3, head_dim=8, value_dim=8, hidden_size=12, layer=2, grid_size=grid
    )
    torch.manual_seed(0)
    mine = tuple(head for head in range(3) if head not in others)
    split = SplitAttention([part("softmax", others, shape), part(name, mine, shape, **options)], 2, shape)
    with torch.no_grad():
        for weight in split.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    length = math.prod(grid) + getattr(split.parts[1].config, "num_prefix_tokens", 0)
    q, k, v = (torch.randn(2, heads, length, 8) for heads in (6, 3, 3))
    mask = AttentionMask(2, length, length, causal=causal)
    given = {"mask": mask, "scale": 8**-0.5}
    if split.wants_hidden:
        given["hidden"] = torch.randn(2, length, 12)
    out, weights = split(q, k, v, **given)
    assert weights is None
    for kv_heads, alone in zip((others, mine), split.parts, strict=True):
        queries = [2 * head + i for head in kv_heads for i in range(2)]
        given["mask"] = AttentionMask(2, length, length, causal=causal)
        expected, _ = alone(q[:, queries], k[:, kv_heads], v[:, kv_heads], **given)
        torch.testing.assert_close(out[:, :, queries], expected, atol=1e-6, rtol=1e-6)
        _, expected = alone(q[:, queries], k[:, kv_heads], v[:, kv_heads], **given, need_weights=True)
        weighed = split(q, k, v, **given, need_weights=True)[1]
        torch.testing.assert_close(weighed[:, queries], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", tiny.MODELS)
@torch.no_grad()
def test_softmax_in_every_part_is_the_models_own(name):
    model, inputs = tiny.build(name), tiny.inputs(name, length=20 if name == "llava" else 13)
    own = tiny.output(model, inputs)
    for rules in ([{**SOFTMAX, "kv_heads": [1]}], [{**SOFTMAX, "kv_heads": [0]}, SOFTMAX]):
        ap.swap_attention(model, rules)
        assert any(isinstance(slot_of(module), SplitAttention) for module in model.modules())
        torch.testing.assert_close(tiny.output(model, inputs), own, atol=1e-5, rtol=1e-4)
    ap.restore_attention(model)
    assert torch.equal(tiny.output(model, inputs), own)


def test_described_a_part_a_row():
    model = tiny.build("llama")
    ap.swap_attention(
        model, [{"type": "local", "window_size": 3, "kv_heads": {"1": [1]}}, {"type": "linear", "layers": 0}]
    )
    rows = ap.describe_attention(model)
    told = [(row.layer, row.plugin, row.implementation, row.kv_heads) for row in rows]
    assert told == [
        (0, "linear", "torch", None),
        (1, "local", "torch", (1,)),
        (1, None, "sdpa", (0,)),
        (2, None, "sdpa", None),
    ]
    header, _, first, second, _ = str(rows).splitlines()
    assert header.split()[:4] == ["path", "layer", "role", "kv_heads"]
    assert first.split()[3:6] == ["1", "interface", "local"]
    assert second.split()[3:6] == ["0", "interface", "(sdpa)"]
    ap.restore_attention(model)
    assert "kv_heads" not in str(ap.describe_attention(model))


@torch.no_grad()
def test_saved_and_loaded_with_learned_weights(tmp_path):
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    rules = [
        {"type": "linear", "feature_map": "hedgehog", "kv_heads": {"0": [1], "1": [0]}},
        {"type": "retention", "kv_heads": [0], "layers": "0-1"},
    ]
    ap.swap_attention(model, rules)
    for name, weight in model.named_parameters():
        if "attn_plugin" in name:
            weight.add_(0.1 * torch.randn_like(weight))
    expected = tiny.output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.output(loaded, inputs), expected)
    assert str(ap.describe_attention(loaded)) == str(ap.describe_attention(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
