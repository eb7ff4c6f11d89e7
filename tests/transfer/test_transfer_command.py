"""`attn-plugins transfer`: from a folder to a folder, resumed, and every error in one line."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from typer.testing import CliRunner

from attn_plugins import cli, describe_attention
from attn_plugins.core.options import build
from attn_plugins.transfer.config import TransferConfig
from attn_plugins.transfer.run import batches_of, prepare_transfer

ATTENTION = {"type": "linear", "feature_map": "hedgehog"}


def call(*arguments):
    return CliRunner().invoke(cli.app, ["transfer", *map(str, arguments)])


def arguments(folder, rows, out):
    short = ["--steps", 4, "--length", 16, "--batch-size", 2]
    return ["--model", folder, "--attn", json.dumps(ATTENTION), "--data", rows, *short, "--output-dir", out]


def test_what_is_written(llama, text, tmp_path):
    ran = call(*arguments(llama, text, tmp_path / "out"), "--set", "held_out=2")
    assert ran.exit_code == 0, ran.output
    assert "model.layers.1.self_attn  linear" in ran.output
    assert "at 32 tokens: " in ran.output
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [layer["path"] for layer in report["layers"]] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert (report["measured_on"], report["steps"], report["tokens"]) == ("held-out batches", 4, 4 * 2 * 16)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["stage"], metrics["tune"], metrics["loss"]) == ("transfer", "new", "output")
    assert metrics["errors"]["after"] == report["after"]
    assert metrics["train"]["rows"] == 8
    assert (tmp_path / "out/errors.png").stat().st_size > 1000
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {row.plugin for row in describe_attention(model)} == {"linear"}
    own, new = load_file(f"{llama}/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(new[name], weight) for name, weight in own.items())
    assert any(new[name].abs().max() > 0 for name in new if "attn_plugin" in name)
    card = (tmp_path / "out/README.md").read_text()
    assert "transfer (output), new weights alone: 4 steps, 8 rows of" in card
    assert f"{report['before']:.3f} before, {report['after']:.3f} after, " in card
    assert "## Attention" in card


def settings(folder, rows, out, **changes):
    tree = {"model": folder, "data": {"source": rows}, "output_dir": str(out), "attention": ATTENTION}
    return build(TransferConfig, {**tree, "steps": 4, "length": 16, "held_out": 2, **changes})


def test_a_run_goes_on_and_one_that_has_ended_does_not(llama, text, tmp_path):
    out = tmp_path / "out"
    _, metrics = prepare_transfer(settings(llama, text, out)).run(progress=False)
    with pytest.raises(ValueError, match="holds an earlier run; go on with it with --resume"):
        prepare_transfer(settings(llama, text, out))
    with pytest.raises(ValueError, match="holds a run with other settings: length; a run goes on with the settings"):
        prepare_transfer(settings(llama, text, out, length=8), resume=True)
    ran = call(*arguments(llama, text, out), "--set", "held_out=2", "--set", "batch_size=1", "--resume")
    assert "has ended with these settings; nothing was trained" in ran.output
    weights = load_file(out / "model.safetensors")
    for path in ("metrics.json", "model.safetensors"):
        (out / path).unlink()
    _, again = prepare_transfer(settings(llama, text, out), resume=True).run(progress=False)
    assert again["errors"] == metrics["errors"]
    assert again["train"]["resumed_from"] == str(out / "checkpoint-4")
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_an_encoder_learns_on_texts_between_their_special_tokens(bert, text, tmp_path):
    run = prepare_transfer(settings(bert, text, tmp_path / "out"))
    ids = torch.cat([batch["input_ids"] for batch in run.batches])
    assert ids.shape == (4, 16)
    assert set(ids[:, 0].tolist()) == {1}
    assert set(ids[:, -1].tolist()) == {2}
    run.run(progress=False)
    assert type(tf.AutoModel.from_pretrained(tmp_path / "out")).__name__ == "BertModel"


def test_the_order_of_texts_is_drawn_from_the_seed(llama, text, tmp_path):
    runs = [prepare_transfer(settings(llama, text, tmp_path / str(seed), seed=seed)) for seed in (0, 0, 1)]
    one, same, other = (torch.cat([batch["input_ids"] for batch in run.batches]) for run in runs)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert all(len(run.twice) == 1 for run in runs)
    model = tf.AutoModelForCausalLM.from_pretrained(llama)
    (batch,) = batches_of(model, tf.AutoTokenizer.from_pretrained(llama), _rows(text), 16, 10**6, 5)
    assert len(batch["input_ids"]) > 20  # as many as there are, where a batch is to have more


def _rows(text):
    import datasets

    return datasets.Dataset.from_list([json.loads(line) for line in Path(text).read_text().splitlines()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--attn", "local"], r"nothing could learn: what is in the slots \(local\) has no weights of its own"),
        (["--attn", "null"], "attention is null, the model's own, which has nothing to learn"),
        (["--set", "attention=as-saved"], "no attention module of this model is swapped"),
        (["--length", "4096"], "length=4096; allowed: at most 128, the model's max_position_embeddings"),
        (["--length", "1"], "length=1; allowed: at least 2"),
        (["--steps", "0"], "steps=0; allowed: at least 1"),
        (["--loss", "mse"], "loss='mse'; allowed: "),
        (["--body-dtype", "int8"], "body_dtype='int8' is of type str; allowed: 'bfloat16', 'float16' or null"),
        (["--data", "nowhere.jsonl"], "no such file or folder: nowhere.jsonl"),
        (["--model", "./nowhere"], "no such model folder: './nowhere'"),
        (["--set", "training.fp16=true"], "training.fp16 is not for a transfer; use body_dtype"),
        (["--set", "training.optim=nothing"], "training"),
        (["--set", "stps=3"], "stps"),
    ],
)
def test_errors_are_one_line(llama, text, tmp_path, changes, message):
    ran = call(*arguments(llama, text, tmp_path / "out"), *changes)
    assert ran.exit_code == 2
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_sharding_by_accelerate_is_refused(llama, text, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate was asked for FSDP, which would shard the new weights"):
        prepare_transfer(settings(llama, text, tmp_path / "out"))


def test_a_task_makes_the_batches(bert, labelled, tmp_path):
    changes = {"task": "classification", "options": {"max_length": 6}, "batch_size": 3}
    run = prepare_transfer(settings(bert, labelled, tmp_path / "one", **changes))
    assert len(run.batches) == 4
    assert len(run.held_out) == 2
    for batch in run.batches:
        assert batch["input_ids"].shape[0] == 3
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert 4 <= batch["input_ids"].shape[1] <= 6
    assert run.loaded.model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}, "as it was: no head is trained"
    words = ["--model", bert, "--attn", json.dumps(ATTENTION), "--data", labelled, "--steps", 2]
    ran = call(*words, "--task", "classification", "--output-dir", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    new = load_file(tmp_path / "out/model.safetensors")
    assert not any("classifier" in name for name in new)
    assert any(new[name].abs().max() > 0 for name in new if "attn_plugin" in name)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["train"]["row"], metrics["train"]["rows"]) == ("text", 2)


def test_a_task_that_does_not_fit_is_refused(llama, text, tmp_path):
    with pytest.raises(ValueError, match=r"task='classificaton' \(did you mean classification\?\); allowed: "):
        settings(llama, text, tmp_path, task="classificaton")
    with pytest.raises(ValueError, match=r"unknown key 'maxlength' in options \(did you mean max_length\?\)"):
        settings(llama, text, tmp_path, task="classification", options={"maxlength": 3})
    with pytest.raises(ValueError, match=r"options \['length'\] go with a task, and task is null"):
        settings(llama, text, tmp_path, options={"length": 3})
    with pytest.raises(ValueError, match=r"has no column 'label' \(label_column\)"):
        prepare_transfer(settings("/no/model", text, tmp_path / "out", task="classification"))
