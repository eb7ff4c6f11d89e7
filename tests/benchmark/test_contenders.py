"""Attentions of other libraries as rows of a comparison: what they compute, and what they say that they cannot."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from attn_plugins import swap_attention
from attn_plugins.benchmark import contenders
from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.models import CompareModels
from attn_plugins.benchmark.compare.report import write_report
from attn_plugins.benchmark.compare.run import folder_name, prepare_compare, run_compare
from attn_plugins.benchmark.contenders import Contender, LeftOutError, contender_in, register_contender
from attn_plugins.core import class_registry
from attn_plugins.core.options import build
from attn_plugins.training.models import load

pytestmark = pytest.mark.usefixtures("one_thread")


def needs(package):
    """Skips where it is not installed. A look is no import, which of kvpress changes transformers' functions."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": None}
SIZES |= {"eos_token_id": None, "pad_token_id": 0}
QUICK = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True}


def small_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def small_qwen():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def tokens(length, rows=1):
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def ready(model, contender, **options):
    return contender_in({"contender": contender, **options}).ready(model)


def compared(model, text, out, attentions, **changes):
    tree = {"models": {"tiny": model}, "attentions": {"dense": None, **attentions}, "output_dir": str(out)}
    tree |= {"data": {"source": text}, "evaluation": {"length": 16, "max_tokens": 64}}
    return build(CompareConfig, tree | changes)


def run(config):
    results = prepare_compare(config)
    run_compare(config, results, say=lambda line: None)
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    return results, {(line["attention"], line["settings"].get("what", line["measure"])): line for line in lines}


@pytest.mark.parametrize("make", [small_llama, small_qwen])
@pytest.mark.parametrize("full", [[], [1]])
@torch.no_grad()
def test_the_sliding_window_of_transformers_is_our_local_without_sinks(make, full):
    theirs = ready(make(), "sliding_window", window_size=5, full_layers=full)
    rules = [{"type": "local", "window_size": 5, "num_sink_tokens": 0, "layers": [n for n in (0, 1) if n not in full]}]
    ours, ids = swap_attention(make(), rules), tokens(24, rows=2)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(theirs(ids).logits, make()(ids).logits, atol=1e-2)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    written = [one.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False) for one in (theirs, ours)]
    assert torch.equal(*written)


def test_a_sliding_window_that_no_config_says_is_left_out():
    with pytest.raises(ValueError, match=r"full_layers has \[7\]; allowed: 0 to 1"):
        ready(small_llama(), "sliding_window", full_layers=[7])
    model = small_llama()
    model.config.model_type = "unheard_of"
    with pytest.raises(LeftOutError, match="no windows of unheard_of are known here; known: gemma2"):
        ready(model, "sliding_window")


def test_kernels_for_gpus_are_left_out_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(LeftOutError, match="fla's kernels run on a GPU, and the model is on the CPU"):
        ready(small_llama(), "fla", op="linear_attn")


