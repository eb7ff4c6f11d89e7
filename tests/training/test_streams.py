"""Fine-tunes on a stream: the same numbers as on rows that are all there, whole or killed, and what is said of them."""

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import WORDS, write_rows
from safetensors.torch import load_file
from test_finetune import launched
from test_tasks_trained import KillAt
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.core.options import build
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.tasks import trained_task
from attn_plugins.training.arguments import training_arguments
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.dry_run import dry_run, told
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import load
from attn_plugins.training.streaming import endless
from attn_plugins.transfer.config import TransferConfig
from attn_plugins.transfer.run import prepare_transfer

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING = {
    "max_steps": 6,
    "per_device_train_batch_size": 3,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
LOCAL = {"type": "local", "window_size": 4}
BLOCKS = {"block_size": 16, "evaluation": {"length": 16}, "recall": False}
LABELS = {"task": "classification", "max_length": 12}
PAIRS = {"task": "translation", "options": {"max_source_length": 14, "max_target_length": 6, "max_rows": 4}}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """JSONL of 30 texts, each with its words in the other order."""
    chance = random.Random(0)
    sources = [chance.choices(WORDS, k=chance.randint(2, 12)) for _ in range(30)]
    rows = [{"source": " ".join(words), "target": " ".join(words[::-1])} for words in sources]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture
def cases(llama, bert, text, labelled, pairs):
    """Name of a case -> its model, its rows, and what else it asks for."""
    return {
        "blocks": (llama, text, BLOCKS),
        "documents": (llama, text, {**BLOCKS, "options": {"packing": "documents"}}),
        "classification": (bert, labelled, LABELS),
        "translation": (llama, pairs, PAIRS),
    }


def settings(case, out, data=None, **changes):
    model, rows, its = case
    tree = {"model": model, "output_dir": str(out), "attention": LOCAL, "tune": "full"}
    tree |= {"data": {"source": rows, **(data or {})}, "training": TRAINING, **its}
    return build(FinetuneConfig, {**tree, **changes})


@pytest.mark.parametrize("chunk_rows", [1000, 11])
@pytest.mark.parametrize("name", ["blocks", "documents", "classification", "translation"])
def test_a_stream_trains_as_rows_that_are_all_there_do(name, chunk_rows, cases, tmp_path):
    if name == "blocks" and chunk_rows == 11:
        pytest.skip("texts are laid end to end within a chunk, of as many rows as where all are there")
    rows = cases[name][1]
    training = {**TRAINING, "train_sampling_strategy": "sequential"}
    there = prepare_finetune(settings(cases[name], tmp_path / "there", {"eval_source": rows}, training=training))
    reading = {"streaming": True, "shuffle_rows": 0, "chunk_rows": chunk_rows}
    streamed = prepare_finetune(settings(cases[name], tmp_path / "streamed", {"eval_source": rows, **reading}))
    expected, found = there.run(None), streamed.run(None)
    assert found["train"]["losses"] == expected["train"]["losses"]
    assert found["evaluation"] == expected["evaluation"]
    assert found["train"]["rows"] == 18
    ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in ("streamed", "there"))
    assert [weight for weight in theirs if not torch.equal(ours[weight], theirs[weight])] == []


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["blocks", "documents", "classification", "translation"])
def test_a_killed_run_goes_on_in_the_round_that_it_was_in(name, cases, tmp_path):
    reading = {"streaming": True, "shuffle_rows": 5, "chunk_rows": 9, "max_eval_rows": 6, "max_train_rows": 18}
    training = {
        **TRAINING,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 4,
        "gradient_accumulation_steps": 2,
    }
    whole = settings(cases[name], tmp_path / "whole", reading, training=training)
    expected = prepare_finetune(whole).run(None)
    config = dataclasses.replace(whole, output_dir=str(tmp_path / "killed"))
    killed = prepare_finetune(config)
    killed.trainer.add_callback(KillAt(9))
    with pytest.raises(KeyboardInterrupt):
        killed.run(None)
    found = prepare_finetune(config, resume=True).run(None)
    assert found["train"]["resumed_from"].endswith("checkpoint-8")
    assert found["train"]["losses"] == expected["train"]["losses"]
    assert found["evaluation"] == expected["evaluation"]
    assert found["train"]["rows"] == 12 * 2 * 3
    ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in ("killed", "whole"))
    assert [weight for weight in theirs if not torch.equal(ours[weight], theirs[weight])] == []


