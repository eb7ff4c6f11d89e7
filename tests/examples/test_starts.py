"""examples/transfer/starts.py on a tiny model: figures that can be told beforehand, and what is kept of a run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

EXAMPLE = Path(__file__).parents[2] / "examples" / "transfer" / "starts.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("starts_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def subject(example, llama, one_thread):
    return example.Subject(str(llama), length=24, blocks=3, rows=0)


def test_softmax_starts_at_the_model_itself(example, subject):
    own = example.measure(0, None, subject)
    model = tf.AutoModelForCausalLM.from_pretrained(subject.settings["model"], dtype=torch.bfloat16)
    with torch.no_grad():
        losses = [model(input_ids=ids[None], labels=ids[None]).loss.float() for ids in subject.blocks_BN]
    assert own["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-3)
    found = example.measure(0, {"type": "softmax"}, subject)
    assert found["perplexity"] == pytest.approx(own["perplexity"], rel=1e-3)
    assert found["error"] <= found["worst layer"] < 1e-4  # bfloat16
    assert example.measure(0, None, subject) == own, "the model is its own again"


def test_an_error_of_one_is_as_bad_as_zeros(example, subject):
    class Zeros(torch.nn.Module):
        def forward(self, q, k, v, **options):
            return torch.zeros_like(q).transpose(1, 2), None

    with subject.swapped("softmax", 0) as model:
        for layer in model.model.layers:
            layer.self_attn.attn_plugin.forward = Zeros().forward
        found = example.output_errors(model, subject.blocks_BN)
    assert found == pytest.approx({"error": 1.0, "worst layer": 1.0, "error of heads": 1.0})


def test_a_run_is_kept_and_goes_on(example, llama, tmp_path, monkeypatch, capsys, one_thread):
    out = tmp_path / "starts.jsonl"

    def run(*rules):
        sizes = ["--model", str(llama), "--length=24", "--blocks=2", "--rows=0", f"--out={out}"]
        monkeypatch.setattr(sys, "argv", ["", *rules, *sizes])
        example.main()
        return [json.loads(line) for line in out.read_text("utf-8").splitlines()]

    first = run("two={type: local, window_size: 2}", "retention", "{type: nystrom}")
    assert [record["status"] for record in first] == ["ok", "ok", "refused"]
    assert [record["settings"]["attention"] for record in first] == ["two", "retention", "{type: nystrom}"]
    assert "no 'causal'" in first[2]["error"]
    again = run("two={type: local, window_size: 2}", "dense=null")
    assert again[:3] == first, "what is there is not measured again"
    assert [record["settings"]["attention"] for record in again[3:]] == ["dense"]
    assert first[0]["result"]["error"] > 0


def test_every_causal_attention_is_measured_by_default(example):
    assert {"dense", "local", "linear_window", "retention"} <= set(example.causal_attentions())
    assert "nystrom" not in example.causal_attentions()