def test_a_comparison_has_contenders_as_rows(llama, text, tmp_path):
    """What is not installed, or cannot be, is a row with its reason; fine-tunes start from what can be saved."""
    attentions = {
        "local": {"type": "local", "window_size": 4, "num_sink_tokens": 0},
        "window": {"contender": "sliding_window", "window_size": 4},
        "away": {"contender": "away"},
    }
    cost = {"lengths": [32], "what": ["cache", "paper"]}
    finetune = {"block_size": 16, "lora": {"r": 2}, "training": {**QUICK, "learning_rate": 1e-9}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders.CONTENDERS, "classes", dict(contenders.CONTENDERS.classes))
        register_contender("away")(Away)
        config = compared(llama, text, tmp_path / "out", attentions, finetune=finetune, cost=cost)
        results, found = run(config)
        tables, files = write_report(config, results)
    figures = [
        found["local" if name == "local" else "window", "evaluate"]["result"]["value"] for name in ("local", "w")
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert found["dense", "evaluate"]["result"]["value"] != pytest.approx(figures[0], rel=1e-5)
    assert found["window", "finetune"]["result"]["value"] == pytest.approx(figures[1], rel=1e-4)
    held = {name: found[name, "cache"]["result"]["bytes"] for name in ("dense", "local", "window")}
    assert held["window"] == held["dense"] * 3 // 32, "transformers keeps no key that the next query does not see"
    without = {key: (line["status"], line["error"]) for key, line in found.items() if line["status"] != "ok"}
    reason = "away needs the package 'not_there': pip install not-there"
    stages = ("evaluate", "finetune", "cache", "paper")
    assert without.pop(("window", "paper"))[1].startswith("paper is not measured of sliding_window: a config says the")
    assert without == {("away", one): ("left out", reason) for one in stages}
    assert [table.title for table in tables] == ["Quality", "Cost at 32 tokens", "Left out"]
    assert ["away", "evaluate, cache, paper, finetune", reason] in tables[-1].rows
    assert {row[2] for row in tables[0].rows if row[0] == "away"} == {"left out"}
    assert "contender sliding_window, window_size 4, full_layers" in files[0].read_text()


def test_a_checkpoint_of_a_contender_is_of_one_kind_of_model(llama, text, labelled, tmp_path):
    """A causal-lm that starts from the checkpoint of a classifier has no head."""
    window, found = {"window": {"contender": "sliding_window", "window_size": 4}}, []
    for task, source in (("classification", labelled), ("causal-lm", text)):
        tune = {"finetune": {"task": task, "tune": "full", "training": QUICK}, "evaluation": {}, "untrained": False}
        config = compared(llama, text, tmp_path / "out", window, data={"source": source}, **tune)
        (cell,) = [one for one in cells(config) if one.attention == "window"]
        folder = CompareModels(config, False, folder_name).written(cell)
        found += json.loads((Path(folder) / "config.json").read_text())["architectures"]
    assert found == ["MistralForSequenceClassification", "MistralForCausalLM"]


class Away(Contender):
    """Of a package that nobody has."""

    package, distribution, install, what = "not_there", "not-there", "pip install not-there", "nothing"
    limits = "it is nowhere"

    def ready(self, model):
        raise AssertionError("refused before the model was loaded")


def test_what_would_say_nothing_of_a_contender_is_left_out():
    class Here(Away):
        name, package = "here", "json"

    Here(None).refuse("evaluate")
    with pytest.raises(LeftOutError, match="decode is not measured of here: it is nowhere; allowed: evaluate, speed"):
        Here(None).refuse("decode")


def test_cells_depend_on_options_and_version(text, monkeypatch):
    def key(version, **options):
        monkeypatch.setattr(contenders.metadata, "version", lambda name: version)
        attentions = {"press": {"contender": "kvpress", "press": "KnormPress", **options}}
        config = compared("model", text, "out", attentions)
        return next(cell.key for cell in cells(config) if cell.attention == "press")

    one = key("0.5.5")
    assert one == key("0.5.5", compression_ratio=0.5), "a default that is spelled out"
    assert len({one, key("0.5.6"), key("0.5.5", compression_ratio=0.25), key("0.5.5", options={"n": 1})}) == 4


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"contender": "sliding_windo"}, r"unknown contender 'sliding_windo' \(did you mean sliding_window\?\)"),
        ({"contender": "sliding_window", "window": 4}, "unknown key 'window' in sliding_window"),
        ({"contender": "sliding_window", "window_size": "4"}, "window_size='4' is of type str; allowed: int"),
        ({"contender": "sliding_window", "window_size": 1}, "window_size=1; allowed: at least 2"),
        ({"contender": "local_attention", "window_size": 1}, "window_size=1; allowed: at least 2"),
        ({"contender": "fla", "op": "gla"}, "op='gla'; allowed: 'attn', 'linear_attn'"),
        ({"contender": "kvpress"}, "press is missing"),
        ({"contender": "kvpress", "press": "KnormPress", "compression_ratio": 1}, "allowed: 0 to less than 1"),
    ],
)
def test_wrong_contenders_are_refused_before_anything_runs(text, rules, message):
    with pytest.raises(ValueError, match=f"attentions.one: .*{message}"):
        compared("model", text, "out", {"one": rules})


def test_every_contender_says_what_it_is():
    for name in contenders.list_contenders():
        cls = contenders.get_contender(name)
        assert cls.what
        assert cls.__doc__
        assert cls.install.startswith("pip install")
    with pytest.raises(
        ValueError, match=r"contender 'bare' \(Bare\) lacks: package, install, what, limits, __doc__, distr"
    ):
        register_contender("bare")(type("Bare", (Contender,), {"ready": lambda self, model: model}))
    with pytest.raises(ValueError, match="is not a subclass of"):
        register_contender("int")(int)


