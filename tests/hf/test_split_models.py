"""Models of which some heads have other attentions: what they compute, and what of a model they have to serve."""

import copy
import pickle
import warnings

import adapter_cases
import pytest
import tiny
import torch

import attn_plugins as ap
from attn_plugins.hf.names import slot_of
from attn_plugins.hf.split import SplitAttention

SOFTMAX = {"type": "softmax"}
LOCAL = {"type": "local", "window_size": 3}
FROM_CACHE = {**LOCAL, "positions": "cache", "num_sink_tokens": 2}


def given_to(name):
    return tiny.inputs(name, length=20 if name == "llava" else 13)


def roles(model):
    return sorted({row.role for row in ap.describe_attention(model)})


def is_split(model):
    return any(isinstance(slot_of(module), SplitAttention) for module in model.modules())


def faithful(name):
    """With the attention that its weights are for: sdpa leaves learned sinks and softcaps out."""
    return tiny.build(name, _attn_implementation="eager") if name in ("gemma2", "gpt_oss") else tiny.build(name)


@pytest.mark.parametrize("name", tiny.MODELS)
@torch.no_grad()
def test_softmax_in_every_part_is_the_models_own(name):
    model, given = faithful(name), given_to(name)
    own = tiny.output(model, given)
    softmax = {**SOFTMAX, "roles": roles(model)}
    for rules in ([{**softmax, "kv_heads": [1]}], [{**softmax, "kv_heads": [0]}, softmax]):
        ap.swap_attention(model, rules)
        assert is_split(model)
        torch.testing.assert_close(tiny.output(model, given), own, atol=3e-6, rtol=1e-5)
    ap.restore_attention(model)
    assert torch.equal(tiny.output(model, given), own)


@pytest.mark.parametrize("name", ["gptj", "bloom", "falcon-groups", "deberta_v2", "mpnet", "blip-captions"])
@torch.no_grad()
def test_families_with_an_adapter_have_heads_too(name):
    case = adapter_cases.CASES[name]
    cls, config = case.made()
    torch.manual_seed(0)
    model, given = cls._from_config(config).eval(), case.given()
    own = tiny.output(model, given)
    ap.swap_attention(model, {**SOFTMAX, "kv_heads": [0]})
    assert is_split(model)
    torch.testing.assert_close(tiny.output(model, given), own, atol=3e-6, rtol=1e-5)
    ap.swap_attention(model, {**LOCAL, "kv_heads": [0]})
    assert (tiny.output(model, given) - own).abs().max() > 1e-6
    ap.restore_attention(model)
    assert torch.equal(tiny.output(model, given), own)


def before_output(model, path, given):
    """What the output projection of the attention at a path is given."""
    seen = []
    layer = model.get_submodule(path)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**given)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "projection", "head", "rule"),
    [
        ("llama", "model.layers.0.self_attn.o_proj", slice(16, 32), LOCAL),
        (
            "llama",
            "model.layers.0.self_attn.o_proj",
            slice(16, 32),
            {**LOCAL, "positions": "cache", "num_sink_tokens": 2},
        ),
        ("llama", "model.layers.0.self_attn.o_proj", slice(16, 32), {"type": "linear"}),
        ("gpt2", "transformer.h.0.attn.c_proj", slice(8, 16), {"type": "fixed", "stride": 4, "num_summary_columns": 1}),
        ("gpt_oss", "model.layers.0.self_attn.o_proj", slice(16, 32), LOCAL),
        ("t5", "encoder.block.0.layer.0.SelfAttention.o", slice(8, 16), LOCAL),
        ("bert", "bert.encoder.layer.0.attention.output.dense", slice(8, 16), {"type": "topk", "topk": 3}),
        ("vit", "layers.0.attention.o_proj", slice(8, 16), {"type": "neighborhood_2d", "kernel_size": 3}),
    ],
)
@torch.no_grad()
def test_heads_of_a_layer_are_those_of_the_two_whole_models(name, projection, head, rule):
    """The first layer's, whose input is the same whatever serves it."""
    given, own = given_to(name), faithful(name)
    whole = ap.swap_attention(faithful(name), rule)
    model = ap.swap_attention(faithful(name), {**rule, "kv_heads": [1]})
    assert is_split(model)
    found, expected = before_output(model, projection, given), before_output(own, projection, given)
    expected[..., head] = before_output(whole, projection, given)[..., head]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bert", "t5"])
