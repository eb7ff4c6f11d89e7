"""A dry run: what it tells is so, and nothing is left of it."""

import pytest
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.core.options import build
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.dry_run import dry_run
from attn_plugins.training.finetune import prepare_finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def tree(model, rows, out, **changes):
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "disable_tqdm": True, "eval_strategy": "epoch"}
    found = {"model": model, "data": {"source": rows}, "output_dir": str(out), "training": training, **changes}
    return found


def test_it_tells_what_the_run_would_be_and_leaves_nothing(bert, labelled, tmp_path):
    changes = {"task": "classification", "max_length": 8, "attention": {"type": "local"}, "tune": "full"}
    config = build(FinetuneConfig, tree(bert, labelled, tmp_path / "out", **changes, early_stopping={"patience": 2}))
    found = dry_run(config)
    assert not list(tmp_path.iterdir())
    run = prepare_finetune(config, quiet=True)
    rows = run.trainer.train_dataset
    assert found["rows"] == len(rows) == 108
    assert found["cut"] == {"max_length": sum(len(ids) == 8 for ids in rows["input_ids"])}
    assert 0 < found["cut"]["max_length"] < len(rows)
    metrics = run.run(None)
    assert found["steps"] == metrics["train"]["steps"]
    assert (found["parameters"], found["attention"]) == (metrics["parameters"], metrics["attention"]["modules"])
    assert found["batches"] == {"accuracy": len(run.measurements[0].batches)}
    assert 0 <= found["measured"]["accuracy"] <= 1
    assert found["seconds"] > 0
    assert 0.01 < found["gigabytes"] < 100


def test_the_command_prints_it_and_writes_nothing(llama, text, tmp_path):
    words = ["finetune", "-m", llama, "-d", text, "-o", str(tmp_path / "out"), "-a", "local", "--dry-run"]
    for setting in ("block_size=16", "training.max_steps=7", "training.disable_tqdm=true", "evaluation.length=16"):
        words += ["-s", setting]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines()[-7:-1])
    assert "to train on (a row is a block of 16 tokens)" in lines["rows"]
    assert lines["steps"].strip().startswith("7; the one that was run: ")
    assert "(lora)" in lines["trained"]
    assert lines["attention"].strip() == "local in 2 modules"
    assert done.stdout.endswith("nothing was written\n")
    assert not (tmp_path / "out").exists()

    wrong = CliRunner().invoke(cli.app, [*words, "-s", "training.eval_strategy=sometimes"])
    assert wrong.exit_code == 2
    assert "error: training: sometimes is not a valid IntervalStrategy" in wrong.output


def test_it_refuses_what_the_run_would(llama, text, tmp_path):
    with pytest.raises(ValueError, match="is the model's own folder; allowed: another"):
        dry_run(build(FinetuneConfig, tree(llama, text, llama)))