def test_an_installed_package_brings_its_own(monkeypatch):
    class Entry:
        def load(self):
            return register_contender("theirs")(type("Theirs", (Away,), {"__doc__": "Of a package."}))

    held = {"attn_plugins.contenders": [Entry()]}
    monkeypatch.setattr(class_registry.metadata, "entry_points", lambda group: held.get(group, []))
    monkeypatch.setattr(contenders.CONTENDERS, "classes", dict(contenders.CONTENDERS.classes))
    monkeypatch.setattr(contenders.CONTENDERS, "_loaded", False)
    assert {"theirs", "sliding_window"} <= set(contenders.list_contenders())


class Mean(Contender):
    """The mean of all values, to be told from softmax."""

    name = "mean"
    package, distribution, install, what, limits = "torch", None, "pip install torch", "a mean", "a mean has none"

    def ready(self, model):
        def attend(q_BHND, k_BHND, v_BHND, scale):
            counts = torch.arange(1, v_BHND.shape[2] + 1)[:, None]
            return v_BHND.cumsum(2) / counts

        return contenders.through_interface(model, self, attend)


@torch.no_grad()
def test_a_function_of_whole_rows_refuses_what_it_would_leave_out():
    model, ids = Mean(contenders.ContenderConfig()).ready(small_llama()), tokens(12, rows=2)
    assert not torch.allclose(model(ids).logits, small_llama()(ids).logits, atol=1e-3)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits)
    mask[0, :2] = 0
    with pytest.raises(LeftOutError, match="mean would see padding; allowed: rows of one length"):
        model(ids, attention_mask=mask)
    with pytest.raises(LeftOutError, match="reads whole rows: it has no form for keys from a cache"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    torch.manual_seed(0)
    windowed = Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0))
    with pytest.raises(LeftOutError, match="knows no sliding_window, which Qwen2Attention asks for"):
        Mean(contenders.ContenderConfig()).ready(windowed.eval())(ids)


@torch.no_grad()
def test_a_function_of_whole_rows_is_given_the_scale_of_the_model():
    def attend(q_BHND, k_BHND, v_BHND, scale):
        return scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=True, scale=scale)

    model, ids = GraniteForCausalLM(GraniteConfig(**SIZES, attention_multiplier=0.05)).eval(), tokens(12)
    want = model(ids).logits
    contenders.through_interface(model, Mean(contenders.ContenderConfig()), attend)
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-5)


@pytest.mark.peers
@needs("local_attention")
@torch.no_grad()
def test_the_window_of_local_attention_is_our_local_without_sinks():
    theirs, ids = ready(small_llama(), "local_attention", window_size=5), tokens(23, rows=2)
    ours = swap_attention(small_llama(), "local", window_size=5, num_sink_tokens=0)
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


PRESSES = ["ExpectedAttentionPress", "KnormPress", "SnapKVPress", "StreamingLLMPress", "TOVAPress", "RandomPress"]


