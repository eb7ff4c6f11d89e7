"""examples/transfer/finetune_recall.py: every kind of run on a tiny model, and a run that goes on where it was."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import WORDS, write_rows
from recalling import spelling, tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "transfer" / "finetune_recall.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune_recall_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(example, tmp_path, monkeypatch, one_thread):
    tiny(pad_token_id=3).save_pretrained(tmp_path / "model")
    spelling().save_pretrained(tmp_path / "model")
    rows = [{"text": " ".join(WORDS[(first + 3 * n * n) % len(WORDS)] for n in range(400))} for first in range(4)]
    text = write_rows(tmp_path / "text.jsonl", rows)
    heads = {"type": "softmax", "kv_heads": {"1": [0]}}
    window = {"type": "local", "window_size": 8, "num_sink_tokens": 1}
    monkeypatch.setattr(
        example,
        "ATTENTIONS",
        {
            "window, 16 heads full": [heads, window],
            "linear_window, 16 heads full": [heads, {"type": "linear_window", "window_size": 8}],
            "linear, 16 heads full": [heads, {"type": "linear", "feature_map": "hedgehog"}],
        },
    )
    monkeypatch.setattr(example, "ROWS_BESIDE", {"dense": None})
    sizes = {"steps": 2, "block_size": 32, "distance": 200, "rows": 1, "blocks": 2, "transfer_steps": 2}
    data = {"source": text, "eval_source": text}
    return example.Bench(tmp_path / "work", model=str(tmp_path / "model"), data=data, **sizes)


@pytest.mark.parametrize(
    ("attention", "targets"),
    [
        ("dense", "q, k, v, o"),
        ("window, 16 heads full", "v, o"),
        ("linear_window, 16 heads full", "all-linear"),
        ("linear, 16 heads full", "new weights"),
    ],
)
def test_a_fine_tune_is_measured_before_and_after(example, bench, attention, targets):
    found = example.measure(attention, targets, 0, bench)
    assert set(found["before"]) == {"perplexity", "passkey", "copy", "recall loss"}
    assert found["before"]["perplexity"] != found["after"]["perplexity"]
    assert found["train loss"] > 0
    assert bench.before[attention] == found["before"]


def test_a_run_goes_on_where_it_was(example, bench, tmp_path, monkeypatch, capsys):
    assert len(example.runs([0, 1, 2])) == 3 * 11 + 1
    assert example.runs([0, 1])[11] == ("dense", "q, k, v, o", 0)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(example, "Bench", lambda work, **options: bench)
    monkeypatch.setattr(sys, "argv", ["", "dense", f"--out={out}", "--seeds", "0"])
    example.main()
    (line,) = out.read_text("utf-8").splitlines()
    assert json.loads(line)["result"]["after"]["perplexity"] > 1
    example.main()
    assert out.read_text("utf-8").splitlines() == [line]


@pytest.mark.real
@pytest.mark.slow
def test_a_window_with_chosen_heads_recalls_before_and_after_lora_on_values_and_outputs(example, tmp_path):
    found = example.measure("window, 16 heads full", "v, o", 0, example.Bench(tmp_path))
    assert found["before"]["passkey"] >= 0.8
    assert found["after"]["passkey"] >= found["before"]["passkey"] - 0.15
    assert found["after"]["copy"] >= found["before"]["copy"] - 0.1
    assert found["after"]["perplexity"] < found["before"]["perplexity"]
