"""Gradient times weights and rollout, against matrices of all weights and finite differences."""

import pytest
import tiny
import torch
from torch import nn

import attn_plugins as ap
from attn_plugins.inspection.attributions import attention_rollout, gradient_times_weights

HYBRID = [
    {"type": "gated_delta", "kv_heads": [0], "layers": 0},
    {"type": "linear", "layers": [1]},
    {"type": "local", "window_size": 4, "roles": ["encoder", "decoder", "cross"]},
]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_rollout_is_the_product_of_all_layers(kind):
    flag = HYBRID if kind == "llama" else "linear"
    model, given = ap.swap_attention(tiny.build(kind), flag), tiny.inputs(kind)
    role = "decoder" if kind == "llama" else "encoder"
    found = attention_rollout(model, given, queries=[-1, 4], role=role)
    assert found.queries == [12, 4]
    with torch.no_grad():
        every = model(**given, output_attentions=True).attentions
    product = torch.eye(13).expand(2, -1, -1)
    for weights in every:
        product = (weights.mean(1) + torch.eye(13)) / 2 @ product
    real = given["attention_mask"].bool()[:, [12, 4], None]
    torch.testing.assert_close(found.weights_BqK * real, product[:, [12, 4]] * real, atol=1e-5, rtol=1e-3)
    rows = found.own_BqK.sum(-1)[real[..., 0]]
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_gradient_times_weights_is_what_a_weight_changes():
    """Each weight of a layer is changed a little, by a slot that returns what these weights make of the values."""
    model, given = ap.swap_attention(tiny.build("llama"), "softmax").double(), tiny.inputs("llama", padded=False)
    given = {"input_ids": given["input_ids"][:1, :6]}
    (found,) = gradient_times_weights(model, given, target=5, layers=1, heads=[2, 3], queries=[2, 5])
    assert (found.heads, found.queries) == ([2, 3], [2, 5])
    slot = model.model.layers[1].self_attn.attn_plugin
    changed = {}

    def change(slot, args, attended):
        head, query, key, by = changed["what"]
        weights = slot.reference(*args, **{k: v for k, v in changed["options"].items() if k in ("mask", "scale")})[1]
        changed["weight"] = weights[0, head, query, key].item()
        attended[0][0, query, head] += by * args[2][0, head // 2, key]
        return attended

    def note(slot, args, options):
        changed["options"] = options

    def y(head, query, key, by):
        changed["what"] = head, query, key, by
        with torch.no_grad():
            return model(**given, use_cache=False).logits[0, -1, 5].item()

    slot.register_forward_pre_hook(note, with_kwargs=True)
    slot.register_forward_hook(change)
    for place, head in enumerate([2, 3]):
        for row, query in enumerate([2, 5]):
            for key in range(query + 1):
                slope = (y(head, query, key, 0.01) - y(head, query, key, -0.01)) / 0.02  # norms are in float32
                got = found.of_pairs_BhqK[0, place, row, key].item()
                assert got == pytest.approx(slope * changed["weight"], rel=3e-3, abs=1e-5)
    assert not found.of_pairs_BhqK[0, :, 0, 3:].any()


@pytest.mark.parametrize("kind", ["llama", "bert", "bart"])
def test_sums_over_queries_are_those_of_all_pairs(kind):
    given = tiny.inputs(kind, padded=False)
    model = ap.swap_attention(tiny.build(kind), HYBRID if kind == "llama" else {"type": "linear", "layers": [0]})
    queries = None if kind == "bart" else range(13)
    for found in gradient_times_weights(model.requires_grad_(False), given, queries=queries, heads=[3, 0]):
        assert found.of_keys_BhK.abs().max() > 1e-6
        if queries is not None:
            torch.testing.assert_close(found.of_keys_BhK, found.of_pairs_BhqK.sum(2), atol=1e-6, rtol=1e-4)
    again = gradient_times_weights(model, given, target=lambda out: out.logits.sum() * 0)
    assert all(not found.of_keys_BhK.any() for found in again)
    assert all(weight.grad is None for weight in model.parameters())


def test_padding_after_a_text_changes_nothing():
    model, ids = ap.swap_attention(tiny.build("llama"), "local"), tiny.inputs("llama", padded=False)["input_ids"]
    padded, mask = nn.functional.pad(ids, (0, 4)), torch.ones_like(ids)
    given = {"input_ids": padded, "attention_mask": nn.functional.pad(mask, (0, 4))}
    for target in (5, None):
        alone = gradient_times_weights(model, {"input_ids": ids}, target=target)
        for one, other in zip(gradient_times_weights(model, given, target=target), alone, strict=True):
            torch.testing.assert_close(one.of_keys_BhK[..., :-4], other.of_keys_BhK, atol=1e-6, rtol=1e-4)
            assert not one.of_keys_BhK[..., -4:].any()


def test_inference_mode_around_it_changes_nothing():
    model, given = ap.swap_attention(tiny.build("llama"), "local"), tiny.inputs("llama")
    with torch.inference_mode():
        inside = {name: x.clone() for name, x in given.items()}
        got, rolled = gradient_times_weights(model, inside), attention_rollout(model, inside, queries=5)
    for one, other in zip(got, gradient_times_weights(model, given), strict=True):
        assert torch.equal(one.of_keys_BhK, other.of_keys_BhK)
    assert torch.equal(rolled.weights_BqK, attention_rollout(model, given, queries=5).weights_BqK)


@pytest.mark.parametrize(
    ("flag", "call", "message"),
    [
        (
            "fastformer",
            attention_rollout,
            r"the output of fastformer\(chunk_size=16\) at model.layers.0.self_attn is no",
        ),
        ("fastformer", gradient_times_weights, r"is no sum of values.*allowed: attentions with linear_in_values"),
        (
            {"type": "local", "layers": [0, 2]},
            attention_rollout,
            r"model.layers.1.self_attn have no slot: put 'softmax'",
        ),
    ],
)
def test_what_has_no_attribution_is_refused(flag, call, message):
    model = ap.swap_attention(tiny.build("llama"), flag)
    with pytest.raises(ValueError, match=message):
        call(model, tiny.inputs("llama"))


def test_wrong_targets_and_roles_are_refused():
    model, given = ap.swap_attention(tiny.build("llama"), "local"), tiny.inputs("llama")
    with pytest.raises(ValueError, match=r"target=97; allowed: 0 to 96"):
        gradient_times_weights(model, given, target=97)
    with pytest.raises(ValueError, match=r"role='cross'; allowed: 'encoder', 'decoder'"):
        attention_rollout(model, given, role="cross")
    with pytest.raises(ValueError, match=r"BaseModelOutputWithPast has no logits; give target as a function"):
        gradient_times_weights(ap.swap_attention(tiny.build("llama"), "local").model, given)
    with pytest.raises(ValueError, match=r"no module is in layers=.*; roles: decoder"):
        attention_rollout(model, given, role="encoder")
