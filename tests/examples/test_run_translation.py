"""examples/training/run_translation.py: a tiny BART trains, is measured by what it writes, and comes back swapped."""

import json
import runpy
import sys
from pathlib import Path

import torch
from conftest import WORDS, tokenizer, write_rows
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

import attn_plugins as ap

EXAMPLE = Path(__file__).parents[2] / "examples" / "training" / "run_translation.py"


def test_it_trains_measures_and_saves(one_thread, tmp_path, monkeypatch):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32, "init_std": 0.3}
    ids = {"pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 2}
    torch.manual_seed(0)
    config = BartConfig(vocab_size=20, **sizes, **heads, **ids, forced_eos_token_id=None)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer(encoder=True).save_pretrained(tmp_path / "model")
    rows = [{"translation": {"en": one, "fr": f"{one} {two}"}} for one in WORDS[:5] for two in WORDS[5:9]]
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    rule = {"type": "local", "window_size": 4, "roles": ["encoder", "decoder"]}
    lengths = ["--max-source-length", "8", "--max-target-length", "8", "--held-out", "0.2"]
    options = ["--max-steps", "12", "--learning-rate", "0.02", "--logging-steps", "1", "--report-to", "none"]
    options += ["--dataloader-pin-memory", "False"]
    command = [str(EXAMPLE), "--model", str(tmp_path / "model"), "--data", data, "--output-dir", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--attention", json.dumps(rule), *lengths, *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")

    found = json.loads((out / "eval_results.json").read_text())
    assert found["eval_chrf"] > 0
    assert found["eval_bleu"] >= 0
    history = json.loads((out / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert sorted(row.plugin or "own" for row in ap.describe_attention(model)) == ["local", "local", "own"]
