"""torch.nn.MultiheadAttention with another attention in it: alone, and in torch's own layers."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import attn_plugins as ap
from attn_plugins.hf.split import parts_of

WIDTH, HEADS, LENGTH = 16, 4, 12
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
HIDDEN = torch.arange(LENGTH).repeat(2, 1) >= torch.tensor([[LENGTH], [8]])
"""True where a key is padding, as torch's modules take it."""
PER_HEAD = torch.rand(2 * HEADS, LENGTH, LENGTH) < 0.3
PER_HEAD[:, :, 0] = False


def module(**options):
    return nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options}).eval()


def sequence(*sizes):
    return torch.randn(*(sizes or (2, LENGTH, WIDTH)))


def close(got, want, real=None):
    if real is not None:
        got, want = got[real], want[real]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": HIDDEN},
    "padding added": {"key_padding_mask": torch.zeros(2, LENGTH).masked_fill(HIDDEN, -torch.inf)},
    "a bias for each key": {"key_padding_mask": torch.linspace(-2, 2, 2 * LENGTH).view(2, LENGTH)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal added": {"attn_mask": CAUSAL},
    "causal, bool": {"attn_mask": CAUSAL.isinf()},
    "causal and padding": {"attn_mask": CAUSAL.isinf(), "key_padding_mask": HIDDEN},
    "any, bool": {"attn_mask": PER_HEAD[0]},
    "a bias": {"attn_mask": torch.linspace(-3, 3, LENGTH * LENGTH).view(LENGTH, LENGTH)},
    "for each head, bool": {"attn_mask": PER_HEAD},
    "for each head, added": {"attn_mask": torch.where(PER_HEAD, -torch.inf, 0.5)},
    "padding in both": {
        "attn_mask": (torch.arange(LENGTH) == 3).expand(2 * HEADS, LENGTH, LENGTH),
        "key_padding_mask": HIDDEN,
    },
    "biases in both": {
        "attn_mask": torch.linspace(-3, 3, LENGTH * LENGTH).view(LENGTH, LENGTH),
        "key_padding_mask": torch.linspace(-2, 2, 2 * LENGTH).view(2, LENGTH),
    },
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
@torch.no_grad()
def test_equals_the_modules_own_attention(mask, batch_first, need_weights):
    own, x = module(batch_first=batch_first), sequence()
    x = x if batch_first else x.transpose(0, 1)
    want, weights = own(x, x, x, need_weights=need_weights, **MASKS[mask])
    swapped = ap.swap_attention(copy.deepcopy(own), "softmax")
    got, got_weights = swapped(x, x, x, need_weights=need_weights, **MASKS[mask])
    close(got, want)
    assert (got_weights is None) == (weights is None)
    if weights is not None:
        close(got_weights, weights)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}], ids=str)
@torch.no_grad()
def test_equals_cross_attention(options):
    own, x = module(**options), sequence()
    key, value = sequence(2, 7, options.get("kdim", WIDTH)), sequence(2, 7, options.get("vdim", WIDTH))
    hidden = torch.arange(7).repeat(2, 1) >= torch.tensor([[7], [4]])
    given = {"key_padding_mask": hidden, "average_attn_weights": False}
    swapped = ap.swap_attention(copy.deepcopy(own), "softmax")
    for got, want in zip(swapped(x, key, value, **given), own(x, key, value, **given), strict=True):
        close(got, want)


@torch.no_grad()
def test_equals_attention_without_a_batch():
    own, x = module(batch_first=False), sequence(LENGTH, WIDTH)
    swapped = ap.swap_attention(copy.deepcopy(own), "softmax")
    given = {"attn_mask": CAUSAL.isinf(), "key_padding_mask": HIDDEN[1]}
    for got, want in zip(swapped(x, x, x, **given), own(x, x, x, **given), strict=True):
        close(got, want)


