"""Liger kernels beside swapped attention: said in time where they are missing, else given the swapped model itself."""

import sys
from types import ModuleType

import pytest
import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations import liger
from transformers.utils import is_liger_kernel_available

from attn_plugins.core.options import build
from attn_plugins.hf.checkpoints.card import kinds_of
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = {"type": "linear", "feature_map": "hedgehog"}


def settings(model, text, out):
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "use_liger_kernel": True}
    tree = {"model": model, "data": {"source": text}, "output_dir": str(out), "attention": LINEAR, "block_size": 16}
    asked = {"training": {**training, "liger_kernel_config": {"rope": False}}, "evaluation": {"length": 16}}
    return build(FinetuneConfig, {**tree, **asked, "recall": False})


def test_where_they_are_missing_a_run_ends_before_it_loads_what_transformers_would_train(llama, text, tmp_path):
    if is_liger_kernel_available():
        pytest.skip("liger-kernel is installed")
    model = AutoModelForCausalLM.from_pretrained(llama, attn_plugin=LINEAR)
    with pytest.raises(ImportError, match=r"liger-kernel .* is not available"):
        liger.apply_liger_kernel(model, None)  # Trainer, in its train(): the model and its data are there by then
    assert kinds_of(model) == {"linear": 2}
    with pytest.raises(ValueError, match="use_liger_kernel needs liger-kernel, which is not installed: pip install"):
        prepare_finetune(settings("/no/model", "no.jsonl", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_they_are_given_the_model_with_its_slots_and_without_adapters_around_it(llama, text, tmp_path, monkeypatch):
    given, stand_in = [], ModuleType("liger_kernel.transformers")
    stand_in._apply_liger_kernel_to_instance = lambda model, **options: given.append((model, options))
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    for module in (liger, transformers.utils):
        monkeypatch.setattr(module, "is_liger_kernel_available", lambda: True)
    run = prepare_finetune(settings(llama, text, tmp_path / "out"))
    assert not given
    metrics = run.run(None)
    ((model, options),) = given
    assert model is run.trainer.model.get_base_model()
    assert options == {"rope": False}
    assert kinds_of(model) == metrics["attention"]["modules"] == {"linear": 2}