@pytest.mark.peers
@needs("kvpress")
@pytest.mark.parametrize("press", [*PRESSES, "KeyDiffPress", "LagKVPress", "PyramidKVPress", "CompactorPress"])
@torch.no_grad()
def test_a_press_cuts_the_cache_of_a_prompt(press):
    model = ready(small_llama(), "kvpress", press=press, compression_ratio=0.25)
    out = model.generate(tokens(128), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [96 + 3, 96 + 3]
    nothing = ready(small_llama(), "kvpress", press=press, compression_ratio=0.0)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(nothing.generate(tokens(128), **options), small_llama().generate(tokens(128), **options))


@pytest.mark.peers
@needs("kvpress")
@torch.no_grad()
def test_what_comes_after_a_prompt_sees_what_is_left_of_it_where_it_was():
    """The press of sinks and recent keys, held to a mask that hides the others: positions stay those of the text."""
    model = ready(small_llama(), "kvpress", press="StreamingLLMPress", compression_ratio=0.5, options={"n_sink": 2})
    ids, prompt, length = tokens(60), 40, 60
    cache = DynamicCache()
    model(ids[:, :prompt], past_key_values=cache)
    after = [model(ids[:, prompt:-1], past_key_values=cache).logits, model(ids[:, -1:], past_key_values=cache).logits]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[prompt:, 2:22] = False
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    want = small_llama()(ids, attention_mask=mask).logits[:, prompt:]
    torch.testing.assert_close(torch.cat(after, 1), want, rtol=0, atol=1e-5)


@pytest.mark.peers
@needs("kvpress")
@torch.no_grad()
def test_a_press_refuses_what_would_be_none():
    model, ids = ready(small_llama(), "kvpress", press="KnormPress"), tokens(32)
    with pytest.raises(LeftOutError, match="this reads rows without a cache, so that nothing would be cut"):
        model(input_ids=ids, use_cache=False)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(LeftOutError, match="would keep padding as keys"):
        model(input_ids=ids, attention_mask=mask)
    cache = DynamicCache()
    for piece in ids[:, :20].split(10, dim=1):
        model(piece, past_key_values=cache)
    with pytest.raises(LeftOutError, match="cuts the first piece of a text alone, here of 10 tokens"):
        model(ids[:, 20:], past_key_values=cache)
    pyramid = ready(small_llama(), "kvpress", press="PyramidKVPress", options={"window_size": 2})
    cache = DynamicCache()
    pyramid(ids[:, :30], past_key_values=cache)
    with pytest.raises(LeftOutError, match="leaves more keys in some layers than in others"):
        pyramid(ids[:, 30:], past_key_values=cache)
    with pytest.raises(LeftOutError, match="KVComposePress took no key out of a prompt of 32 tokens"):
        ready(small_llama(), "kvpress", press="KVComposePress")(ids)
    encoder = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(LeftOutError, match="kvpress does not support BertModel"):
        ready(encoder, "kvpress", press="KnormPress")
    for press in ("ThinKPress", "BasePress", "DuoAttentionPress"):
        with pytest.raises(LeftOutError, match=f"the compression_ratio of {press} cannot be set to 0.5"):
            ready(small_llama(), "kvpress", press=press)
    with pytest.raises(ValueError, match="press='NoPress'; allowed: classes of kvpress that are presses"):
        ready(small_llama(), "kvpress", press="NoPress")
    with pytest.raises(ValueError, match=r"press=KnormPress with options .*unexpected keyword"):
        ready(small_llama(), "kvpress", press="KnormPress", options={"n_sink": 1})


@pytest.mark.peers
@needs("kvpress")
def test_presses_in_a_comparison(letters, tmp_path):
    """Recall by what is generated, and the second of two pieces of a text; one pass is left out."""
    model, text = letters
    press = {"contender": "kvpress", "press": "ExpectedAttentionPress", "compression_ratio": 0.5}
    heads = {"contender": "kvpress", "press": "AdaKVPress", "options": {"press": {"press": "KnormPress"}}}
    recall = {"task": "passkey", "distances": [200], "rows": 2}
    pieces = {"task": "streaming_perplexity", "length": 128, "piece": 64, "stretch": 64, "max_documents": 2}
    for name, attentions, evaluation, status in (
        ("recall", {"half": press, "heads": heads}, recall | {"by": "generate"}, "ok"),
        ("forward", {"half": press}, recall, "left out"),
        ("pieces", {"half": press}, pieces, "ok"),
        ("many", {"half": press}, pieces | {"piece": 32}, "left out"),
    ):
        _, found = run(compared(model, text, tmp_path / name, attentions, evaluation=evaluation))
        assert [line["status"] for line in found.values()] == ["ok", *[status] * len(attentions)], name
        if name == "pieces":
            dense, half = (line["result"]["figures"] for line in found.values())
            first, second = zip(*(figures["by_position"] for figures in (dense, half)), strict=True)
            assert first[0]["perplexity"] == pytest.approx(first[1]["perplexity"]), "a prompt sees all of itself"
            assert second[0]["perplexity"] != pytest.approx(second[1]["perplexity"], rel=1e-6)
            assert half["cache_bytes"] == dense["cache_bytes"] * 96 // 128


@pytest.mark.peers
@needs("kvpress")
def test_the_package_of_presses_leaves_other_models_alone():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ready(small_llama(), "kvpress", press="KnormPress")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__ != "kvpress.attention_patch"


@pytest.mark.real
@pytest.mark.peers
@needs("kvpress")
def test_presses_on_the_demo_model():
    loaded = load("smollm2-135m-demo", attention=None, dtype="float32")
    model = ready(loaded.model, "kvpress", press="ExpectedAttentionPress")
    ids = loaded.tokenizer("The capital of France is Paris. " * 20 + "The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert "Paris" in loaded.tokenizer.decode(out.sequences[0, -2:])
    assert out.past_key_values.layers[0].keys.shape[2] < ids["input_ids"].shape[1] * 0.6
