"""examples/transfer/split_overhead.py: what is measured, and the bar that a split attention is held to."""

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "transfer" / "split_overhead.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("split_overhead_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pair_is_measured_once(example, tmp_path, monkeypatch, capsys, one_thread):
    out = tmp_path / "found.jsonl"
    arguments = ["split_overhead.py", "--rounds", "1", "--length", "32", "--out", str(out)]
    for _ in range(2):  # the second finds all of it done
        monkeypatch.setattr("sys.argv", arguments)
        example.main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["settings"]["pair"], line["settings"]["pass"]) for line in lines] == [
        (pair, which) for pair in (*example.PAIRS, example.OWN) for which in example.PASSES
    ]
    assert all(line["result"]["lowest"] <= line["result"]["cost"] <= line["result"]["highest"] < 1 for line in lines)
    assert len(capsys.readouterr().out.splitlines()) == len(lines)


@pytest.mark.real
@pytest.mark.slow
def test_a_split_costs_at_most_a_tenth_of_the_attention_at_4096_tokens(example):
    found = example.measure(0)
    assert {name: figures for name, figures in found.items() if figures["cost"] > 0.1} == {}
