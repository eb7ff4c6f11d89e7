"""Every config of configs/train that a CPU can run, as a user runs it: real weights, real data, the command line.

What a case takes lies under the cache (``$ATTN_PLUGINS_CACHE``, else ``~/.cache/attn-plugins``) in ``models/NAME`` and
``data/NAME``; where it does not, the case skips and says what it looked for. Of words, questions and preferred answers
there is no ready table: examples/training/make_tables.py makes them.
"""

import dataclasses
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import transformers
from conftest import KillAt, on_disk, write_rows
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.cli.app import settings
from attn_plugins.core.options import build
from attn_plugins.data.answers import overlap
from attn_plugins.data.text import python_docs
from attn_plugins.training.config import FinetuneConfig

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "train"


def rows_of(*parts):
    """Rows of a JSONL file in the cache."""
    return [json.loads(line) for line in on_disk(*parts).read_text("utf-8").splitlines()]


def smollm():
    return {"model": on_disk("models", "smollm2-135m")}


def minilm():
    return {"model": on_disk("models", "minilm")}


def captioning(folder):
    out = folder / "captioner"
    parts = [f"--encoder={on_disk('models', 'dinov2-small')}", f"--decoder={on_disk('models', 'minilm')}"]
    script = ROOT / "examples" / "training" / "join_captioner.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *parts, "--image-size=112", f"--out={out}"])
        runpy.run_path(str(script), run_name="__main__")
    return {"model": out, "data.source": on_disk("data", "captions"), "options.max_length": 8}


BLOCKS = {"block_size": 128, "evaluation.length": 128, "evaluation.max_tokens": 256}


def causal_lm_full(folder):
    table = write_rows(folder / "my.jsonl", [{"text": text} for text in python_docs()["train"]["text"][:30]])
    return {**smollm(), **BLOCKS, "data.source": table, "training.gradient_accumulation_steps": 1}


def causal_lm(folder):
    return {**smollm(), **BLOCKS}


def long_documents(folder):
    """Longer than the window."""
    rows = {"data.max_train_rows": 2, "data.max_eval_rows": 1, "training.per_device_train_batch_size": 1}
    lengths = {"block_size": 640, "evaluation.length": 640, "evaluation.max_tokens": 640}
    return {**smollm(), **rows, **lengths, "data.source": on_disk("data", "long-documents")}


ALL_CLASSES = {"data.max_train_rows": 200}


def classification(folder):
    lengths = {"max_length": 64, "evaluation.max_length": 64, "data.eval_split": "validation", **ALL_CLASSES}
    return {**minilm(), **lengths, "data.source": on_disk("data", "reviews")}


def image_classification(folder):
    return {"model": on_disk("models", "dinov2-small"), "data.source": on_disk("data", "fashion-mnist"), **ALL_CLASSES}


def masked_lm(folder):
    return minilm()


def preference(folder):
    rows = MADE["preference"](rows_of("data", "summaries", "validation.jsonl")[:400])
    return {**smollm(), "data.source": write_rows(folder / "my.jsonl", rows[:40])}


MADE = runpy.run_path(str(ROOT / "examples" / "training" / "make_tables.py"))


def split_tables(folder, table, train, held_out):
    """Settings of MiniLM with a table that the example makes, the first so many rows of each split."""
    summaries = None if table == "words" else on_disk("data", "summaries", "train.jsonl").parent
    rows, sizes = MADE["tables"](table, summaries), {"train": train, "validation": held_out}
    tables = [write_rows(folder / f"{split}.jsonl", rows[split][:size]) for split, size in sizes.items()]
    return {**minilm(), "data.source": tables[0], "data.eval_source": tables[1]}


def question_answering(folder, train=40, held_out=8):
    return split_tables(folder, "questions", train, held_out)


def token_classification(folder, train=40, held_out=8):
    return split_tables(folder, "words", train, held_out)


def sentence_embedding(folder):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return {**minilm(), "data.source": on_disk("data", "summaries"), "options.max_length": 48, "data.max_eval_rows": 16}


def speech_recognition(folder):
    table = on_disk("data", "speech", "validation.jsonl")
    return {"model": on_disk("models", "whisper-tiny-en"), "data.source": table, "data.eval_source": table}


def texts_to_texts(name):
    """A case of ``data/NAME``, in which a model reads and writes a few words."""

    def case(folder):
        tables = {f"data.{of}": [str(on_disk("data", name, file))] for of, file in PAIRS.items()}
        return {**smollm(), **tables, "options.max_source_length": 48, "options.max_target_length": 12}

    return case


def from_scratch(name):
    """A case of ``data/NAME`` for a model, and a tokenizer, that learn from these rows alone."""

    def case(folder):
        return {f"data.{of}": [str(on_disk("data", name, file))] for of, file in PAIRS.items()}

    return case


PAIRS = {"source": "train.jsonl", "eval_source": "validation.jsonl"}
CASES = {
    "captioning": captioning,
    "causal_lm_full": causal_lm_full,
    "causal_lm_lora": causal_lm,
    "causal_lm_new": causal_lm,
    "classification_lora": classification,
    "image_classification": image_classification,
    "long_documents": long_documents,
    "masked_lm": masked_lm,
    "preference": preference,
    "question_answering": question_answering,
    "sentence_embedding": sentence_embedding,
    "speech_recognition": speech_recognition,
    "summarization": texts_to_texts("summaries"),
    "summarization_recurrent": from_scratch("summaries"),
    "token_classification": token_classification,
    "translation": texts_to_texts("translation-fr"),
    "translation_recurrent": from_scratch("translation-fr"),
}
"""Name of a config -> what is set over it, of a folder to write into."""

