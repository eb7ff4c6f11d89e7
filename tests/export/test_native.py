"""Exported models in a program that never imports this package: outputs, caches and texts of the swapped ones."""

import json

import programs
import pytest
import torch
import transformers as tf
import yaml
from conftest import on_disk
from tiny import DECODERS, GROUPED, OWN_PATTERN
from typer.testing import CliRunner

import attn_plugins as ap
from attn_plugins.cli.app import app
from attn_plugins.data.text import python_docs
from attn_plugins.export import native as exporting
from attn_plugins.export.families import FAMILIES

SIZES = {**GROUPED, "initializer_range": 0.3, "eos_token_id": 2, "bos_token_id": 1, "tie_word_embeddings": False}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
OF_TYPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SOFTCAP = None if tf.Gemma2ForCausalLM._supports_sdpa else 5.0  # in 5.17 Gemma 2 drops its softcap under sdpa
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
WINDOW = {"type": "local", "window_size": 5, "num_sink_tokens": 0}


def some(*layers, **options):
    return {**WINDOW, "layers": list(layers), **options}


CASES = {
    "llama, all layers": (
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
        WINDOW,
        "mistral",
        [5, 5, 5],
    ),
    "llama, some layers": (
        *("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
        *([some(0, 2), "softmax"], "ministral", [5, None, 5]),
    ),
    "llama, wide window": ("Llama", ROPE, {**WINDOW, "window_size": 200}, "mistral", [200] * 3),
    "mistral without a window": ("Mistral", {"sliding_window": None, **ROPE}, some(1), "ministral", [None, 5, None]),
    "mistral with its window": ("Mistral", {"sliding_window": 9, **ROPE}, WINDOW, "mistral", [5, 5, 5]),
    "mistral, wider than its own": (
        *("Mistral", {"sliding_window": 4, **ROPE}),
        *(some(1), "mistral", [4, 4, 4]),
    ),
    "ministral": ("Ministral", {"sliding_window": 5, "layer_types": MIXED, **ROPE}, some(1), "ministral", [5, 5, 5]),
    "mixtral": ("Mixtral", {**EXPERTS, **ROPE}, WINDOW, "mixtral", [5, 5, 5]),
    "phi3": ("Phi3", ROPE, WINDOW, "phi3", [5, 5, 5]),
    "starcoder2": ("Starcoder2", ROPE, WINDOW, "starcoder2", [5, 5, 5]),
    "qwen2": ("Qwen2", {**ROPE, "tie_word_embeddings": True}, some(2), "qwen2", [None, None, 5]),
    "qwen3": ("Qwen3", ROPE, [{"type": "softmax", "layers": 0}, WINDOW], "qwen3", [None, 5, 5]),
    "smollm3": ("SmolLM3", {**ROPE, "no_rope_layers": [1, 0, 1]}, some(0, 1), "smollm3", [5, 5, None]),
    "gemma2": (
        *("Gemma2", {**ROPE, "sliding_window": 8, "layer_types": MIXED, "attn_logit_softcapping": SOFTCAP}),
        *(WINDOW, "gemma2", [5, 5, 5]),
    ),
    "gemma3": (
        *("Gemma3Text", {"rope_parameters": OF_TYPES, "sliding_window": 8, "layer_types": MIXED}),
        *(some(0, 2), "gemma3_text", [5, None, 5]),
    ),
    "olmo3": (
        *("Olmo3", {"rope_parameters": OF_TYPES, "sliding_window": 8, "layer_types": MIXED}),
        *([some(0, 2), "softmax"], "olmo3", [5, None, 5]),
    ),
    "gpt_oss": (
        *("GptOss", {**EXPERTS, "sliding_window": 8, "layer_types": ["full_attention"] * 3}),
        *(some(0), "gpt_oss", [5, None, None]),
    ),
}
"""What it is of, its options, the rules, and of the exported model: the type, and the window of each layer."""

PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    asked = torch.load(folder + "/asked.pt")
    with torch.no_grad():
        answer = {"logits": model(asked["row"]).logits}
        answer["padded"] = model(asked["row"].repeat(2, 1), attention_mask=asked["mask"]).logits
        steps = asked["row"].split([9] + [1] * (asked["row"].shape[1] - 9), dim=1)
        cache, cached = None, []
        for step in steps:
            out = model(step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            cached.append(out.logits)
        answer["cached"] = torch.cat(cached, dim=1)
        answer["text"] = model.generate(asked["row"][:, :asked["prompt"]], do_sample=False, max_new_tokens=24)
        answer["tied"] = torch.tensor(model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    torch.save(answer, folder + "/answer.pt")
assert not [name for name in sys.modules if name.split(".")[0] == "attn_plugins"], "it knows this package"
"""


def made(name):
    family, options, rules, *_ = CASES[name]
    config = getattr(tf, f"{family}Config")(**{**SIZES, **options})
    torch.manual_seed(1)
    model = getattr(tf, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    return ap.swap_attention(model, rules)


def asked(length=40):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :11] = 0
    return {
        "row": torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(2)),
        "mask": mask,
        "prompt": 7,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of each case the swapped model, the folder, and what the program says of it."""
    folder = tmp_path_factory.mktemp("exported")
    models, folders = {}, {}
    for number, name in enumerate(CASES):
        models[name] = made(name)
        folders[name] = ap.export_native(models[name], folder / str(number))
        torch.save(asked(), folders[name] / "asked.pt")
    done = programs.run("-c", PROGRAM, *folders.values())
    assert done.returncode == 0, done.stderr
    return {name: (models[name], folders[name], torch.load(folders[name] / "answer.pt")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_transformers_alone_computes_the_same(exported, name):
    model, folder, answer = exported[name]
    *_, family, windows = CASES[name]
    given = asked()
    apart = {
        "logits": answer["logits"] - model(given["row"]).logits,
        "padded": (answer["padded"] - model(given["row"].repeat(2, 1), attention_mask=given["mask"]).logits)[
            given["mask"].bool()
        ],
        "cached": answer["cached"] - answer["logits"],
    }
    scale = max(1.0, answer["logits"].abs().max().item())
    assert {key: value.abs().max().item() / scale < 1e-5 for key, value in apart.items()} == dict.fromkeys(apart, True)
    model.generation_config.eos_token_id = None
    assert torch.equal(answer["text"], model.generate(given["row"][:, :7], do_sample=False, max_new_tokens=24))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == family
    kinds = config.get("layer_types") or ["sliding_attention"] * 3
    assert [config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds] == windows
    assert not {"attn_plugin", "attn_implementation", "auto_map", "pretraining_tp"} & set(config)
    assert bool(answer["tied"]) is config["tie_word_embeddings"] is model.config.tie_word_embeddings


def test_every_family_has_a_case():
    assert {tf.CONFIG_MAPPING[name].__name__.removesuffix("Config") for name in FAMILIES} <= {
        family for family, *_ in CASES.values()
    }


REFUSED = {
    "sinks": (
        "llama",
        {**WINDOW, "num_sink_tokens": 2},
        r"local\(.*num_sink_tokens=2.*\) at model.layers.0.self_attn has no",
    ),
    "dilation": ("llama", {**WINDOW, "dilation": 2}, "has no equal in transformers; allowed: a window"),
    "positions": ("llama", {**WINDOW, "num_sink_tokens": 1, "positions": "cache"}, "has no equal in transformers"),
    "blocks": ("llama", "block_local", "has no equal in transformers"),
    "linear": ("llama", "linear", r"linear\(.*\) at model.layers.0.self_attn has "),
    "learned": ("llama", {"type": "differential", "layers": 1}, "has weights of its own, for which no config"),
    "heads": (
        "llama",
        {**WINDOW, "kv_heads": [0]},
        r"window of 5 at model.layers.0.self_attn is of key/value heads \[0\] alone",
    ),
    "two sizes": (
        "llama",
        [some(0), {**WINDOW, "window_size": 6}],
        "one size of window for all layers.*ministral has one",
    ),
    "one key": ("llama", {**WINDOW, "window_size": 1}, "window of 1 key: .* allowed: 2 and more"),
    "family": ("gpt2", WINDOW, "has a window of 5, of which gpt2 has no equal"),
    "rotary positions": ("gemma3", {**WINDOW, "window_size": 6}, r"turns queries and keys in another way.*: 2"),
}
"""What is refused: the model, its rules, and what is said."""


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_equal_is_refused_before_anything_is_written(tmp_path, what):
    name, rules, said = REFUSED[what]
    cls, config = {**DECODERS, **OWN_PATTERN}[name]()
    with pytest.raises(ValueError, match=said):
        ap.export_native(ap.swap_attention(cls(config), rules), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def tiny_llama(**options):
    return ap.swap_attention(tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **options})), WINDOW)


def test_a_twin_without_a_place_for_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"MistralForCausalLM says .* only LlamaForCausalLM has .*k_proj.bias"):
        ap.export_native(tiny_llama(attention_bias=True), tmp_path / "out")


def test_encoders_are_refused(tmp_path):
    model = tf.BertModel(tf.BertConfig(vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=2))
    with pytest.raises(ValueError, match="has a window of 5, of which bert has no equal"):
        ap.export_native(ap.swap_attention(model, WINDOW), tmp_path / "out")


def test_two_way_windows_are_refused(tmp_path):
    model = tf.Gemma3TextModel(tf.Gemma3TextConfig(**SIZES, use_bidirectional_attention=True))
    with pytest.raises(ValueError, match="is not causal, and sees keys on both sides"):
        ap.export_native(ap.swap_attention(model, WINDOW), tmp_path / "out")


def test_a_model_of_several_parts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is not one model of text alone"):
        ap.export_native(
            tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=97, d_model=8, d_ff=8, num_layers=1)), tmp_path
        )


