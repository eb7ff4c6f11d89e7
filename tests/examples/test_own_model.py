"""examples/own_model.py: a model of the user's own is swapped, generates, is saved and comes back."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import attn_plugins as ap

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"


@pytest.fixture(scope="module")
def own():
    spec = importlib.util.spec_from_file_location("own_model_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def build(own, implementation="sdpa", **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(own.OwnConfig(**options), attn_implementation=implementation)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 and "attn_plugin" not in path:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs():
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_what_it_prints(own, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["own_model.py", "--save", str(tmp_path / "saved")])
    own.main()
    printed = capsys.readouterr().out
    said = dict(re.findall(r"^(says|loaded|its own|one layer) +(\[[\d, ]+\])$", printed, re.MULTILINE))
    assert said["says"] == said["loaded"]
    assert len({said["says"], said["its own"], said["one layer"]}) == 3
    assert re.findall(r"^(blocks.\d.attention) +\d +decoder .*linear", printed, re.MULTILINE) == [
        f"blocks.{index}.attention" for index in range(3)
    ]
    assert (tmp_path / "saved" / "config.json").exists()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_limit_case_and_hybrid_with_gradients(own, implementation):
    given, model = inputs(), build(own, implementation)
    real = given["attention_mask"].bool()
    expected = model(**given).logits[real]
    expected.square().mean().backward()
    gradients = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
    for rule in ("softmax", {"type": "local", "window_size": 64}, {"type": "softmax", "layers": 1}):
        ap.swap_attention(model, rule)
        model.zero_grad()
        out = model(**given).logits[real]
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        out.square().mean().backward()
        for path, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(path).grad, gradient, atol=1e-5, rtol=1e-3)
    restored = ap.restore_attention(model)
    assert torch.equal(restored(**given).logits[real], expected)


@pytest.mark.parametrize("name", ["linear", "additive", "local"])
@torch.no_grad()
def test_generates_with_bounded_caches_what_it_generates_without(own, name):
    flag = {"type": "local", "window_size": 4} if name == "local" else name
    model = build(own, attn_plugin=flag)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs(), **how), model.generate(**inputs(), **how, use_cache=False))