SHORT = {
    "data.max_train_rows": 24,
    "data.max_eval_rows": 6,
    "evaluate_before": False,
    "training.max_steps": 2,
    "training.per_device_train_batch_size": 2,
    "training.logging_steps": 1,
    "training.save_strategy": "no",
}


def assigned(changes):
    """Changes as ``--set`` takes them."""
    return [word for path, value in changes.items() for word in ("--set", f"{path}={json.dumps(value, default=str)}")]


def called(*words):
    ran = CliRunner().invoke(cli.app, list(map(str, words)))
    assert ran.exit_code == 0, f"{ran.output}\n{ran.exception!r}"
    return ran


def command(name, changes, out):
    return ["finetune", "--config", CONFIGS / f"{name}.yaml", *assigned({**changes, "output_dir": out})]


def finetuned(name, changes, out, *words):
    """What the command has written."""
    called(*command(name, changes, out), *words)
    return json.loads((out / "metrics.json").read_text("utf-8"))


def evaluated(name, changes, model, metrics):
    """What ``evaluate`` finds of the model that was written, by the settings of its fine-tune."""
    config = build(FinetuneConfig, settings(CONFIGS / f"{name}.yaml", {}, assigned(changes)[1::2]))
    tasks = config.measured(config.trained())
    tree = {"model": str(model), "data": metrics["data"]}
    tree["evaluation"] = [{"task": task.name, **dataclasses.asdict(task.config)} for task in tasks]
    (model / "evaluate.yaml").write_text(json.dumps(tree))
    called("evaluate", "--config", model / "evaluate.yaml", "--output", model / "evaluated.json")
    return json.loads((model / "evaluated.json").read_text("utf-8"))


def numbers(figures):
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a case writes; configs name files from the root of the project on."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs"


def test_every_config_for_a_cpu_has_a_case():
    assert {path.stem for path in CONFIGS.glob("*.yaml") if "_gpu" not in path.stem} == set(CASES)


@pytest.mark.real
@pytest.mark.parametrize("name", CASES)
def test_a_config_runs_and_its_model_measures_the_same(name, folder, tmp_path):
    changes, out = {**SHORT, **CASES[name](folder)}, tmp_path / "out"
    metrics = finetuned(name, changes, out)
    assert metrics["train"]["steps"] == 2
    assert [math.isfinite(entry["loss"]) for entry in metrics["train"]["losses"]] == [True, True]
    swapped = {kind for kind in metrics["attention"]["modules"] if not kind.startswith("own")}
    assert swapped, "the config has an attention"
    assert "pipeline_tag:" in (out / "README.md").read_text("utf-8")
    again = evaluated(name, {**changes, "output_dir": out}, out, metrics)
    close = 1e-2 if metrics["training"].get("bf16") else 1e-4  # Trainer's model computes in what it was trained in
    assert numbers(again["result"]) == pytest.approx(numbers(metrics["evaluation"]["after"]), rel=close)
    assert (again["attention"], again["new_weights"]) == (metrics["attention"], 0)


@pytest.mark.real
@pytest.mark.parametrize("name", ["image_classification", "masked_lm", "sentence_embedding", "speech_recognition"])
def test_a_killed_config_goes_on_to_the_same_numbers(name, folder, tmp_path, monkeypatch):
    saving = {"training.max_steps": 4, "training.save_strategy": "steps", "training.save_steps": 2}
    changes = {**SHORT, **CASES[name](folder), **saving}
    whole = finetuned(name, changes, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, KillAt(3)])
        ran = CliRunner().invoke(cli.app, list(map(str, command(name, changes, tmp_path / "out"))))
    assert ran.exit_code
    assert not (tmp_path / "out" / "metrics.json").exists()
    metrics = finetuned(name, changes, tmp_path / "out", "--resume")
    assert metrics["train"]["resumed_from"].endswith("checkpoint-2")
    assert metrics["train"]["losses"] == whole["train"]["losses"]
    assert metrics["evaluation"]["after"] == whole["evaluation"]["after"]


LEARNING = {**SHORT, "training.per_device_train_batch_size": 8, "evaluate_before": True}
LEARNING |= {"data.max_train_rows": 320, "data.max_eval_rows": 100, "training.max_steps": 40}


@pytest.mark.real
def test_words_that_are_code_are_found_after_40_steps(folder, tmp_path):
    changes = {**LEARNING, **token_classification(folder, 320, 100)}
    found = finetuned("token_classification", changes, tmp_path / "out")["evaluation"]
    before, after = found["before"], found["after"]
    assert after["f1"] > before["f1"] + 0.3
    assert after["accuracy"] > after["majority"]


@pytest.mark.real
def test_what_packages_provide_is_found_after_40_steps(folder, tmp_path):
    changes = {**LEARNING, **question_answering(folder, 320, 40)}
    metrics = finetuned("question_answering", changes, tmp_path / "out")["evaluation"]
    rows = [json.loads(line) for line in Path(changes["data.eval_source"]).read_text("utf-8").splitlines()]
    all_of_it = sum(overlap(row["context"], row["answers"]) for row in rows) / len(rows)
    assert metrics["after"]["questions"] == len(rows) == 40
    assert metrics["after"]["f1"] > max(metrics["before"]["f1"], all_of_it)
