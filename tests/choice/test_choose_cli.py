"""attn-plugins choose as a user meets it, and the bytes of caches that it tells."""

import json

import pytest
import tiny
import torch
import yaml
from conftest import tokenizer
from test_cli import call, refused
from transformers import BertConfig, BertModel, DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

import attn_plugins as ap
from attn_plugins.choice.cache import cache_bytes_at

pytestmark = pytest.mark.usefixtures("one_thread")

RULE = "{type: local, window_size: 8, num_sink_tokens: 2}"


def test_layers_are_chosen_and_the_rules_are_ready_for_the_flag(letters, tmp_path):
    folder, text = letters
    given = ["-m", folder, "-a", RULE, "-d", text, "--level", "layers", "--budget", "0.5", "-o", tmp_path / "out"]
    out = call("choose", *given, "-s", "length=420", "-s", "rows=1", "-s", "context=300").output
    assert "2 of 5 layers keep full attention, chosen by contribution" in out
    dense, chosen = 300 * 5 * 2 * 2 * 8 * 4, 300 * 2 * 2 * 2 * 8 * 4 + 3 * 10 * 2 * 2 * 8 * 4
    assert f"cache of one text of 300 tokens: {dense / 2**20:.1f} MiB dense, {chosen / 2**20:.1f} MiB so" in out
    rules = yaml.safe_load((tmp_path / "out" / "rules.yaml").read_text())
    assert rules[1] == {"type": "local", "window_size": 8, "num_sink_tokens": 2}
    described = json.loads(call("describe", folder, "--attn", tmp_path / "out" / "rules.yaml", "--json").output)
    kept = [one["layer"] for one in described if one["plugin"] == "softmax"]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert kept == [one["layer"] for one in scores if one["kept"]]
    assert len(kept) == 2
    assert (tmp_path / "out" / "scores.png").exists()


def test_a_model_that_was_saved_swapped_is_scored_as_it_is(letters, tmp_path):
    folder, text = letters
    model = LlamaForCausalLM.from_pretrained(folder, attn_plugin={"type": "linear", "feature_map": "hedgehog"})
    model.save_pretrained(tmp_path / "swapped")
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "swapped")
    given = ["-m", tmp_path / "swapped", "-d", text, "-o", tmp_path / "out", "-s", "length=420", "-s", "rows=1"]
    call("choose", *given)
    rules = yaml.safe_load((tmp_path / "out" / "rules.yaml").read_text())
    assert [rule["type"] for rule in rules] == ["softmax", "linear"]
    errors = call("choose", "-m", folder, "-d", text, "-o", tmp_path / "x", status=2).stderr
    assert "error: rule=None, and the model is not swapped" in errors


def test_an_encoder_is_chosen_from(tmp_path, text):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=20, **sizes, num_attention_heads=4, pad_token_id=3)).save_pretrained(
        tmp_path / "bert"
    )
    tokens = tokenizer(encoder=True)
    tokens.model_max_length = 64
    tokens.save_pretrained(tmp_path / "bert")
    out = call(
        "choose", "-m", tmp_path / "bert", "-a", "{type: local, window_size: 3}", "-d", text, "-o", tmp_path / "o"
    )
    assert "2 of 8 key/value heads keep full attention" in out.output
    assert "cache of" not in out.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["-a", "null"], "attention=null; allowed: a name or a rule"),
        (["-a", RULE, "--budget", "2"], "budget=2.0; allowed: between 0 and 1"),
        (["-a", RULE, "--score", "kll"], "score='kll' (did you mean kl?)"),
        (["-a", RULE, "--level", "head"], "level='head'"),
        (["-a", RULE, "-s", "texts=0"], "texts=0; allowed: at least 1"),
    ],
)
def test_what_does_not_fit_is_one_line(letters, tmp_path, given, message):
    folder, text = letters
    assert message in refused("choose", "-m", folder, "-d", text, "-o", tmp_path / "out", *given)


def test_rows_that_are_too_short_are_one_line(letters, tmp_path):
    folder, text = letters
    given = ["-m", folder, "-a", RULE, "-d", text, "-o", tmp_path / "out", "-s", "length=40"]
    assert call("choose", *given, status=2).stderr.splitlines()[-1].startswith("error: length=40; allowed: at least")


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("llama", None),
        ("llama", {"type": "local", "window_size": 5, "num_sink_tokens": 2}),
        ("llama", [{"type": "softmax", "layers": 1}, {"type": "local", "window_size": 5, "num_sink_tokens": 2}]),
        ("llama", [{"type": "softmax", "kv_heads": {"0": [1], "2": [0]}}, {"type": "local", "window_size": 5}]),
        ("llama", [{"type": "linear", "kv_heads": [0], "layers": [1]}, {"type": "local", "kv_heads": {"2": [1]}}]),
        ("llama", {"type": "linear", "layers": [0, 2]}),
        ("llama", {"type": "block_topk", "block_size": 4}),
        ("gemma3", None),
        ("gemma3", {"type": "local", "window_size": 5, "layers": [2]}),
        ("gpt2", {"type": "linear_window", "window_size": 4}),
    ],
)
@pytest.mark.parametrize("length", [3, 40])
def test_bytes_are_those_of_a_cache_that_was_filled(kind, flag, length):
    model = tiny.build(kind)
    if flag is not None:
        ap.swap_attention(model, flag)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, length, dtype=torch.long), past_key_values=cache)
    assert cache_bytes_at(model, length) == ap.cache_bytes(cache)


def test_an_encoder_has_no_cache():
    assert cache_bytes_at(tiny.build("bert"), 10) is None
