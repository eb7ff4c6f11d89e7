"""Recall beside the loss: measured before and after a fine-tune, told of where it fell, and where it is missing."""

import json
import random
from pathlib import Path

import pytest
from conftest import WORDS, write_rows
from recalling import spelling, tiny
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.core.options import build
from attn_plugins.tasks import get_task, run_task
from attn_plugins.training import recall
from attn_plugins.training.config import EvaluateConfig, FinetuneConfig
from attn_plugins.training.evaluate import prepare_evaluation
from attn_plugins.training.finetune import choose_parameters, prepare_finetune
from attn_plugins.training.models import load
from attn_plugins.training.recall import report

pytestmark = pytest.mark.usefixtures("one_thread")

LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 1}
SHORT = {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """Folder of a tiny decoder whose tokenizer knows the words of the rows."""
    folder = tmp_path_factory.mktemp("speller")
    tiny(pad_token_id=3).save_pretrained(folder)
    spelling().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    chance = random.Random(0)
    rows = [{"text": " ".join(chance.choices(WORDS, k=300))} for _ in range(6)]
    return write_rows(tmp_path_factory.mktemp("long") / "long.jsonl", rows)


def settings(folder, rows, out, **changes):
    tree = {
        "model": folder,
        "data": {"source": rows, "eval_source": rows},
        "output_dir": str(out),
        "attention": LOCAL,
        "block_size": 128,
        "lora": {"r": 2, "target_modules": ["v_proj"]},
        "training": SHORT,
        "evaluation": {"length": 32, "max_tokens": 96},
    }
    return build(FinetuneConfig, {**tree, **changes})


def measured(parts):
    """What the task finds, as far as it is read: a share for each part."""
    shares = {part: {"accuracy": share} for part, share in parts.items()}
    return {"by_part": shares, "by_distance": [{"distance": 1024, "rows": 4}]}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"passkey": 1.0, "copy": 0.9}, {"passkey": 0.25, "copy": 0.85}, "passkey 1 before, 0.25 after"),
        ({"passkey": 1.0, "copy": 0.9}, {"passkey": 1.0, "copy": 0.5}, "copy 0.9 before, 0.5 after"),
        (
            {"passkey": 1.0, "copy": 0.9},
            {"passkey": 0.0, "copy": 0.4},
            "passkey 1 before, 0 after; copy 0.9 before, 0.4",
        ),
        ({"passkey": 1.0, "copy": 0.9}, {"passkey": 0.92, "copy": 0.81}, None),
        ({"passkey": 0.0, "copy": 0.3}, {"passkey": 1.0, "copy": 0.9}, None),
        ({"passkey": 0.0, "copy": 0.3}, {"passkey": 0.0, "copy": 0.3}, None),
    ],
)
def test_a_fall_is_told_of_and_a_rise_is_not(before, after, told):
    found = report(measured(before), measured(after))
    assert (found["distance"], found["rows"], found["margin"]) == (1024, 4, 0.1)
    assert found["parts"]["copy"]["after"]["accuracy"] == after["copy"]
    if told is None:
        assert found["warning"] is None
    else:
        assert told in found["warning"]
        assert "training took recall from the model (4 rows of 1024 tokens)" in found["warning"]


