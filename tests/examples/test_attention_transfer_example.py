"""examples/transfer/attention_transfer.py: it measures tiny models; the real ones reach their bars."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "transfer" / "attention_transfer.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("attention_transfer_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_a_decoder_and_an_encoder(example, llama, bert, text, tmp_path, monkeypatch, one_thread):
    monkeypatch.setitem(
        example.PARTS, "decoder", lambda seed: DECODER(seed, model=llama, steps=3, length=16, held_out=2)
    )
    sizes = {"steps": 3, "length": 16, "batch_size": 2, "held_out": 1}
    monkeypatch.setitem(example.PARTS, "encoder", lambda seed: ENCODER(seed, model=bert, data=text, **sizes))
    DECODER, ENCODER = example.decoder, example.encoder
    out = tmp_path / "figures.jsonl"
    monkeypatch.setattr(sys, "argv", ["", f"--out={out}"])
    example.main()
    example.main()  # nothing is left to measure
    decoder, encoder = (json.loads(line)["result"] for line in out.read_text("utf-8").splitlines())
    assert decoder["error"] < decoder["error before"]
    assert decoder["error"] <= decoder["error of the worst layer"]
    assert decoder["error at twice the length"] > 0
    assert encoder["error"] < encoder["error before"]
    assert -1 <= encoder["cosine"] <= 1


@pytest.mark.real
@pytest.mark.slow
def test_transfer_reaches_its_bars(example):
    if not (example.CACHE / "models" / "smollm2-135m").exists():
        pytest.skip("no smollm2-135m on disk")
    found = example.decoder(0)
    assert found["error"] <= 0.55
    assert found["error of the worst layer"] <= 0.8
    assert found["step over forward"] <= 2.2


@pytest.mark.real
def test_transfer_to_an_encoder_reaches_its_bar(example):
    for path in ("models/minilm", "data/long-documents"):
        if not (example.CACHE / path).exists():
            pytest.skip(f"no {path} in the cache")
    assert example.encoder(0)["cosine"] >= 0.87
