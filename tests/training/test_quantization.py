"""Quantized base models: what stays whole, that adapters come back on them, what is refused.

``coarse`` stands in for what a library would do, so that all this is seen where none is installed.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from attn_plugins.core.options import build
from attn_plugins.training.config import EvaluateConfig, FinetuneConfig
from attn_plugins.training.evaluate import prepare_evaluation
from attn_plugins.training.finetune import prepare_finetune

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = {"type": "linear", "feature_map": "hedgehog"}
LIBRARIES = {"torchao": "torchao", "quanto": "optimum.quanto", "bitsandbytes": "bitsandbytes"}
"""Method -> module that it needs."""


class CoarseConfig(QuantizationConfigMixin):
    def __init__(self, levels=4, modules_to_not_convert=None, **kwargs):
        self.quant_method, self.levels, self.modules_to_not_convert = "coarse", levels, modules_to_not_convert


class CoarseQuantizer(HfQuantizer):
    """Rounds weights of linear layers to a few levels."""

    is_trainable = True

    def is_serializable(self):
        return False

    def _process_model_after_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and should_convert_module(name, config.modules_to_not_convert):
                step = module.weight.data.abs().max() / config.levels
                module.weight.data = (module.weight.data / step).round() * step
        return model


@pytest.fixture
def coarse(monkeypatch):
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "coarse", CoarseConfig)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "coarse", CoarseQuantizer)
    return {"method": "coarse"}


def settings(model, data, out, **changes):
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05, "save_strategy": "no"}
    tree = {"model": model, "data": {"source": data}, "output_dir": str(out), "attention": LINEAR, "training": training}
    small = {"evaluation": {"length": 16, "max_tokens": 96}, "block_size": 16, "recall": False}
    if changes.get("task", "causal-lm") != "causal-lm":
        small = {}
    return build(FinetuneConfig, {**tree, **small, **changes})


def evaluated(model, data, evaluation):
    tree = {"model": str(model), "data": {"source": data}, "evaluation": evaluation}
    return prepare_evaluation(build(EvaluateConfig, tree))


def levels(model):
    """Path of each linear layer of the base -> how many different weights it has."""
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {path: len(module.weight.unique()) for path, module in linear.items() if ".lora_" not in path}


@pytest.mark.parametrize(("task", "head"), [("causal-lm", "lm_head"), ("classification", "classifier")])
def test_all_linear_layers_are_quantized_but_slots_and_heads(coarse, llama, bert, text, labelled, tmp_path, task, head):
    model, data = (llama, text) if task == "causal-lm" else (bert, labelled)
    run = prepare_finetune(settings(model, data, tmp_path / "out", task=task, quantization=coarse))
    found = levels(run.trainer.model)
    whole = {path for path, count in found.items() if count > 2 * 4 + 1}
    assert whole == {path for path in found if head in path.split(".")}
    assert 0 < len(whole) < len(found)
    patterns = run.trainer.model.get_base_model().config.quantization_config.modules_to_not_convert
    assert not should_convert_module("model.layers.0.self_attn.attn_plugin.gate", patterns)


def test_an_adapter_comes_back_on_the_base_that_it_was_trained_on(coarse, llama, text, tmp_path):
    out, evaluation = tmp_path / "out", {"length": 16, "max_tokens": 96}
    metrics = prepare_finetune(settings(llama, text, out, quantization={**coarse, "levels": 3})).run(None)
    after = metrics["evaluation"]["after"]["loss"]
    saved = load_file(out / "adapter_model.safetensors")
    assert all("lora_" in name or "attn_plugin" in name for name in saved)
    assert "coarse" in (out / "README.md").read_text()
    assert evaluated(out, text, evaluation).run()["result"]["loss"] == pytest.approx(after, rel=1e-5)
    with pytest.raises(ValueError, match="is of an adapter, and comes back as it was; leave quantization out"):
        prepare_finetune(settings(str(out), text, tmp_path / "on", attention="as-saved", quantization=coarse))
    on = settings(str(out), text, tmp_path / "on", attention="as-saved", evaluate_before=True)
    metrics = prepare_finetune(on).run(None)
    assert metrics["evaluation"]["before"]["loss"] == pytest.approx(after, rel=1e-5)
    told = json.loads((out / "config.json").read_text())
    assert told.pop("quantization_config")["levels"] == 3
    (out / "config.json").write_text(json.dumps(told))
    assert evaluated(out, text, evaluation).run()["result"]["loss"] != pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": "full"}, "neither trains nor is saved, and tune='full' would do both; allowed: tune='lora'"),
        ({"tune": "new"}, "neither trains nor is saved, and tune='new' would do both; allowed: tune='lora'"),
        ({"task": "sentence-embedding"}, "quantization is not for task='sentence-embedding'"),
        ({"quantization": {"method": "coarser"}}, r"quantization\.method='coarser'; allowed: .*bitsandbytes, .*coarse"),
        ({"quantization": {}}, r"quantization\.method=None; allowed"),
        (
            {"quantization": {"method": "coarse", "level": 3}},
            "unknown key 'level' in quantization .*did you mean levels",
        ),
        ({"quantization": {"method": "bitsandbytes"}}, "needs load_in_8bit: true, or load_in_4bit: true"),
        ({"quantization": {"method": "quanto", "weights": "int3"}}, "quantization: Only support weights in .*int3"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(coarse, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings("/no/model", "no.jsonl", tmp_path / "out", **{"quantization": coarse, **changes})


@pytest.mark.parametrize("method", LIBRARIES)
def test_a_library_that_is_missing_is_said_before_a_model_is_loaded(tmp_path, method):
    try:
        __import__(LIBRARIES[method])
    except ImportError:
        options = {"load_in_8bit": True} if method == "bitsandbytes" else {}
        with pytest.raises(ValueError, match="pip install"):
            settings("/no/model", "no.jsonl", tmp_path / "out", quantization={"method": method, **options})
    else:
        pytest.skip(f"{LIBRARIES[method]} is installed")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("torchao", {}),
        ("quanto", {}),
        ("bitsandbytes", {"load_in_8bit": True}),
    ],
)
def test_of_each_library_adapters_train_and_come_back(llama, text, tmp_path, method, options):
    pytest.importorskip(LIBRARIES[method], reason=f"{LIBRARIES[method]} is not installed")
    out = tmp_path / "out"
    metrics = prepare_finetune(settings(llama, text, out, quantization={"method": method, **options})).run(None)
    again = evaluated(out, text, {"length": 16, "max_tokens": 96})
    weight = again.loaded.model.get_base_model().model.layers[0].mlp.down_proj.weight
    assert type(weight) is not nn.Parameter or weight.dtype == torch.int8
    after = metrics["evaluation"]["after"]["loss"]
    assert again.run()["result"]["loss"] == pytest.approx(after, rel=1e-5)
    base = load_file(Path(llama) / "model.safetensors")
    assert not set(base) & set(load_file(out / "adapter_model.safetensors"))
