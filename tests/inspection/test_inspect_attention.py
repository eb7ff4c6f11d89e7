"""What heads look at, in whole models: rows against weights of the dense form, figures against plain computations."""

import json
import math

import pytest
import tiny
import torch
from test_contract import Largest

import attn_plugins as ap

EVERY = ["encoder", "decoder", "cross"]
FLAGS = {
    "llama": [
        {"type": "local", "window_size": 4, "kv_heads": [1], "layers": [0, 1]},
        {"type": "gated_delta", "kv_heads": [0], "layers": 0},
        {"type": "linear", "layers": 2},
    ],
    "gpt2": {"type": "gated_linear"},
    "gemma3": {"type": "local", "window_size": 3},
    "gpt_oss": {"type": "additive"},
    "bert": {"type": "linear", "feature_map": "elu"},
    "distilbert": {"type": "linformer", "max_length": 32, "projected_length": 5},
    "t5": {"type": "softmax", "roles": EVERY},
    "bart": [{"type": "linear", "roles": ["encoder", "cross"]}, {"type": "local", "window_size": 2}],
    "vit": {"type": "neighborhood_2d", "kernel_size": 3},
}


def given_to(kind):
    return tiny.inputs(kind, padded=kind in ("llama", "bert", "bart"))


@torch.no_grad()
def weights_of(model, given):
    """By role, in the order of layers."""
    told = model(**given, output_attentions=True, **({"use_cache": False} if kind_decodes(model) else {}))
    halves = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}
    if "decoder_attentions" in told:
        return {role: told[key] for role, key in halves.items()}
    return dict.fromkeys(("encoder", "decoder"), told.attentions)


def kind_decodes(model):
    return hasattr(model, "generate") and model.can_generate()


@pytest.mark.parametrize("kind", FLAGS)
def test_rows_are_those_of_the_dense_form_and_of_the_model_itself(kind):
    given, queries, heads = given_to(kind), [2, 5], [3, 1]
    model = ap.swap_attention(tiny.build(kind), FLAGS[kind])
    swapped = ap.inspect_attention(model, given, queries=queries, heads=heads)
    original = ap.inspect_attention(model, given, queries=queries, heads=heads, through="own")
    want = weights_of(model, given)
    eager = tiny.build(kind)
    eager.set_attn_implementation("eager")
    own = weights_of(eager, given)
    assert swapped.layers
    assert [one.path for one in swapped.layers] == [one.path for one in original.layers]
    for mine, theirs in zip(swapped.layers, original.layers, strict=True):
        assert (mine.heads, mine.queries) == ([1, 3], queries)
        for got, expected, layer in ((mine.weights_BhqK, want, mine), (theirs.own_BhqK, own, theirs)):
            if not expected[layer.role]:  # T5 under "eager", before transformers 5.23
                assert kind == "t5"
                assert expected is own
                continue
            expected = expected[layer.role][layer.layer][:, [1, 3]][:, :, queries]
            assert got.shape == expected.shape
            real = layer.real_Bq[:, None, :, None]
            torch.testing.assert_close(got * real, expected * real, atol=2e-5, rtol=1e-3)
        for one in mine.figures:
            assert mine.exact
            assert one.unexplained < 1e-8
            assert one.weights.negative == 0 or not ap.get_attention(one.attention).convex


def test_softmax_in_the_slots_is_the_model_itself():
    model = ap.swap_attention(tiny.build("llama"), "softmax")
    found = ap.inspect_attention(model, tiny.inputs("llama", length=30), topk=3)
    assert [one.queries for one in found.layers] == [list(range(30))] * 3
    for layer in found.layers:
        torch.testing.assert_close(layer.weights_BhqK, layer.own_BhqK)
        for one in layer.figures:
            assert one.error < 1e-10
            assert one.overlap > 0.99
            assert one.weights.mass == pytest.approx(1)
    assert str(found).count("softmax") == 12


def test_an_output_that_is_no_sum_of_values_says_so():
    model = ap.swap_attention(tiny.build("bert"), "fastformer")
    found = ap.inspect_attention(model, tiny.inputs("bert", padded=False), queries=-1, layers=0)
    (layer,) = found.layers
    assert not layer.exact
    assert layer.queries == [12]
    assert all(one.unexplained > 0.1 for one in layer.figures)


def test_figures_are_what_they_say():
    """Against loops over queries and keys, in a window with one sink that a padded row begins with."""
    model, given = ap.swap_attention(tiny.build("gpt2"), "local", window_size=3, num_sink_tokens=1), tiny.inputs("gpt2")
    queries = [6, 9, 12]
    found = ap.inspect_attention(model, given, queries=queries, layers=1, heads=2, window=2, topk=2, num_sink_tokens=1)
    (layer,) = found.layers
    (figures,) = layer.figures
    real = given["attention_mask"].bool()
    lists = {"own": layer.own_BhqK, "weights": layer.weights_BhqK}
    plain = {side: [] for side in lists}
    overlaps = []
    for row in range(2):
        first = int(real[row].long().argmax())
        for place, query in enumerate(queries):
            if not real[row, query]:
                continue
            top = {}
            for side, weights in lists.items():
                p = weights[row, 0, place].tolist()
                mass, needed = 0.0, 0
                for one in sorted(p, reverse=True):
                    if mass < 0.9:
                        mass, needed = mass + one, needed + 1
                plain[side].append(
                    {
                        "mass": sum(p),
                        "negative": 0.0,
                        "entropy": -sum(one * math.log(one) for one in p if one > 0),
                        "distance": sum(one * (query - key) for key, one in enumerate(p)),
                        "density": needed / (query - first + 1),
                        "sinks": p[first],
                        "outside": sum(one for key, one in enumerate(p) if query - key >= 2),
                    }
                )
                top[side] = {key for key in sorted(range(len(p)), key=lambda key: -p[key])[:2] if p[key] > 0}
            if query - first + 1 > 2:
                overlaps.append(len(top["own"] & top["weights"]) / len(top["own"]))
    for side, rows in plain.items():
        for name in rows[0]:
            mean = sum(row[name] for row in rows) / len(rows)
            assert getattr(getattr(figures, side), name) == pytest.approx(mean, abs=1e-5), f"{side} {name}"
    assert figures.overlap == pytest.approx(sum(overlaps) / len(overlaps))
    assert figures.weights.outside > figures.weights.sinks > 0.1


