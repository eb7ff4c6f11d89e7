"""Choices: what is chosen among, how many, by which scores; the rules say it; the model stays as it was."""

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from test_contribution import row

import attn_plugins as ap
from attn_plugins.choice.choose import SCORES
from attn_plugins.choice.shared_copy import shared_copy
from attn_plugins.hf.names import SLOT
from attn_plugins.hf.observe import own_attention

RULE = {"type": "local", "window_size": 3, "num_sink_tokens": 1}


def planted(kind="llama", layer=1, group=0):
    """A decoder in which the values of one head group alone are large."""
    model = tiny.build(kind)
    size = model.config.head_dim
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            rows = block.self_attn.v_proj.weight.view(-1, size, 32)
            rows *= torch.tensor([4.0 if (number, one) == (layer, group) else 0.2 for one in range(2)])[:, None, None]
    return model


def texts_in(file):
    return [json.loads(line)["text"] for line in Path(file).read_text().splitlines()]


def state_of(model):
    """All that a swap, hooks or training could change in a model."""
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module))) for module in model.modules()
    ]
    tensors = {name: (id(x), x.clone(), x.requires_grad, x.grad) for name, x in model.named_parameters()}
    return hooks, tensors, model.config, model.config.to_dict(), model.training


def assert_as_before(model, before):
    hooks, tensors, config, settings, training = state_of(model)
    assert (hooks, settings, training) == (before[0], before[3], before[4])
    assert config is before[2]
    assert tensors.keys() == before[1].keys()
    for name, (number, x, requires_grad, grad) in tensors.items():
        assert (number, requires_grad, grad) == (before[1][name][0], *before[1][name][2:])
        assert torch.equal(x, before[1][name][1])


@pytest.mark.parametrize("score", SCORES)
def test_every_score_finds_the_head_that_matters_and_leaves_the_model(score):
    model = planted().train()
    before = state_of(model)
    choice = ap.choose_attention(model, None, [row(48)], RULE, 0.2, score=score)
    assert_as_before(model, before)
    if "recall" not in score:  # a model that was not trained recalls nothing
        assert [(one.layer, one.kv_head) for one in choice.kept] == [(1, 0)]
        assert choice == [{"type": "softmax", "kv_heads": {1: [0]}}, RULE]


@pytest.mark.parametrize("score", [score for score in SCORES if "recall" not in score])
def test_every_score_finds_the_layer_that_matters(score):
    choice = ap.choose_attention(planted(), None, [row(48)], RULE, 0.4, "layers", score)
    assert choice == [{"type": "softmax", "layers": [1]}, RULE]
    assert [(one.layer, one.kv_head, one.kept) for one in choice.scores] == [
        (0, None, False),
        (1, None, True),
        (2, None, False),
    ]