def test_a_class_of_ones_own_is_refused(tmp_path):
    class Mine(tf.LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match="Mine is no class of transformers"):
        ap.export_native(Mine(tf.LlamaConfig(**SIZES)), tmp_path / "out")


WRONG = {
    "a key more": {"sliding_window": 6},
    "a key less": {"sliding_window": 4},
    "other layers": {"layer_types": ["full_attention", *MIXED[::2]]},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "another scale": {"rms_norm_eps": 0.1},
}
"""What a config may say wrong of the model."""


@pytest.mark.parametrize("what", WRONG)
def test_other_outputs_are_refused(tmp_path, monkeypatch, what):
    said = exporting.config_with

    def mistaken(config, windows):
        written = said(config, windows)
        vars(written).update(WRONG[what])
        return written

    monkeypatch.setattr(exporting, "config_with", mistaken)
    model = ap.swap_attention(tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **ROPE})), some(0, 1))
    with pytest.raises(ValueError, match="outputs of MinistralForCausalLM for 69 tokens differ"):
        ap.export_native(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="is there already; allowed: a folder that is to be made"):
        ap.export_native(tiny_llama(), tmp_path)


def test_the_model_stays_as_it_is(tmp_path):
    model = tiny_llama().train()
    before = ap.describe_attention(model)
    ap.export_native(model, tmp_path / "out")
    assert ap.describe_attention(model) == before
    assert all(module.training for module in model.modules())
    model.save_pretrained(tmp_path / "swapped")
    assert json.loads((tmp_path / "swapped" / "config.json").read_text())["model_type"] == "llama"


