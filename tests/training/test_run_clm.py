"""The script that people copy: it runs, its attention is in what it saves, and what was stopped goes on."""

import json
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import attn_plugins as ap

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parents[2] / "examples" / "training" / "run_clm.py"


def test_it_trains_and_saves_the_attention_with_the_model(llama, text, tmp_path, monkeypatch):
    words = ["--model", llama, "--data", text, "--length", "16", "--attention", '{"type": "local", "window_size": 4}']
    words += ["--output_dir", str(tmp_path), "--learning_rate", "0.01", "--per_device_train_batch_size", "2"]
    words += ["--held_out", "0.2", "--disable_tqdm", "true", "--use_cpu", "true", "--dataloader_pin_memory", "false"]
    for steps in ("4", "6"):
        monkeypatch.setattr("sys.argv", ["run_clm.py", *words, "--max_steps", steps])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert (tmp_path / "checkpoint-4").exists(), "it went on from there"
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [row.plugin for row in ap.describe_attention(model)] == ["local", "local"]
    measured = json.loads((tmp_path / "eval_results.json").read_text())
    assert 1 < measured["perplexity"] < 20, "of 20 tokens"
