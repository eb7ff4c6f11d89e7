"""examples/transfer/choice.py on a tiny model, and, marked real, its figures at the bars that the page promises."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

EXAMPLE = Path(__file__).parents[2] / "examples" / "transfer" / "choice.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("choice_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(letters, tmp_path_factory):
    """A folder with the two splits."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [json.loads(line) for line in Path(letters[1]).read_text().splitlines()]
    for split, part in (("train", rows[:3]), ("validation", rows[3:])):
        long = [{"text": row["text"] * 10} for row in part]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    return folder


def test_every_case_is_measured_and_a_run_goes_on(example, letters, texts, tmp_path, monkeypatch, capsys, one_thread):
    out = tmp_path / "choice.jsonl"
    sizes = ["--length=420", "--rows=1", f"--out={out}", f"--texts={texts}"]
    monkeypatch.setattr(sys, "argv", ["", "--model", letters[0], *sizes])
    subject = example.Subject(letters[0], texts, length=420, rows=1)
    assert subject.figures(None, 0) == subject.figures({"type": "softmax"}, 0)
    config = subject.model.config.to_dict()
    example.main()
    lines = [json.loads(line) for line in out.read_text("utf8").splitlines()]
    assert [line["settings"]["case"] for line in lines] == list(example.cases())
    assert all(0 < line["result"]["copy loss"] < 50 for line in lines)
    assert {name for line in lines for name in line["result"]} >= {
        "perplexity",
        "passkey",
        "copy",
        "names",
        "names loss",
    }
    example.main()
    assert len(out.read_text("utf8").splitlines()) == len(lines)
    subject.figures(subject.window(8), 0)
    assert subject.model.config.to_dict() == config


def test_figures_are_those_of_the_answers(example, letters, texts, one_thread):
    subject = example.Subject(letters[0], texts, length=420, rows=1)
    figures = subject.figures(None, 0)
    (row,) = example.recall_rows(
        subject.held_out, subject.tokenizer, length=420, count=1, seed=100, parts=("passkey", "copy")
    )
    model = tf.AutoModelForCausalLM.from_pretrained(letters[0], dtype=torch.bfloat16)
    labels = torch.full_like(row.input_ids_N, -100)
    start, stop = row.answers["copy"]
    labels[start:stop] = row.input_ids_N[start:stop]
    with torch.no_grad():
        loss = model(input_ids=row.input_ids_N[None], labels=labels[None]).loss
    assert figures["copy loss"] == pytest.approx(float(loss), rel=1e-2)


@pytest.mark.real
@pytest.mark.slow
def test_chosen_heads_recall(example):
    if not example.TEXTS.exists():
        pytest.skip(f"no long documents in {example.TEXTS}")
    seeds = [example.measure(seed) for seed in (0, 1, 2)]
    found = {
        label: {name: sum(one[label][name] for one in seeds) / len(seeds) for name in figures}
        for label, figures in seeds[0].items()
    }
    dense, heads, wide = (found[label] for label in ("dense", "window 64, heads", "window 256, heads"))
    fourth = found["window 64, every fourth layer"]
    assert fourth["passkey"] <= 0.1
    assert found["window 256, every fourth layer"]["passkey"] <= 0.3
    assert heads["passkey"] >= 0.9
    assert heads["copy"] >= 0.65
    assert heads["names"] >= 0.7
    assert wide["perplexity"] <= 1.03 * dense["perplexity"]
    assert wide["copy"] >= dense["copy"] - 0.08
    assert wide["passkey"] >= dense["passkey"] - 0.05
    layers = found["window 64, layers by recall"]
    assert layers["passkey"] >= 0.6
    assert layers["copy"] >= fourth["copy"] + 0.12
    assert layers["perplexity"] <= fourth["perplexity"] - 2
    best = max(found[f"window 64, layers by {score}"]["copy"] for score in ("contribution", "recall", "kl"))
    assert found["window 64, few heads"]["copy"] > best