@pytest.mark.parametrize("mask", [MASKS["causal"], MASKS["causal added"], MASKS["causal, bool"], {"is_causal": True}])
@torch.no_grad()
def test_a_causal_mask_is_known_as_one(mask):
    """Linear attention refuses any other; what is causal does not change with what comes later."""
    swapped = ap.swap_attention(module(), "linear")
    x = sequence()
    first = swapped(x, x, x, need_weights=False, **mask)[0]
    x[:, 9:] += 1
    again = swapped(x, x, x, need_weights=False, **mask)[0]
    close(again[:, :9], first[:, :9])
    assert (again[:, 9:] - first[:, 9:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_mask_beside_is_causal_is_not_read():
    swapped, x = ap.swap_attention(module(), "linear"), sequence()
    close(swapped(x, x, x, attn_mask=PER_HEAD, is_causal=True)[0], swapped(x, x, x, is_causal=True)[0])


def test_a_mask_of_zeros_that_learns_gets_its_gradient():
    own, x = module(), sequence()
    swapped, found = ap.swap_attention(copy.deepcopy(own), "softmax"), []
    for model in (own, swapped):
        for name, sizes in (("key_padding_mask", (2, LENGTH)), ("attn_mask", (LENGTH, LENGTH))):
            mask = torch.zeros(sizes, requires_grad=True)
            model(x, x, x, **{name: mask})[0].square().sum().backward()
            found.append(mask.grad)
    for got, want in zip(found[2:], found[:2], strict=True):
        assert want.abs().max() > 1e-4
        close(got, want)


@torch.no_grad()
def test_a_mask_that_is_written_to_is_read_again():
    swapped, x, mask = ap.swap_attention(module(), "local", window_size=4), sequence(), CAUSAL.isinf()
    first = swapped(x, x, x, attn_mask=mask)[0]
    mask[5, 4] = True
    assert (swapped(x, x, x, attn_mask=mask)[0] - first)[:, 5].abs().max() > 1e-4


@torch.no_grad()
def test_a_window_is_one():
    swapped, x = ap.swap_attention(module(), "local", window_size=3, num_sink_tokens=0), sequence()
    out, weights = swapped(x, x, x, attn_mask=CAUSAL, average_attn_weights=False)
    assert weights.shape == (2, HEADS, LENGTH, LENGTH)
    assert weights.tril(-3).abs().max() == 0
    close(swapped(x, x, x, attn_mask=CAUSAL, need_weights=False)[0], out)


@torch.no_grad()
def test_two_sequences_of_one_length_are_no_self_attention():
    swapped, x, other = ap.swap_attention(module(), "local", window_size=3), sequence(), sequence()
    with pytest.raises(ValueError, match="needs keys of another sequence, which attention 'local' cannot honour"):
        swapped(x, other, other)


ENCODERS = {
    "after": {"norm_first": False},
    "before": {"norm_first": True},
    "length first": {"batch_first": False},
    "gelu": {"activation": "gelu"},
}


def encoder(*, nested=True, layers=2, **options):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, **{"batch_first": True, **options})
    with warnings.catch_warnings():  # that it will make no nested tensors
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
@torch.no_grad()
def test_an_encoder_equals_its_own_in_eval_mode(kind, mask):
    """Its fast path computes attention past the module that is swapped, and makes nested tensors of padded ones."""
    own, x = encoder(**ENCODERS[kind]), sequence()
    given = {"padding": {"src_key_padding_mask": HIDDEN}, "causal": {"mask": CAUSAL}}.get(mask, {})
    x = x if ENCODERS[kind].get("batch_first", True) else x.transpose(0, 1)
    swapped = ap.swap_attention(copy.deepcopy(own), "softmax")
    got = swapped(x, **given)
    close(got, own(x, **given))
    windows = ap.swap_attention(copy.deepcopy(own), "local", window_size=2, num_sink_tokens=0)
    assert (windows(x, **given) - got).abs().max() > 1e-3


@torch.no_grad()
def test_attention_without_a_fast_path_equals_its_own():
    own, x = module(), sequence()
    swapped = ap.swap_attention(copy.deepcopy(own), "local", window_size=2, num_sink_tokens=0)
    assert (swapped(x, x, x, need_weights=False)[0] - own(x, x, x, need_weights=False)[0]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_other_nested_tensors_are_refused():
    swapped = ap.swap_attention(module(), "softmax")
    nested = torch.nested.nested_tensor([sequence(5, WIDTH), sequence(3, WIDTH)])
    other = torch.nested.nested_tensor([sequence(5, WIDTH), sequence(3, WIDTH)])
    with pytest.raises(ValueError, match="nested tensors for queries, keys and values that are not one and the same"):
        swapped(nested, other, other)
    with pytest.raises(ValueError, match="a mask beside a nested tensor; allowed: is_causal, or padded"):
        swapped(nested, nested, nested, key_padding_mask=HIDDEN)


def transformer():
    made = nn.Transformer(WIDTH, HEADS, 2, 2, 24, batch_first=True)
    return made.eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("roles", [("encoder",), ("decoder",), ("cross",), ("encoder", "decoder", "cross")])
@torch.no_grad()
def test_each_role_of_a_transformer_equals_its_own(roles):
    own, source, target = transformer(), sequence(), sequence()
    given = {"src_key_padding_mask": HIDDEN, "memory_key_padding_mask": HIDDEN, "tgt_mask": CAUSAL}
    swapped = ap.swap_attention(copy.deepcopy(own), "softmax", roles=list(roles))
    rows = ap.describe_attention(swapped)
    assert {row.role for row in rows if row.plugin} == set(roles)
    assert [row.layer for row in rows] == [0, 1, 0, 0, 1, 1]
    close(swapped(source, target, **given), own(source, target, **given))


def test_cross_attention_is_asked_for_by_its_role():
    swapped = ap.swap_attention(transformer(), "linear", roles=["cross"])
    assert [row.plugin for row in ap.describe_attention(swapped)] == [None, None, None, "linear", None, "linear"]
    with pytest.raises(ValueError, match="it is cross-attention, and attention 'local' has no 'cross'"):
        ap.swap_attention(transformer(), "local", roles=["cross"])


@torch.no_grad()
def test_heads_and_layers_have_rules_of_their_own():
    own, x = encoder(nested=False), sequence()
    rules = [{"type": "local", "window_size": 2, "layers": 0, "kv_heads": [1, 3]}, {"type": "softmax", "layers": 1}]
    swapped = ap.swap_attention(copy.deepcopy(own), rules)
    rows = ap.describe_attention(swapped)
    assert [(row.layer, row.plugin, row.kv_heads) for row in rows] == [
        (0, "local", (1, 3)),
        (0, None, (0, 2)),
        (1, "softmax", None),
    ]
    whole = [{"type": "local", "window_size": 99, "layers": 0, "heads": [1, 3]}]
    close(ap.swap_attention(swapped, whole)(x), own(x))


@torch.no_grad()
def test_restored_it_is_what_it_was():
    own, x = encoder(nested=False), sequence()
    want, before = own(x), {name: type(part) for name, part in own.named_modules()}
    state = {name: value.clone() for name, value in own.state_dict().items()}
    swapped = ap.swap_attention(own, "linear", feature_map="hedgehog")
    assert isinstance(swapped.layers[0].self_attn, nn.MultiheadAttention)
    assert not torch.equal(swapped(x), want)
    ap.restore_attention(swapped)
    assert torch.equal(own(x), want)
    assert {name: type(part) for name, part in own.named_modules()} == before
    assert {**vars(own.layers[0].self_attn)}.keys() == {**vars(encoder().layers[0].self_attn)}.keys()
    assert all(torch.equal(own.state_dict()[name], value) for name, value in state.items())


@torch.no_grad()
def test_the_same_rule_keeps_weights_and_another_one_does_not():
    swapped = ap.swap_attention(encoder(), "linear", feature_map="hedgehog")
    slots = [layer.self_attn.attn_plugin for layer in swapped.layers]
    ap.swap_attention(swapped, [{"type": "local", "layers": 0}, {"type": "linear", "feature_map": "hedgehog"}])
    assert swapped.layers[1].self_attn.attn_plugin is slots[1]
    assert swapped.layers[0].self_attn.attn_plugin.name == "local"
    ap.swap_attention(swapped, "local", layers=1)
    assert [row.plugin for row in ap.describe_attention(swapped)] == [None, "local"]


@torch.no_grad()
def test_heads_whose_rule_stays_keep_their_weights():
    learned = {"type": "linear", "feature_map": "hedgehog", "kv_heads": [0, 1]}
    swapped = ap.swap_attention(module(), [learned, {"type": "local", "window_size": 2, "kv_heads": [2]}])
    before = {part.kv_heads: part.attention for part in parts_of(swapped.attn_plugin)}
    ap.swap_attention(swapped, [learned, {"type": "local", "window_size": 3, "kv_heads": [2]}])
    after = {part.kv_heads: part.attention for part in parts_of(swapped.attn_plugin)}
    assert after[(0, 1)] is before[(0, 1)]
    assert after[(2,)] is not before[(2,)]
    assert after[(2,)].config.window_size == 3


def test_under_peft_the_same_rule_keeps_what_is_trained():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    swapped = ap.swap_attention(encoder(nested=False), "linear", feature_map="hedgehog")
    tuned = peft.get_peft_model(swapped, peft.LoraConfig(target_modules=["linear1"], modules_to_save=["attn_plugin"]))
    around = swapped.layers[0].self_attn.attn_plugin
    assert not isinstance(around, ap.Attention)
    ap.swap_attention(tuned, "linear", feature_map="hedgehog")
    assert swapped.layers[0].self_attn.attn_plugin is around
    assert [row.plugin for row in ap.describe_attention(tuned)] == ["linear", "linear"]
    assert tuned(sequence()).shape == (2, LENGTH, WIDTH)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@torch.no_grad()
def test_a_copy_is_swapped_and_restored_by_itself(copied):
    own, x = encoder(nested=False), sequence()
    want = own(x)
    swapped = ap.swap_attention(own, "linear", feature_map="hedgehog")
    again = copied(swapped)
    assert torch.equal(again(x), swapped(x))
    assert torch.equal(ap.restore_attention(again)(x), want)
    assert [row.plugin for row in ap.describe_attention(swapped)] == ["linear", "linear"]


@torch.no_grad()
def test_a_state_dict_goes_into_a_model_that_is_swapped_the_same_way():
    swapped, x = ap.swap_attention(encoder(nested=False), "linear", feature_map="hedgehog"), sequence()
    state = swapped.state_dict()
    assert any("attn_plugin" in name for name in state)
    other = ap.swap_attention(encoder(nested=False), "linear", feature_map="hedgehog")
    other.load_state_dict(state)
    assert torch.equal(other(x), swapped(x))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        encoder().load_state_dict(state)


def test_new_weights_have_gradients_and_are_where_the_module_is():
    swapped = ap.swap_attention(encoder(dropout=0.0).to(torch.float64).train(), "linear", feature_map="hedgehog")
    swapped(sequence().double()).square().sum().backward()
    new = {name: p for name, p in swapped.named_parameters() if "attn_plugin" in name}
    assert new
    assert all(p.dtype == torch.float64 and p.grad is not None and p.grad.abs().max() > 0 for p in new.values())
    assert all(p.grad is not None for p in swapped.parameters())


def test_gradients_are_those_of_the_modules_own_attention():
    own, x = encoder(dropout=0.0).train(), sequence()
    swapped = ap.swap_attention(copy.deepcopy(own), "softmax")
    for model in (own, swapped):
        model(x, src_key_padding_mask=HIDDEN)[~HIDDEN].square().sum().backward()
    for name, p in own.named_parameters():
        torch.testing.assert_close(swapped.get_parameter(name).grad, p.grad, atol=1e-5, rtol=1e-4)


def test_dropout_is_the_modules():
    swapped, x = ap.swap_attention(module(dropout=0.5), "softmax"), sequence()
    assert torch.equal(swapped(x, x, x)[0], swapped(x, x, x)[0])
    swapped.train()
    assert not torch.equal(swapped(x, x, x, need_weights=False)[0], swapped(x, x, x, need_weights=False)[0])


@torch.no_grad()
def test_gates_get_the_hidden_states():
    swapped, x = ap.swap_attention(encoder(nested=False), "gated_delta"), sequence()
    assert swapped(x, mask=CAUSAL, is_causal=True).isfinite().all()


@torch.no_grad()
def test_compiled_in_one_graph():
    own, x = module(), sequence()
    swapped = ap.swap_attention(own, "softmax")
    compiled = torch.compile(swapped, backend="aot_eager", fullgraph=True)
    given = {"attn_mask": CAUSAL.isinf(), "key_padding_mask": HIDDEN, "need_weights": False}
    close(compiled(x, x, x, **given)[0], swapped(x, x, x, **given)[0])
    assert [row.plugin for row in ap.describe_attention(compiled)] == ["softmax"]


@pytest.mark.parametrize(
    ("options", "rule", "message"),
    [
        ({"add_bias_kv": True}, "local", "MultiheadAttention cannot be swapped: add_bias_kv gives it a key that is no"),
        ({"add_zero_attn": True}, "local", "cannot be swapped: add_zero_attn gives it a key that is no token"),
        ({}, "locl", r"unknown attention 'locl' \(did you mean local\?\)"),
        ({}, {"type": "local", "layers": 1}, "layers=1 is out of range; there are layers 0 to 0"),
        ({}, {"type": "local", "heads": [4]}, r"heads=4 is out of range; .* has query heads 0 to 3"),
        ({}, {"type": "local", "roles": ["cross"]}, "no module fits roles=.'cross'."),
    ],
)
@torch.no_grad()
def test_what_does_not_fit_is_refused_and_changes_nothing(options, rule, message):
    own, x = module(**options), sequence()
    want = own(x, x, x)[0]
    with pytest.raises(ValueError, match=message):
        ap.swap_attention(own, rule)
    assert type(own) is nn.MultiheadAttention
    assert torch.equal(own(x, x, x)[0], want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attn_mask": CAUSAL.long()}, "attn_mask is of dtype torch.int64; allowed: bool, or a floating dtype"),
        ({"attn_mask": CAUSAL[:5, :5]}, r"attn_mask is of shape \(5, 5\); allowed here: what broadcasts to"),
        (
            {"attn_mask": PER_HEAD[:3]},
            r"attn_mask is of shape \(3, 12, 12\); allowed here: \(12, 12\) or \(8, 12, 12\)",
        ),
        ({"key_padding_mask": HIDDEN[:, :5]}, r"key_padding_mask is of shape \(2, 5\); allowed here: \(2, 12\)"),
        ({"query": sequence(2, 3, 5)}, r"query is of shape \(2, 3, 5\); allowed: \(batch, length, 16\)"),
        ({"value": sequence(2, 5, WIDTH)}, "one batch of all three, and as many keys as values"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(given, message):
    swapped, x = ap.swap_attention(module(), "softmax"), sequence()
    with pytest.raises(ValueError, match=message):
        swapped(**{"query": x, "key": x, "value": x, **given})


def test_weights_are_drawn_anew_as_before_the_swap():
    own = module()
    swapped = ap.swap_attention(copy.deepcopy(own), "softmax")
    for one in (own, swapped):
        torch.manual_seed(3)
        one._reset_parameters()
    assert torch.equal(own.in_proj_weight, swapped.in_proj_weight)


class Own(nn.MultiheadAttention):
    """A subclass with the class's own forward."""


@torch.no_grad()
def test_a_subclass_is_swapped_and_copied_as_what_it_is():
    own, x = Own(WIDTH, HEADS, batch_first=True).eval(), sequence()
    want = own(x, x, x)[0]
    swapped = saved(ap.swap_attention(own, "softmax"))
    assert isinstance(swapped, Own)
    close(swapped(x, x, x)[0], want)
    assert type(ap.restore_attention(swapped)) is Own