def test_a_metric_decides():
    model, one = planted(), row()
    ids = one.input_ids_N[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits

    def nearness(model):
        with torch.no_grad():
            return -float((model(input_ids=ids).logits - own).square().mean())

    assert nearness(model) == 0
    before = state_of(model)
    choice = ap.choose_attention(model, None, [], RULE, 0.4, "layers", nearness)
    assert [one.layer for one in choice.kept] == [1]
    choice = ap.choose_attention(model, None, [], RULE, 0.2, score=nearness)
    assert [(one.layer, one.kv_head) for one in choice.kept] == [(1, 0)]
    expected = nearness(ap.swap_attention(shared_copy(model), {**RULE, "kv_heads": {1: [0]}}))
    assert choice.kept[0].score == pytest.approx(-expected)
    assert_as_before(model, before)
    assert choice.score == "metric"


@pytest.mark.parametrize(
    ("budget", "level", "number"),
    [
        (0.2, "heads", 1),
        (0.5, "heads", 3),
        (0.66, "heads", 3),
        (4 / 6, "heads", 4),
        (0.34, "layers", 1),
        (0.9, "layers", 2),
    ],
)
def test_the_budget_is_a_share_rounded_down(budget, level, number):
    choice = ap.choose_attention(tiny.build("llama"), None, [row()], RULE, budget, level)
    assert len(choice.kept) == number
    scores = [one.score for one in choice.scores if not one.kept]
    assert min(one.score for one in choice.kept) >= max(scores)


@pytest.mark.parametrize("level", ["heads", "layers"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "gemma3"])
def test_what_is_kept_is_as_it_was_to_the_bit(kind, level):
    model, given = tiny.build(kind), {"input_ids": row().input_ids_N[None]}
    choice = ap.choose_attention(model, None, [given], RULE, 0.5 if kind == "gemma3" else 0.4, "heads")
    if level == "layers" and kind != "gemma3":
        choice = ap.choose_attention(model, None, [given], RULE, 0.4, "layers")
    calls = []
    swapped = ap.swap_attention(shared_copy(model), choice)
    with torch.no_grad(), own_attention(swapped, calls.append):
        swapped(**given)  # every module gets what it gets in the model
    modules = {swapped.get_submodule(one.path): one.path for one in choice.scores}
    kept, changed = set(), 0
    for call in calls:
        out, own = call.attend()[0], call.own_BQHV
        groups = call.key_BGKD.shape[1]
        for group in range(groups):
            heads = slice(group * own.shape[2] // groups, (group + 1) * own.shape[2] // groups)
            if torch.equal(out[:, :, heads], own[:, :, heads]):
                kept.add((modules[call.module], group))
            else:
                changed += 1
    named = {(one.path, n) for one in choice.kept for n in (range(groups) if one.kv_head is None else [one.kv_head])}
    assert kept == named
    assert changed == len(choice.scores) * (groups if choice.level == "layers" else 1) - len(named)


def test_own_sliding_layers_are_left_alone():
    choice = ap.choose_attention(tiny.build("gemma3"), None, [row()], RULE, 0.5)
    assert {one.layer for one in choice.scores} == {2}
    assert choice == [{"type": "softmax", "kv_heads": {2: [choice.kept[0].kv_head]}}, {**RULE, "layers": [2]}]


def test_a_model_that_slides_everywhere_is_chosen_among():
    choice = ap.choose_attention(tiny.build("mistral"), None, [row()], RULE, 0.4, "layers")
    assert {one.layer for one in choice.scores} == {0, 1, 2}
    assert choice[-1] == RULE


@pytest.mark.parametrize("kind", ["whisper", "bart", "t5"])
def test_an_encoder_beside_a_decoder_is_left_alone(kind):
    model, given = tiny.build(kind), tiny.inputs(kind, padded=False)
    rule = {"type": "topk", "topk": 2}
    choice = ap.choose_attention(model, None, [given], rule, 0.5, "layers")
    assert {one.role for one in choice.scores} == {"decoder"}
    (layer,) = (one.layer for one in choice.kept)
    assert choice == [{"type": "softmax", "roles": ["decoder"], "layers": [layer]}, {**rule, "roles": ["decoder"]}]
    plugins = {row.path: row.plugin for row in ap.describe_attention(ap.swap_attention(model, choice))}
    assert plugins.pop(choice.kept[0].path) == "softmax"
    assert sorted(path for path, plugin in plugins.items() if plugin == "topk") == [
        one.path for one in choice.scores if not one.kept
    ]


def test_roles_of_the_rule_are_chosen_among():
    model, given = tiny.build("whisper"), tiny.inputs("whisper")
    rule = {"type": "topk", "topk": 2, "roles": ["encoder", "cross"]}
    choice = ap.choose_attention(model, None, [given], rule, 0.3)
    assert {(one.role, one.layer) for one in choice.scores} == {(r, n) for r in ("encoder", "cross") for n in range(2)}
    assert choice[-1] == rule
    for one in choice[:-1]:
        assert len(one["roles"]) == 1


def test_the_rule_s_own_layers_are_chosen_among():
    choice = ap.choose_attention(tiny.build("llama"), None, [row()], {**RULE, "layers": [1, 2]}, 0.5, "layers")
    assert [one.layer for one in choice.scores] == [1, 2]
    assert choice[-1] == {**RULE, "layers": [1, 2]}


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders_and_images(kind):
    model, given = tiny.build(kind), tiny.inputs(kind)
    choice = ap.choose_attention(model, None, [given], RULE, 0.25)
    assert choice[-1] == RULE
    assert len(choice.kept) == len(choice.scores) // 4


def test_trained_weights_are_scored_as_they_are():
    model, one = ap.swap_attention(tiny.build("llama"), "linear_window", window_size=3), row()
    fresh = ap.choose_attention(model, None, [one])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if SLOT in name:
                weight += torch.randn_like(weight)
    before = state_of(model)
    trained = ap.choose_attention(model, None, [one])
    named = ap.choose_attention(model, None, [one], {"type": "linear_window", "window_size": 3})
    assert_as_before(model, before)
    assert [x.score for x in trained.scores] == [x.score for x in named.scores]
    assert [x.score for x in trained.scores] != [x.score for x in fresh.scores]
    assert trained[-1]["type"] == "linear_window"


def test_the_model_is_left_after_an_error():
    model = tiny.build("llama")
    before = state_of(model)

    def broken(model):
        raise RuntimeError("the metric failed")

    with pytest.raises(RuntimeError, match="the metric failed"):
        ap.choose_attention(model, None, [], RULE, score=broken)
    assert_as_before(model, before)
    with pytest.raises(ValueError, match="has no 'any_mask'"):
        ap.choose_attention(tiny.build("mistral"), None, [row()], "linear")


def test_a_shared_copy_has_the_weights_and_nothing_else():
    model = ap.swap_attention(tiny.build("llama"), "linear")
    copied = shared_copy(model)
    pairs = list(zip(model.parameters(), copied.parameters(), strict=True))
    assert all(one.data_ptr() == other.data_ptr() and not other.requires_grad for one, other in pairs)
    assert not {id(module) for module in model.modules()} & {id(module) for module in copied.modules()}
    assert copied.config is not model.config
    ap.restore_attention(copied)
    assert all(one.plugin == "linear" for one in ap.describe_attention(model))


def test_what_was_chosen_is_printed_and_saved(tmp_path):
    choice = ap.choose_attention(planted(), None, [row()], RULE, 0.5)
    text = str(choice)
    assert text.startswith(
        "3 of 6 key/value heads keep full attention, chosen by contribution\n  layer   1  kv head   0"
    )
    assert yaml.safe_load(text[text.index("- type") :]) == choice
    files = choice.save(tmp_path / "new")
    assert [file.name for file in files] == ["rules.yaml", "scores.json", "scores.png"]
    assert yaml.safe_load(files[0].read_text()) == choice
    saved = json.loads(files[1].read_text())
    assert sum(one["kept"] for one in saved["scores"]) == 3
    assert (saved["level"], saved["score"], saved["budget"]) == ("heads", "contribution", 0.5)
    assert files[2].read_bytes()[:4] == b"\x89PNG"
    panels = ap.choose_attention(
        tiny.build("whisper"),
        None,
        [tiny.inputs("whisper")],
        {"type": "topk", "topk": 2, "roles": ["cross", "decoder"]},
    ).plot()
    assert [axis.get_title() for axis in panels.axes if axis.get_title()] == [
        "contribution: model.decoder.layers (decoder)",
        "contribution: model.decoder.layers (cross)",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget=0; allowed: between 0 and 1, a share of the heads that may be served"),
        ({"budget": 1}, "budget=1; allowed: between 0 and 1"),
        ({"budget": 0.1}, "budget=0.1 of 6 heads is none; allowed: at least 0.167"),
        ({"level": "head"}, "level='head'; allowed: heads, layers"),
        (
            {"score": "contributions"},
            r"score='contributions' \(did you mean contribution\?\); allowed: contribution, kl",
        ),
        ({"length": 0}, "length=0; allowed: at least 1, or None"),
        ({"rule": None}, "rule=None, and the model is not swapped"),
        ({"rule": [RULE, "linear"]}, "rule is a list of 2 rules; allowed: one"),
        ({"rule": {**RULE, "window_size": 64}}, "the rule changes nothing at the tokens that are scored"),
        ({"rule": {**RULE, "layers": 7}}, "layers=7 is out of range"),
        ({"texts": []}, "texts is empty"),
        ({"texts": ["a text"]}, "texts holds a str and there is no tokenizer"),
        ({"texts": [{"input_ids": torch.arange(9)[None]}], "score": "recall"}, "score 'recall' needs rows"),
        ({"texts": [{"input_ids": torch.arange(9)[None]}], "score": "gates"}, "score 'gates' needs rows"),
    ],
)
def test_what_does_not_fit(changes, message):
    given = {"texts": [row()], "rule": RULE, **changes}
    with pytest.raises(ValueError, match=message):
        ap.choose_attention(tiny.build("llama"), None, **given)


def test_scores_of_logits_need_them():
    model, given = tiny.build("vit"), tiny.inputs("vit")
    with pytest.raises(ValueError, match="ViTModel gives no logits; choose by contribution or by a metric"):
        ap.choose_attention(model, None, [given], RULE, score="kl")


def test_scores_that_are_no_numbers_are_refused():
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="scores are not finite numbers"):
        ap.choose_attention(model, None, [row()], RULE)


def test_rows_are_made_of_texts(llama, text):
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = tf.AutoTokenizer.from_pretrained(llama)
    texts = texts_in(text)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match="the tokenizer does not know the letters of"):
        ap.choose_attention(model, tokenizer, texts, RULE, 0.5)
    with pytest.raises(ValueError, match="takes two sequences"):
        ap.choose_attention(tiny.build("bart"), tokenizer, texts, RULE)
    with pytest.raises(ValueError, match="texts holds other things than strings"):
        ap.choose_attention(model, tokenizer, [1], RULE, 0.5)
    assert model.config.to_dict() == before


def test_texts_of_an_encoder_come_in_batches(bert, text):
    import transformers as tf

    model, tokenizer = tf.AutoModel.from_pretrained(bert), tf.AutoTokenizer.from_pretrained(bert)
    texts = texts_in(text)[:12]
    tokenizer.model_max_length = 64
    choice = ap.choose_attention(model, tokenizer, texts, RULE, 0.5, rows=2)
    batches = [
        tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")
        for part in (texts[:8], texts[8:])
    ]
    again = ap.choose_attention(model, None, [dict(batch) for batch in batches], RULE, 0.5)
    assert [one.score for one in choice.scores] == [one.score for one in again.scores]
