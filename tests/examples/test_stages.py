"""examples/transfer/stages.py: the stages follow each other on a tiny model; on the real one they reach their bars."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "transfer" / "stages.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("stages_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its dataclass looks its annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(example, monkeypatch):
    """A stage of each kind, of two steps."""
    untrained = example.Stage(attention="linear", does="untrained")
    taught = example.Stage(attention="linear", does="transfer", steps=2, after=untrained)
    last = [example.Stage(attention="linear", does=does, steps=2, after=taught) for does in ("kl", *example.LORA)]
    monkeypatch.setattr(example, "STAGES", [untrained, taught, *last])
    return example


def test_stages_follow_each_other(small, llama, tmp_path, one_thread):
    bench = small.Bench(tmp_path, model=llama, length=16, blocks=4, rows=0)
    found = small.measure(0, bench)
    assert list(found) == ["linear, untrained", "linear + 2 transfer", "linear + 2 transfer + 2 kl", *list(found)[3:]]
    assert found["linear + 2 transfer"]["error"] < found["linear + 2 transfer"]["error before"]
    assert found["linear + 2 transfer"]["pretrained weights unchanged"]
    assert found["linear + 2 transfer + 2 kl"]["pretrained weights unchanged"]
    assert len({figures["perplexity"] for figures in found.values()}) == 5


def test_a_run_is_kept_and_goes_on(small, llama, tmp_path, monkeypatch, capsys, one_thread):
    make = small.Bench
    monkeypatch.setattr(small, "Bench", lambda work, seed: make(work, seed, model=llama, length=16, blocks=2, rows=0))
    out = tmp_path / "stages.jsonl"
    monkeypatch.setattr(sys, "argv", ["", f"--work={tmp_path / 'work'}", f"--out={out}"])
    small.main()
    lines = out.read_text("utf-8").splitlines()
    out.write_text("".join(f"{line}\n" for line in lines[:-1]), "utf-8")  # killed before the last
    small.main()
    again = out.read_text("utf-8").splitlines()
    assert [json.loads(line)["stage"] for line in again] == [json.loads(line)["stage"] for line in lines]
    assert again[:-1] == lines[:-1]
    one, other = (json.loads(line)["result"]["perplexity"] for line in (lines[-1], again[-1]))
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.real
@pytest.mark.slow
def test_the_stages_reach_their_bars(example, tmp_path):
    found = example.measure(0, example.Bench(tmp_path))
    perplexity = {name: figures["perplexity"] for name, figures in found.items()}
    assert perplexity["linear + 50 transfer"] <= 260
    assert perplexity["linear + 50 transfer + 16 lora"] <= 150
    assert perplexity["linear + 50 transfer + 64 lora in all layers"] <= 85
    assert perplexity["linear + 100 transfer + 64 lora"] <= 85
    assert perplexity["linear in 23, 7 chosen + 100 transfer"] <= 75
    assert perplexity["linear in 23, 7 chosen + 100 transfer + 16 lora"] <= 45
    assert perplexity["linear_window, untrained"] <= 19.4
    assert perplexity["linear_window + 25 transfer"] <= 19.0
    assert perplexity["linear_window + 25 transfer + 16 kl"] <= 18.6
    for stage in ("linear_window + 25 transfer", "linear_window + 25 transfer + 16 kl"):
        assert perplexity[stage] < perplexity["local, untrained"]
    assert perplexity["linear_window + 25 transfer + 16 lora"] <= perplexity["local + 16 lora"] + 0.1
    assert all(figures.get("pretrained weights unchanged", True) for figures in found.values())