@torch.no_grad()
def test_attention_weights_are_put_together_by_heads(name):
    given = given_to(name)
    own, whole = tiny.build(name, _attn_implementation="eager"), ap.swap_attention(tiny.build(name), LOCAL)
    model = ap.swap_attention(tiny.build(name), {**LOCAL, "kv_heads": [0]})
    wanted = {"output_attentions": True}
    found, expected, others = (one(**given, **wanted) for one in (model, own, whole))
    kind = "encoder_attentions" if name == "t5" else "attentions"
    found, expected, others = (getattr(one, kind)[0] for one in (found, expected, others))
    groups = found.shape[1] // 4 * (2 if name in ("llama", "gpt_oss") else 1)
    real = given["attention_mask"].bool()[:, None, :, None]
    expected = torch.cat([others[:, :groups], expected[:, groups:]], dim=1)
    torch.testing.assert_close(found * real, expected * real, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_cross_attention_is_split_where_it_is_named():
    model, given = tiny.build("whisper"), given_to("whisper")
    own = tiny.output(model, given)
    ap.swap_attention(model, {**SOFTMAX, "roles": "cross", "heads": [0, 2]})
    assert {(row.role, row.kv_heads) for row in ap.describe_attention(model) if row.plugin} == {("cross", (0, 2))}
    torch.testing.assert_close(tiny.output(model, given), own, atol=3e-6, rtol=1e-5)


@torch.no_grad()
def test_packed_texts_do_not_see_each_other():
    model = ap.swap_attention(tiny.build("llama"), [{**LOCAL, "num_sink_tokens": 1, "kv_heads": [0]}])
    ids = tiny.inputs("llama", batch=1, length=12, padded=False)["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(7)]).unsqueeze(0)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for start, stop in ((0, 5), (5, 12)):
        alone = model(input_ids=ids[:, start:stop], use_cache=False).logits
        torch.testing.assert_close(packed[:, start:stop], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_what_is_learned_and_are_the_models_own_where_nothing_is_changed(checkpointing):
    given = tiny.inputs("llama")
    own = tiny.build("llama").train()
    own(**given, labels=given["input_ids"]).loss.backward()
    model = ap.swap_attention(tiny.build("llama").train(), {**SOFTMAX, "kv_heads": [1]})
    learned = ap.swap_attention(tiny.build("llama").train(), {"type": "retention", "kv_heads": [1]})
    for one in (model, learned):
        if checkpointing:
            one.gradient_checkpointing_enable()
        one(**given, labels=given["input_ids"]).loss.backward()
    for (name, weight), other in zip(own.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, weight.grad, atol=1e-6, rtol=1e-4, msg=name)
    new = {name: p.grad.norm() for name, p in learned.named_parameters() if "attn_plugin" in name}
    assert len(new) == 6
    assert all(norm > 0 for norm in new.values())


@torch.no_grad()
def test_one_graph_of_both():
    model = ap.swap_attention(tiny.build("llama", num_hidden_layers=1), {"type": "linear", "kv_heads": [1]})
    given = tiny.inputs("llama", padded=False)
    expected = tiny.output(model, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own, about this machine
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(tiny.output(compiled, given), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_copies_are_split_too():
    model, given = ap.swap_attention(tiny.build("llama"), {**LOCAL, "kv_heads": [1]}), tiny.inputs("llama")
    expected = tiny.output(model, given)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny.output(copied, given), expected)


def test_parts_that_stay_keep_their_weights_when_rules_change():
    hedgehog = {"type": "linear", "feature_map": "hedgehog", "kv_heads": [1]}
    model = ap.swap_attention(tiny.build("llama"), [hedgehog, SOFTMAX])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attn_plugin" in name:
                weight.fill_(0.5)
    learned = dict(model.named_parameters())
    ap.swap_attention(model, [hedgehog, LOCAL])
    assert all(learned[name] is weight for name, weight in model.named_parameters())
    ap.swap_attention(model, [{**hedgehog, "kv_heads": [0]}, LOCAL])
    assert not any(torch.equal(w, torch.full_like(w, 0.5)) for n, w in model.named_parameters() if "attn_plugin" in n)


def test_dropout_that_some_heads_leave_out_is_told():
    config = tiny.config_of("llama")
    config.attention_dropout = 0.25
    model = type(tiny.build("llama"))(config)
    with pytest.warns(UserWarning, match="'linear' drops no weights"):
        ap.swap_attention(model, [{"type": "linear", "kv_heads": [0]}, SOFTMAX])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({**LOCAL, "kv_heads": [2]}, "kv_heads=2 is out of range; model.layers.0.self_attn has key/value heads 0 to 1"),
        ({**LOCAL, "heads": [0]}, "names a part of the query heads 0 to 1 that share key/value head 0"),
        ({"type": "linformer", "kv_heads": [0]}, "cannot serve model.layers.0.self_attn: it is causal"),
        ([{**LOCAL, "kv_heads": [0]}, {**SOFTMAX, "kv_heads": [0]}], "earlier rules take all of its heads"),
    ],
)
def test_what_is_refused_changes_nothing(rules, message):
    model, given = tiny.build("llama"), tiny.inputs("llama")
    with torch.no_grad():
        own = tiny.output(model, given)
        with pytest.raises(ValueError, match=message):
            ap.swap_attention(model, rules)
        assert torch.equal(tiny.output(model, given), own)
    assert not any(slot_of(module) for module in model.modules())
    assert model.config.attn_plugin is None


def test_heads_in_pairs_need_pairs():
    with pytest.raises(ValueError, match="needs a number of query heads that is a multiple of 2, got 1"):
        ap.swap_attention(tiny.build("gpt2"), {"type": "differential", "heads": [0]})


def test_described_a_part_a_row():
    model = tiny.build("llama")
    ap.swap_attention(model, [{**LOCAL, "kv_heads": {"1": [1]}}, {"type": "linear", "layers": 0}])
    rows = ap.describe_attention(model)
    assert [(row.layer, row.plugin, row.implementation, row.kv_heads) for row in rows] == [
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