@pytest.mark.parametrize("fell", [True, False])
def test_a_swapped_model_is_asked_before_and_after(speller, long_text, tmp_path, monkeypatch, transformers_log, fell):
    monkeypatch.setattr(recall, "MARGIN", -1 if fell else 1)  # every change is a fall, or none
    found = prepare_finetune(settings(speller, long_text, tmp_path / "out")).run(None)
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())["recall"]
    assert told == found["recall"]
    assert (told["distance"], told["rows"], list(told["parts"])) == (128, 4, ["passkey", "copy"])
    cls = get_task("recall")
    task = cls(cls.Config(distances=[128], rows=4, passage=16))
    data = {"text": [json.loads(line)["text"] for line in Path(long_text).read_text().splitlines()]}
    for stage, folder, rules in (("before", speller, LOCAL), ("after", str(tmp_path / "out"), "as-saved")):
        loaded = load(folder, attention=rules)
        figures = run_task(task, loaded.model, task.prepare(data, loaded.tokenizer, loaded.model))
        for part, its in figures["by_part"].items():
            assert told["parts"][part][stage]["loss"] == pytest.approx(its["loss"], rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Recall at 128 tokens, share of tokens that are right in 4 rows:" in card
    warned = [line for line in transformers_log.messages if "took recall" in line]
    assert len(warned) == (1 if fell else 0)
    assert ("**Note that training took recall" in card) is fell
    assert "\n" not in "".join(warned)


@pytest.mark.parametrize("changes", [{"attention": None}, {"recall": False}])
def test_it_is_not_asked_for_the_models_own_attention_or_where_it_is_switched_off(
    speller, long_text, tmp_path, changes
):
    found = prepare_finetune(settings(speller, long_text, tmp_path / "out", **changes)).run(None)
    assert found["recall"] is None
    assert "recall" not in (tmp_path / "out" / "README.md").read_text().lower()


def test_where_it_cannot_be_measured_that_is_said(llama, long_text, tmp_path):
    small = settings(llama, long_text, tmp_path / "out", block_size=16)
    found = prepare_finetune(small).run(None)["recall"]
    assert found["missing"].startswith("the tokenizer does not know the letters of")
    assert "was not measured: the tokenizer does not know" in (tmp_path / "out" / "README.md").read_text()


def test_several_tasks_are_measured_and_the_first_stands_for_them(speller, long_text, tmp_path):
    tasks = [{"task": "names", "distances": [128], "rows": 2}, {"length": 32, "max_tokens": 64}]
    config = settings(speller, long_text, tmp_path / "out", evaluation=tasks, evaluate_before=True, recall=False)
    found = prepare_finetune(config).run(None)["evaluation"]
    assert found["task"] == "names"
    assert list(found["others"]) == ["perplexity"]
    assert {len(found[stage]["by_distance"]) for stage in ("before", "after")} == {1}
    alone = {"model": str(tmp_path / "out"), "data": {"source": long_text, "eval_source": long_text}}
    again = prepare_evaluation(build(EvaluateConfig, {**alone, "evaluation": tasks})).run()
    assert again["task"] == "names"
    assert again["result"]["loss"] == pytest.approx(found["after"]["loss"], rel=1e-5)
    for stage in ("before", "after"):
        assert found["others"]["perplexity"][stage]["perplexity"] > 1
    found = found["others"]["perplexity"]["after"]["perplexity"]
    assert again["others"]["perplexity"]["perplexity"] == pytest.approx(found, rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Held-out names:" in card
    assert "Held-out perplexity:" in card
    assert "| accuracy at distance 128 |" in card


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ([], r"evaluation has the tasks \[\]; allowed: at least one, each once"),
        (
            [{}, {"task": "perplexity"}],
            r"evaluation has the tasks \['perplexity', 'perplexity'\]; allowed: .* each once",
        ),
        (
            [{}, {"task": "accuracy"}],
            "evaluation.1.task='accuracy' is for classification models, and evaluation.0.task='perp",
        ),
        ([{}, {"task": "copy", "rows": 0}], "evaluation.1: rows=0; allowed: at least 1"),
        ([{}, {"task": "copy", "length": 3}], "unknown key 'length' in evaluation.1"),
    ],
)
def test_wrong_lists_of_tasks(text, evaluation, message):
    with pytest.raises(ValueError, match=message):
        build(EvaluateConfig, {"model": "m", "data": {"source": text}, "evaluation": evaluation})


def test_evaluate_says_that_recall_is_missing_beside_perplexity_and_prints_it_where_it_was_measured(speller, long_text):
    def call(*arguments):
        own = ["-s", f"data.eval_source={long_text}", "-s", "evaluation.0.length=32", "-s", "evaluation.1.rows=2"]
        sets = own if len(arguments) > 4 else ["-s", f"data.eval_source={long_text}", "-s", "evaluation.length=32"]
        words = ["evaluate", "-m", speller, "-d", long_text, *arguments, *sets]
        ran = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})
        assert ran.exit_code == 0, ran.output
        return ran.stdout

    swapped = call("--attn", "local")
    assert "perplexity does not show whether the model still recalls" in " ".join(swapped.split())
    assert "recalls" not in call("--attn", "null")
    both = call("--attn", "local", "--task", "perplexity", "--task", "names", "-s", "evaluation.1.distances=[128]")
    assert "recalls" not in both
    assert "accuracy at distance 128" in both
    assert "perplexity at positions" in both


EVERY = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora": {"r": 2}}, EVERY),
        ({}, EVERY),
        ({"lora": {"r": 2, "target_modules": ["k_proj"]}}, {"k_proj"}),
        ({"attention": None, "lora": {"r": 2}}, EVERY),
    ],
)
def test_adapters_go_to_every_linear_layer_unless_others_are_named(speller, long_text, tmp_path, changes, expected):
    config = settings(speller, long_text, tmp_path / "out", **{"lora": {}, **changes})
    model = choose_parameters(config, load(speller, attention=config.attention))
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == expected


def test_adapters_go_to_linear_layers_of_another_kind(tmp_path, long_text):
    folder = str(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    spelling().save_pretrained(folder)
    config = settings(folder, long_text, tmp_path / "out", lora={"r": 2, "fan_in_fan_out": True})
    model = choose_parameters(config, load(folder, attention=LOCAL))
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"c_attn", "c_proj", "c_fc"}
