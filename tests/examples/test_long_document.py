"""examples/long_document.py: a table, results that are kept, and a plot of them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from conftest import WORDS

EXAMPLE = Path(__file__).parents[2] / "examples" / "long_document.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("long_document_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_once_and_draws_what_it_found(example, llama, tmp_path, capsys, monkeypatch):
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for text in texts:
        text.write_text(" ".join(WORDS * 3 if text.stem == "one" else WORDS[::-1] * 3))
    out = tmp_path / "out"
    sizes = ["--length", "45", "--piece", "7", "--stretch", "20"]
    attentions = ["--attention", "dense=null", "--attention", "few={type: local, window_size: 4}"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["", *map(str, texts), "--model", llama, *sizes, *attentions, "--output-dir", str(out)],
    )
    example.main()
    table = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(line["attention"], line["text"]) for line in lines] == [
        (attention, text) for attention in ("dense", "few") for text in ("one", "two")
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    assert rows[0] == ["up to token", "20", "40", "45", "cache at the end"]
    assert [row[0] for row in rows[2:]] == ["dense", "few"]
    first = [line["result"]["by_position"][0]["perplexity"] for line in lines[:2]]
    assert float(rows[2][1]) == pytest.approx((first[0] * first[1]) ** 0.5, abs=0.06)
    written, before = (out / "long_document.png").stat().st_size, (out / "results.jsonl").read_text()
    assert written > 1000
    example.main()
    assert capsys.readouterr().out == table
    assert (out / "results.jsonl").read_text() == before, "what is there is not measured again"