def test_a_run_whose_last_checkpoint_is_its_end_trains_no_more(cases, tmp_path):
    training = {**TRAINING, "save_strategy": "steps", "save_steps": 6}
    config = settings(
        cases["classification"], tmp_path / "out", {"streaming": True, "max_eval_rows": 20}, training=training
    )
    expected = prepare_finetune(config).run(None)
    (tmp_path / "out/metrics.json").unlink()
    found = prepare_finetune(config, resume=True).run(None)
    assert found["train"]["steps"] == 6
    assert found["train"]["losses"] == expected["train"]["losses"]
    assert found["evaluation"] == expected["evaluation"]


def test_what_a_dry_run_says_of_a_stream(cases, tmp_path):
    reading = {"streaming": True, "max_eval_rows": 6, "chunk_rows": 20}
    config = settings(
        cases["translation"], tmp_path / "out", reading, options={**PAIRS["options"], "max_target_length": 8}
    )
    found = dry_run(config)
    rows = read(cases["translation"][1])[6:26]
    reach = sum(len(row["target"].split()) >= 7 for row in rows)  # and the end token
    assert (found["rows"], found["seen"], found["steps"]) == (None, 20, 6)
    assert found["cut"]["max_target_length"] == reach > 0
    line = told(found, config).splitlines()[0]
    assert line.startswith("rows         a stream, whose number nobody knows (a row is a pair of texts); ")
    assert f"{reach} of the first 20 reach max_target_length, which longer ones are cut to" in line