def test_a_model_without_windows_stays_of_its_family(tmp_path):
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    ap.export_native(ap.swap_attention(model, "softmax"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert "attn_plugin" not in json.dumps(config)


def test_another_head_comes_along(tmp_path):
    model = ap.swap_attention(tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZES, num_labels=3)), WINDOW)
    out = ap.export_native(model, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MistralForSequenceClassification"]


def test_export_on_the_command_line(llama, tmp_path):
    """Tokenizer, generation config and front matter come along; the rules' tags and text do not."""
    model = ap.swap_attention(tf.AutoModelForCausalLM.from_pretrained(llama), WINDOW)
    model.generation_config.max_new_tokens = 7
    folder, out = tmp_path / "swapped", tmp_path / "out"
    model.save_pretrained(folder)
    tf.AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: mit\n", 1))
    runner = CliRunner()
    said = runner.invoke(app, ["export", str(folder), str(out)])
    assert (said.exit_code, "say --native" in said.output) == (2, True)
    done = runner.invoke(app, ["export", str(folder), str(out), "--native"])
    assert done.exit_code == 0, done.output
    text = "red cat is good ."
    ids = [tf.AutoTokenizer.from_pretrained(where)(text).input_ids for where in (folder, out)]
    assert ids[0] == ids[1]
    assert tf.GenerationConfig.from_pretrained(out).max_new_tokens == 7
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "transformers", "license": "mit"}
    assert "Windows, in keys that a query sees, its own with them: 5 in all layers." in card
    assert "import attn_plugins" not in card
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []


def test_adapters_are_merged_where_asked_for(llama, tmp_path):
    peft = pytest.importorskip("peft")
    model = ap.swap_attention(tf.AutoModelForCausalLM.from_pretrained(llama), WINDOW)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"has an adapter of PEFT; merge it first"):
        ap.export_native(tuned, tmp_path / "out")
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter of PEFT; allowed: .* --merge"):
        ap.export_native(tmp_path / "adapter", tmp_path / "out")
    ap.export_native(tmp_path / "adapter", tmp_path / "out", merge=True)
    row = torch.randint(3, 20, (1, 30))
    with torch.no_grad():
        apart = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(row).logits - tuned.eval()(row).logits
    assert apart.abs().max() < 1e-5


@pytest.mark.real
@torch.no_grad()
def test_smollm2(tmp_path):
    source, text = on_disk("models", "smollm2-135m"), "\n\n".join(python_docs()["validation"]["text"])[:4000]
    # In float32 two kernels of one attention differ by 2e-5 of the largest logit after 30 layers.
    model = tf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    model = ap.swap_attention(model, some("0-14", window_size=64))
    model.save_pretrained(tmp_path / "swapped")
    tokenizer = tf.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(tmp_path / "swapped")
    out = ap.export_native(tmp_path / "swapped", tmp_path / "out")
    assert tf.AutoTokenizer.from_pretrained(out)(text).input_ids == tokenizer(text).input_ids
    row = torch.tensor([tokenizer(text).input_ids[:200]])
    torch.save({"row": row, "mask": torch.ones(2, 200), "prompt": 100}, out / "asked.pt")
    done = programs.run("-c", PROGRAM, out)
    assert done.returncode == 0, done.stderr
    answer, logits = torch.load(out / "answer.pt"), model(row).logits
    scale = logits.abs().max()
    assert (answer["logits"] - logits).abs().max() / scale < 1e-5
    assert (answer["cached"] - logits).abs().max() / scale < 1e-5
    model.generation_config.eos_token_id = None
    assert torch.equal(answer["text"], model.generate(row[:, :100], do_sample=False, max_new_tokens=24))
