"""AttentionLayer: a layer with a slot for models that people write."""

import copy
import io

import pytest
import torch
from torch import nn

import attn_plugins as ap

WIDTH, HEADS, LENGTH = 16, 4, 12
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
HIDDEN = torch.arange(LENGTH).repeat(2, 1) >= torch.tensor([[LENGTH], [8]])
X = torch.randn(2, LENGTH, WIDTH)


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flag", [None, "softmax"])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}], ids=str)
@torch.no_grad()
def test_equals_torchs_module_whose_weights_it_loads(sizes, flag):
    own = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **sizes).eval()
    for p in own.parameters():
        nn.init.normal_(p)
    layer = ap.AttentionLayer(WIDTH, HEADS, attn_plugin=flag, **sizes).eval()
    layer.load_state_dict(own.state_dict())
    key, value = torch.randn(2, 12, sizes.get("kdim", WIDTH)), torch.randn(2, 12, sizes.get("vdim", WIDTH))
    for given in ({"key_padding_mask": HIDDEN}, {"attn_mask": CAUSAL}, {"average_attn_weights": False}):
        want, weights = own(X, key, value, **given)
        got, got_weights = layer(X, key, value, need_weights=True, **given)
        close(got, want)
        close(got_weights, weights)
    assert layer(X, key, value)[1] is None


@torch.no_grad()
def test_one_argument_is_self_attention_with_and_without_a_batch():
    layer = ap.AttentionLayer(WIDTH, HEADS, attn_plugin={"type": "local", "window_size": 3}).eval()
    assert torch.equal(layer(X)[0], layer(X, X, X)[0])
    close(layer(X[0])[0], layer(X)[0][0])
    close(layer(X[1], key_padding_mask=HIDDEN[1])[0], layer(X, key_padding_mask=HIDDEN)[0][1])
    close(layer(X, is_causal=True)[0], layer(X, attn_mask=CAUSAL)[0])


@pytest.mark.parametrize(("queries", "keys"), [(5, LENGTH), (LENGTH, 5)])
@torch.no_grad()
def test_causality_between_sequences_counts_both_from_their_first_tokens(queries, keys):
    """As scaled_dot_product_attention has it, whatever their lengths."""
    layer = ap.AttentionLayer(WIDTH, HEADS, attn_plugin="softmax").eval()
    later = torch.arange(keys) > torch.arange(queries).unsqueeze(1)
    want = layer(X[:, :queries], X[:, :keys], attn_mask=later)[0]
    close(layer(X[:, :queries], X[:, :keys], is_causal=True)[0], want)
    close(want[:, 1], layer(X[:, 1:2], X[:, :2])[0][:, 0])


@torch.no_grad()
def test_keys_may_have_fewer_heads():
    layer = ap.AttentionLayer(WIDTH, HEADS, num_key_value_heads=2, attn_plugin="softmax").eval()
    assert layer.k_proj.out_features == 8
    whole = ap.AttentionLayer(WIDTH, HEADS).eval()
    state = dict(layer.state_dict())
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    close(layer(X, is_causal=True)[0], whole(X, is_causal=True)[0])


@pytest.mark.parametrize("name", [name for name in ap.list_attentions() if ap.get_attention(name).causal])
def test_any_causal_attention_serves_and_learns(name):
    layer = ap.AttentionLayer(WIDTH, HEADS, attn_plugin=name)
    out, _ = layer(X, is_causal=True)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None for p in layer.parameters())
    changed = X.clone()
    changed[:, 9:] += 1
    with torch.no_grad():
        close(layer.eval()(changed, is_causal=True)[0][:, :9], layer(X, is_causal=True)[0][:, :9])


@torch.no_grad()
def test_it_is_swapped_restored_copied_and_saved_as_others_are():
    model = nn.ModuleList(ap.AttentionLayer(WIDTH, HEADS) for _ in range(3)).eval()
    want = model[1](X)[0]
    ap.swap_attention(model, "linear", feature_map="hedgehog", layers=[0, 1])
    assert [row.plugin for row in ap.describe_attention(model)] == ["linear", "linear", None]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(again[1](X)[0], model[1](X)[0])
    built = ap.AttentionLayer(WIDTH, HEADS, attn_plugin={"type": "linear", "feature_map": "hedgehog"}).eval()
    built.load_state_dict(model[1].state_dict())
    assert torch.equal(built(X)[0], model[1](X)[0])
    assert torch.equal(ap.restore_attention(model)[1](X)[0], want)


def test_its_weights_are_drawn_as_torch_draws_them():
    own, layer = nn.MultiheadAttention(64, 4), ap.AttentionLayer(64, 4)
    bound = own.in_proj_weight.abs().max()
    for part in (layer.q_proj, layer.k_proj, layer.v_proj):
        torch.testing.assert_close(part.weight.abs().max(), bound, rtol=0.02, atol=0)
        assert part.bias.abs().max() == 0
    assert not torch.equal(layer.q_proj.weight, layer.k_proj.weight)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 3}, "embed_dim=16, num_heads=3; allowed: heads that divide embed_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3, num_heads=4; allowed: a number that divides num_heads"),
        ({"dropout": 1.0}, "dropout=1.0; allowed: a probability from 0 to below 1"),
        ({"attn_plugin": "locl"}, "unknown attention 'locl'"),
        ({"attn_plugin": {"type": "local", "layers": 1}}, "layers=1 is out of range"),
    ],
)
def test_what_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ap.AttentionLayer(**{"embed_dim": WIDTH, "num_heads": HEADS, **sizes})


def test_dropout_is_of_weights_in_training():
    layer = ap.AttentionLayer(WIDTH, HEADS, dropout=0.5, attn_plugin="softmax")
    assert not torch.equal(layer(X)[0], layer(X)[0])
    assert torch.equal(layer.eval()(X)[0], layer(X)[0])
