"""Longformer, LED and BigBird: their own sparse attention is an attention of the registry, to the digit."""

import numpy as np
import pytest
import torch
import transformers as tf
from long_adapter_cases import big_bird, bigbird_pegasus, led, longformer
from torch import nn
from transformers.models.bigbird_pegasus import modeling_bigbird_pegasus

import attn_plugins as ap

LENGTH = 29
BUILT = {
    "longformer": lambda: tf.LongformerModel(longformer(8, 8, 4)),
    "led": lambda: tf.LEDModel(led(8, 4, 8)),
    "big_bird": lambda: tf.BigBirdModel(big_bird()),
    "bigbird_pegasus": lambda: modeling_bigbird_pegasus.BigBirdPegasusEncoder(bigbird_pegasus()),
    # Rows of 1024 tokens have a plan of their own, in which the last block and near ones are drawn too.
    "big_bird-1024": lambda: tf.BigBirdModel(
        big_bird(block_size=64, num_random_blocks=3, num_hidden_layers=1, max_position_embeddings=1024)
    ),
}
PATTERN = {"longformer": "longformer", "led": "longformer", "big_bird": "bigbird", "bigbird_pegasus": "bigbird"}
every = pytest.mark.parametrize("name", ["longformer", "led", "big_bird", "bigbird_pegasus"])


def rule(name, **options):
    return {"type": PATTERN[name.partition("-")[0]], "roles": "encoder", **options}


def build(name):
    """In eval mode, without dropout in training either."""
    torch.manual_seed(0)
    model = BUILT[name]()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "norm" not in path.lower():
                nn.init.normal_(weight, std=0.15)
    for module in model.modules():
        for attribute, value in {"p": 0.0, "dropout": 0.0}.items():
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, value)
    return model.eval()