def test_rows_that_are_cut_are_told_of_the_first_alone(cases, tmp_path, transformers_log):
    reading = {"streaming": True, "max_eval_rows": 6, "chunk_rows": 20}
    run = prepare_finetune(settings(cases["classification"], tmp_path, reading, max_length=8))
    reach = sum(len(ids) == 8 for ids in run.examples["input_ids"])
    said = f"{reach} of the first 20 rows to train on reach max_length=8, which longer ones are cut to"
    assert said in [record.getMessage() for record in transformers_log.records]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"num_train_epochs": 1}}, r"training\.max_steps has to say how many steps to train; got None"),
        ({"training": {"max_steps": -1}}, r"training\.max_steps has to say .*; got -1, allowed: at least 1"),
    ],
)
def test_how_long_has_to_be_said(cases, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(cases["blocks"], tmp_path, {"streaming": True}, **changes)


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_no_process_reads_for_the_others(cases, tmp_path, name):
    usual = settings(cases["blocks"], tmp_path, {"streaming": True})
    assert training_arguments(usual, usual.trained()).accelerator_config.dispatch_batches is False
    training = {**TRAINING, "accelerator_config": {name: True}}
    with pytest.raises(ValueError, match=rf"accelerator_config\.{name}=true; allowed with data\.streaming: false"):
        prepare_finetune(settings(cases["blocks"], tmp_path, {"streaming": True}, training=training))


def test_no_processes_read_the_same(cases, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    config = settings(cases["blocks"], tmp_path, {"streaming": True})
    with pytest.raises(ValueError, match=r"a parallelism config.*allowed with data\.streaming: data parallelism alone"):
        training_arguments(config, config.trained())


@pytest.mark.parametrize(("workers", "shares"), [(0, 2), (3, 6)])
def test_each_process_and_each_worker_has_a_share(cases, workers, shares):
    model, rows, _ = cases["classification"]
    train, _ = load_data(DataConfig(source=rows, streaming=True, max_eval_rows=6), ("text", "label"))
    cls = trained_task("classification")
    loaded = load(model, kind=cls.model, labels=["minus", "none", "plus"])
    arguments = SimpleNamespace(world_size=2, dataloader_num_workers=workers)
    parts = (cls(), train, loaded.processing, loaded.model, arguments)
    assert endless(*parts, first=None, seed=0).num_shards == shares


@pytest.mark.slow
def test_two_processes_with_a_worker_each_do_the_same_steps_as_one(cases, tmp_path):
    model, rows, its = cases["documents"]
    reading = {"streaming": True, "shuffle_rows": 0, "chunk_rows": 12, "max_eval_rows": 12}
    training = {**TRAINING, "per_device_train_batch_size": 4}
    one = prepare_finetune(settings((model, rows, its), tmp_path / "one", reading, training=training)).run(None)
    tree = {"model": model, "output_dir": str(tmp_path / "two"), "attention": LOCAL, "tune": "full", **its}
    training |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**tree, "data": {"source": rows, **reading}, "training": training}))
    for ran in launched("-m", "attn_plugins", "finetune", "--config", str(config)):
        assert ran.returncode == 0, ran.stderr
    two = json.loads((tmp_path / "two/metrics.json").read_text())
    assert (two["train"]["processes"], one["train"]["rows"], two["train"]["rows"]) == (2, 24, 24)
    for first, second in zip(one["train"]["losses"], two["train"]["losses"], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def test_what_is_wrong_is_said_before_a_model_is_loaded(cases, labelled, tmp_path):
    _, text, its = cases["blocks"]
    missing = ("no/such-model", text, its)
    with pytest.raises(ValueError, match=r"has no column 'title' \(text_column\); it has: text"):
        prepare_finetune(settings(missing, tmp_path, {"streaming": True, "text_column": "title"}))
    with pytest.raises(
        ValueError, match="has no rows after the first 1,000, which are held out; allowed: a smaller max_eval"
    ):
        prepare_finetune(settings(missing, tmp_path, {"streaming": True}))
    rows = read(labelled)
    alike = write_rows(tmp_path / "alike.jsonl", sorted(rows, key=lambda row: row["label"]))
    reading = {"streaming": True, "chunk_rows": 10, "max_eval_rows": 3}
    with pytest.raises(
        ValueError, match=r"all of one class, 'minus'.*of a stream, the first chunk_rows=10 tell the classes"
    ):
        prepare_finetune(settings(("no/such-model", alike, LABELS), tmp_path, reading))


def test_a_row_that_breaks_a_run_is_one_line(bert, tmp_path):
    chance = random.Random(0)
    rows = [{"text": chance.choice(WORDS), "label": "ab"[at % 2]} for at in range(40)]
    rows[30]["label"] = "c"
    source = write_rows(tmp_path / "rows.jsonl", rows)
    words = [
        "finetune",
        "-m",
        bert,
        "-d",
        source,
        "-o",
        str(tmp_path / "out"),
        "-a",
        "local",
        "--task",
        "classification",
    ]
    reading = {"streaming": "true", "chunk_rows": 8, "shuffle_rows": 0, "max_eval_rows": 4}
    for setting in [f"data.{name}={value}" for name, value in reading.items()]:
        words += ["-s", setting]
    for name, value in {**TRAINING, "max_steps": 20}.items():
        words += ["-s", f"training.{name}={json.dumps(value)}"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2
    said = "rows 25 to 32 as they were read: the model has no class for the labels ['c']; its classes are ['a', 'b']"
    assert done.output.splitlines()[-1] == f"error: {source}, {said}"


@pytest.mark.parametrize("task", [None, "translation"])
def test_a_transfer_takes_as_many_rows_of_a_stream_as_it_uses(llama, text, pairs, tmp_path, task):
    attention = {"type": "linear", "feature_map": "hedgehog"}
    tree = {"model": llama, "output_dir": str(tmp_path / "out"), "attention": attention, "steps": 3, "batch_size": 2}
    tree |= {"held_out": 2, "length": 16, "task": task}
    if task is not None:
        tree |= {"options": PAIRS["options"], "batch_size": 4}
    reading = {"source": pairs if task else text, "streaming": True, "chunk_rows": 4, "max_eval_rows": 10}
    run = prepare_transfer(build(TransferConfig, {**tree, "data": reading}))
    assert [len(batch["input_ids"]) for batch in run.batches] == [tree["batch_size"]] * 3
    report, metrics = run.run(progress=False)
    assert report.after < report.before
    assert metrics["data"]["streaming"] is True