def test_the_error_is_that_of_all_real_queries():
    model, given = ap.swap_attention(tiny.build("llama"), "local", window_size=2), tiny.inputs("llama")
    (layer,) = ap.inspect_attention(model, given, queries=0, layers=0).layers
    seen = []
    module = model.model.layers[0].self_attn
    module.attn_plugin.register_forward_hook(lambda slot, args, out: seen.append((args, out[0])))
    with torch.no_grad():
        model(**given, use_cache=False)
    (query, key, value), out = seen[0]
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    real = given["attention_mask"].bool()
    hidden = torch.ones(13, 13, dtype=torch.bool).triu(1) | ~real[:, None, None]
    own = (scores.masked_fill(hidden, -1e9).softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
    for head, one in enumerate(layer.figures):
        errors = [
            float((out[row, real[row], head] - own[row, real[row], head]).square().sum())
            / float(own[row, real[row], head].square().sum())
            for row in range(2)
        ]
        assert one.error == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_the_model_is_left_as_it_was():
    model, given = ap.swap_attention(tiny.build("llama"), "linear").train(), tiny.inputs("llama")
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = model(**given).logits
    ap.inspect_attention(model, given)
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert torch.equal(model(**given).logits, before)


def test_half_precision_is_weighed_in_float32():
    model, given = ap.swap_attention(tiny.build("llama").bfloat16(), "additive"), tiny.inputs("llama")
    (layer,) = ap.inspect_attention(model, given, layers=1).layers
    assert layer.weights_BhqK.dtype == torch.float32
    assert all(one.unexplained < 1e-8 for one in layer.figures)
    torch.testing.assert_close(layer.weights_BhqK, layer.own_BhqK, atol=1e-5, rtol=1e-3)


def test_modes_around_it_change_nothing():
    model, given = ap.swap_attention(tiny.build("llama"), "gated_delta"), tiny.inputs("llama")
    want = ap.inspect_attention(model, given, queries=[4, 12]).layers
    with torch.inference_mode():
        inside = {name: x.clone() for name, x in given.items()}
        got = ap.inspect_attention(model, inside, queries=[4, 12]).layers
    with torch.no_grad():
        got += ap.inspect_attention(model, given, queries=[4, 12]).layers
    for one, other in zip(got, [*want, *want], strict=True):
        assert torch.equal(one.weights_BhqK, other.weights_BhqK)
        assert one.figures == other.figures
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (lower,) = ap.inspect_attention(model, given, layers=0).layers
    assert lower.own_BhqK.dtype == torch.float32
    assert all(one.unexplained < 1e-8 for one in lower.figures)
    torch.testing.assert_close(lower.own_BhqK.sum(-1)[:, :, -1], torch.ones(2, 4))


@pytest.mark.parametrize("flag", [{"type": "local", "window_size": 16}, {"type": "linear"}, {"type": "delta"}])
def test_nothing_of_length_squared_is_made(flag):
    model = ap.swap_attention(tiny.build("llama", max_position_embeddings=2048, num_attention_heads=2), flag)
    with Largest() as largest:
        ap.inspect_attention(model, {"input_ids": torch.randint(3, 90, (1, 1536))}, queries=[3, -1], layers=1)
    assert largest.elements < 1536 * 1536, largest.made_by


def test_all_of_it_is_json():
    model = ap.swap_attention(tiny.build("bart"), "softmax", roles=EVERY)
    found = ap.inspect_attention(model, tiny.inputs("bart"), queries=[0, 2])
    told = json.loads(json.dumps(found.to_dict()))
    assert [one["role"] for one in told["layers"]] == ["encoder"] * 2 + ["decoder", "cross"] * 2
    cross = told["layers"][-1]
    assert torch.tensor(cross["weights_BhqK"]).shape == found.layers[-1].weights_BhqK.shape
    assert cross["figures"][0]["weights"]["distance"] is None
    assert "weights_BhqK" not in found.to_dict(rows=False)["layers"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 7}, r"layers=7 has 7, and the model has layers 0 to 2"),
        ({"layers": "no"}, r"layers='no'; allowed: \"all\", 3"),
        ({"layers": 1}, r"no module of LlamaForCausalLM has a slot among those asked for .*model.layers.1.self_attn"),
        ({"roles": ["cross"]}, r"no module is in layers='all', roles=\['cross'\], modules='\*'; roles: decoder"),
        ({"heads": 4}, r"heads=4 has 4, and model.layers.0.self_attn has 4 heads; allowed"),
        ({"queries": [13]}, r"queries=\[13\], and model.layers.0.self_attn has 13 queries; allowed: -13 to 12"),
        ({"through": "both"}, r"through='both'; allowed: 'swapped', 'own'"),
        ({"window": 0}, r"window=0; allowed: an integer from 1 on"),
    ],
)
def test_what_cannot_be_inspected_is_refused(options, message):
    model = ap.swap_attention(tiny.build("llama"), "local", layers=[0, 2])
    with pytest.raises(ValueError, match=message):
        ap.inspect_attention(model, tiny.inputs("llama"), **options)