def inputs(name, length=LENGTH, padded=True):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        given["attention_mask"][1, 2 * length // 3 :] = 0
    if PATTERN[name.partition("-")[0]] == "longformer":
        marks = given["global_attention_mask"] = torch.zeros_like(ids)
        marks[:, 0] = marks[0, 7] = marks[0, 20] = 1
    return given | ({"decoder_input_ids": ids[:, :6]} if name == "led" else {})


def outputs(model, given):
    out = model(**given)
    out = out.encoder_last_hidden_state if "decoder_input_ids" in given else out.last_hidden_state
    return out[given["attention_mask"].bool()]


def gradients(model, given):
    model.zero_grad()
    outputs(model, given).square().mean().backward()
    return {path: weight.grad.clone() for path, weight in model.named_parameters() if weight.grad is not None}


@every
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_the_models_own(name, padded, training):
    model, given = build(name).train(training), inputs(name, padded=padded)
    own, want = outputs(model, given).detach(), gradients(model, given)
    ap.swap_attention(model, rule(name))
    torch.testing.assert_close(outputs(model, given).detach(), own, atol=1e-5, rtol=1e-5)
    got, largest = gradients(model, given), max(float(g.abs().max()) for g in want.values())
    assert got.keys() == want.keys()
    for path, gradient in want.items():
        torch.testing.assert_close(got[path], gradient, atol=1e-5 * largest, rtol=1e-4, msg=path)


def test_a_block_that_is_drawn_and_seen_anyway_counts_twice():
    model, given = build("big_bird-1024").train(), inputs("big_bird-1024", length=1024)
    own = outputs(model, given).detach()
    ap.swap_attention(model, rule("big_bird-1024"))
    torch.testing.assert_close(outputs(model, given).detach(), own, atol=1e-5, rtol=1e-5)
    np.random.seed(0)  # of the layer
    plan = model.encoder.layer[0].attention.self._bigbird_block_rand_mask(1024, 1024, 64, 64, 3, last_idx=1024)
    near = abs(plan - np.arange(1, 15)[:, None]) <= 1
    assert ((plan == 15) | near).any()  # what this is about


@every
@torch.no_grad()
def test_forms_are_equal(name):
    model, given = build(name), inputs(name)
    own = outputs(model, given)
    for backend in ("reference", "torch", "batched"):
        got = outputs(ap.swap_attention(model, rule(name, backend=backend)), given)
        torch.testing.assert_close(got, own, atol=1e-5, rtol=1e-5)


@every
@torch.no_grad()
def test_a_layer_alone_and_a_layer_with_another_attention(name):
    model, given = build(name), inputs(name)
    own = outputs(model, given)
    got = outputs(ap.swap_attention(model, rule(name, layers=1)), given)
    torch.testing.assert_close(got, own, atol=1e-5, rtol=1e-5)
    for other in ("linear", {"type": "local", "window_size": 2}):
        changed = outputs(ap.swap_attention(model, [{**rule(name), "layers": 0}, other]), given)
        assert (changed - own).abs().max() > 1e-3
        assert changed.isfinite().all()


@torch.no_grad()
def test_options_are_the_models_own_and_others_where_they_are_said(tmp_path):
    model, given = build("longformer"), inputs("longformer")
    own = outputs(model, given)
    rows = ap.describe_attention(ap.swap_attention(model, "longformer"))
    assert [row.options for row in rows] == [{"window_size": w, "num_global_tokens": 0} for w in (5, 5, 3)]
    model.save_pretrained(tmp_path)
    loaded = tf.LongformerModel.from_pretrained(tmp_path).eval()
    assert list(ap.describe_attention(loaded)) == list(rows)
    torch.testing.assert_close(outputs(loaded, given), own, atol=1e-5, rtol=1e-5)
    narrow = outputs(ap.swap_attention(model, "longformer", window_size=2), given)
    assert (narrow - own).abs().max() > 1e-3
    model, given = build("big_bird"), inputs("big_bird")
    own = outputs(model, given)
    rows = ap.describe_attention(ap.swap_attention(model, "bigbird"))
    assert {(row.options["block_size"], row.options["num_random_blocks"]) for row in rows} == {(2, 2)}
    drawn = outputs(ap.swap_attention(model, "bigbird", num_random_blocks=3), given)
    assert (drawn - own).abs().max() > 1e-3


@torch.no_grad()
def test_global_tokens_see_all_and_are_seen_by_all_whatever_the_attention():
    model, given = build("longformer"), inputs("longformer", padded=False)
    last = {**given, "input_ids": given["input_ids"].clone()}
    last["input_ids"][:, -1] += 1
    for attention in ("longformer", {"type": "local", "window_size": 1, "num_sink_tokens": 0}):
        ap.swap_attention(model, attention)
        hidden = [model(**g).last_hidden_state for g in (given, last)]
        moved = (hidden[0] - hidden[1]).abs().amax(dim=-1) > 1e-6
        assert moved[0, [0, 7, 20]].all()
        assert moved[1, 0]
        assert moved[0, 12] == (attention == "longformer")  # through a global token, two layers on


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_led_generates_what_it_did(beams):
    torch.manual_seed(0)
    model = tf.LEDForConditionalGeneration(led(8, 4, 8)).eval()
    for path, weight in model.named_parameters():
        if "norm" not in path.lower():
            nn.init.normal_(weight, std=0.15)  # for attention to matter
    given = {key: value for key, value in inputs("led").items() if not key.startswith("decoder")}
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    own = model.generate(**given, **how)

    def generated(other):
        made = ap.swap_attention(model, [rule("led"), other]).generate(**given, **how)
        return made.sequences, max(float((a - b).abs().max()) for a, b in zip(made.logits, own.logits, strict=True))

    for others in (
        {"type": "local", "window_size": 32, "roles": "decoder"},
        {"type": "softmax", "roles": ["decoder", "cross"]},
    ):
        sequences, farthest = generated(others)
        assert torch.equal(sequences, own.sequences)
        assert farthest < 1e-4
    assert generated({"type": "local", "window_size": 1, "roles": "decoder"})[1] > 1e-3


@torch.no_grad()
def test_short_rows_of_big_bird_are_attended_to_whole_and_the_slot_stays():
    own_model, model = build("big_bird"), ap.swap_attention(build("big_bird"), "bigbird")
    for length in (13, LENGTH):  # the model stays with full attention once it has seen a short row
        given = inputs("big_bird", length=length)
        torch.testing.assert_close(outputs(model, given), outputs(own_model, given), atol=1e-5, rtol=1e-5)
        assert {row.plugin for row in ap.describe_attention(model)} == {"bigbird"}
    ap.restore_attention(model)
    torch.testing.assert_close(outputs(model, given), outputs(own_model, given), rtol=0, atol=0)


def test_the_generator_of_numpy_is_left_alone():
    model = ap.swap_attention(build("big_bird"), "bigbird").train()
    np.random.seed(5)
    want = np.random.permutation(100)
    np.random.seed(5)
    outputs(model, inputs("big_bird"))
    assert (np.random.permutation(100) == want).all()
