"""Ctrl-C and SIGTERM: the run that they end leaves a whole checkpoint, and goes on from it to the same numbers."""

import json
import os
import re
import shlex
import signal
import socket

import programs
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

from attn_plugins.cli.stop import command_again, stoppable
from attn_plugins.core.options import build
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.launch import _wait
from attn_plugins.training.resume import last_whole_checkpoint
from attn_plugins.training.search import SearchConfig, search
from attn_plugins.training.stop import SAME, StopOnSignal, Stopped

pytestmark = pytest.mark.usefixtures("one_thread")

SIGNALLED = """
import os, signal, sys
import transformers
from attn_plugins.cli import main

numbers, step, rank = eval(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)

class Signal(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step and os.environ.get("RANK", "0") == rank:
            for number in numbers:
                os.kill(os.getpid(), number)

transformers.trainer.DEFAULT_CALLBACKS.append(Signal)
sys.argv[0] = "attn-plugins"
main()
"""
"""The command line, in a process that is sent signals while it works on a step (all alike where rank is "0")."""

TRAINING = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def tree(llama, text, tmp_path):
    """Settings of a fine-tune of two epochs."""
    return {
        "model": llama,
        "data": {"source": text},
        "attention": {"type": "linear", "feature_map": "hedgehog"},
        "tune": "full",
        "block_size": 16,
        "training": TRAINING,
        "evaluation": {"length": 16, "max_tokens": 96},
        "recall": False,
    }


def config_file(folder, tree):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)


def signalled(config, out, numbers, step, rank="0", env=None):
    words = ["finetune", "--config", config, "-o", str(out)]
    return programs.start("-c", SIGNALLED, [int(number) for number in numbers], step, rank, *words, env=env)


def finetuned(tree, out, resume=False):
    run = prepare_finetune(build(FinetuneConfig, {**tree, "output_dir": str(out)}), resume=resume)
    metrics = run.run(None)
    evaluated = [entry["eval_loss"] for entry in run.trainer.state.log_history if "eval_loss" in entry]
    return metrics["evaluation"]["after"], metrics["train"]["losses"], evaluated


def said_to_go_on(done, out, how, checkpoint):
    line = re.search(r"^stopped by.*$", done.stderr, re.M)
    assert line, done.stderr
    assert line[0].startswith(
        f"stopped by {how}; {out / checkpoint} is whole. Go on with: attn-plugins finetune --config"
    )
    assert line[0].endswith(f"-o {out} --resume")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "how", "status", "step"),
    [(signal.SIGTERM, "SIGTERM", 143, 3), (signal.SIGINT, "Ctrl-C", 130, "the last of its epoch")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signalled_run_leaves_a_whole_checkpoint_and_reaches_the_same_numbers(
    tree, tmp_path, number, how, status, step
):
    tree["training"] = {**TRAINING, "eval_strategy": "epoch"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    never_stopped = finetuned(tree, whole)
    steps = len(never_stopped[1])
    at = steps // 2 if isinstance(step, str) else step
    # Twice at once: from the terminal, and from what started it.
    done = signalled(config_file(tmp_path, tree), out, [number, number], at - 1).wait()
    assert done.returncode == status, done.stderr
    said_to_go_on(done, out, how, f"checkpoint-{at}")
    assert last_whole_checkpoint(out) == str(out / f"checkpoint-{at}")
    assert not (out / "metrics.json").exists()
    assert finetuned(tree, out, resume=True) == never_stopped
    assert len(never_stopped[2]) == 2
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_transfer_stops_too(llama, text, tmp_path):
    out = tmp_path / "out"
    words = ["transfer", "-m", llama, "-d", text, "-o", str(out), "--steps", "6", "--length", "16"]
    words += ["-a", "{type: linear, feature_map: hedgehog}", "-s", "training.save_steps=100"]
    done = programs.run("-c", SIGNALLED, [int(signal.SIGTERM)], 2, "0", *words)
    assert done.returncode == 143, done.stderr
    assert f"stopped by SIGTERM; {out / 'checkpoint-3'} is whole. Go on with: attn-plugins transfer -m" in done.stderr


def said_the_same_command(done, run, words):
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    line = re.search(r"^stopped by.*$", done.stderr, re.M)[0]
    assert line == f"stopped by SIGTERM; {run / 'checkpoint-3'} is whole. Go on with: attn-plugins {shlex.join(words)}"


@pytest.mark.filterwarnings("ignore:.*experimental")  # optuna's file storage calls itself that
def test_a_search_stops_in_a_trial_and_tries_what_it_would_have_tried(tree, tmp_path):
    asked = {"space": {"training.learning_rate": {"log": [1e-3, 1e-1]}}, "trials": 2}
    out = tmp_path / "out"
    words = ["search", "--config", config_file(tmp_path, {**tree, "search": asked}), "-o", str(out)]
    done = programs.run("-c", SIGNALLED, [int(signal.SIGTERM)], 2, "0", *words)
    (trial,) = out.glob("trial-*")
    said_the_same_command(done, trial, words)
    found, whole = (
        search({**tree, "output_dir": str(folder)}, build(SearchConfig, asked)) for folder in (out, tmp_path / "whole")
    )
    tried = [[(one["settings"], one["value"]) for one in runs] for runs in (found, whole)]
    assert tried[0] == tried[1]
    assert len({value for _, value in tried[0]}) == 2
    metrics = json.loads((trial / "metrics.json").read_text())
    assert metrics["train"]["resumed_from"] == str(trial / "checkpoint-3")


def test_a_recipe_stops_in_a_stage(tree, tmp_path):
    out, stage = tmp_path / "out", {name: tree.pop(name) for name in ("tune", "block_size", "training", "recall")}
    words = ["recipe", "--config", config_file(tmp_path, {**tree, "stages": [{"finetune": stage}]}), "-o", str(out)]
    done = programs.run("-c", SIGNALLED, [int(signal.SIGTERM)], 2, "0", *words)
    said_the_same_command(done, out / "1-finetune", words)


def test_a_comparison_stops_in_a_fine_tune(tree, tmp_path):
    out, own = tmp_path / "out", {name: tree[name] for name in ("tune", "block_size", "training")}
    shared = {"data": tree["data"], "evaluation": tree["evaluation"], "untrained": False}
    compared = {"models": {"tiny": tree["model"]}, "attentions": {"dense": None}, "finetune": own, **shared}
    words = ["compare", "--config", config_file(tmp_path, compared), "-o", str(out)]
    done = programs.run("-c", SIGNALLED, [int(signal.SIGTERM)], 2, "0", *words, "--fresh")
    (run,) = (out / "finetuned").iterdir()
    said_the_same_command(done, run, words)
    assert not (out / "results.jsonl").read_text(), "no cell has ended"


def test_what_is_kept_is_said_where_there_is_no_checkpoint(tmp_path, capsys):
    with pytest.raises(typer.Exit) as ended, stoppable(str(tmp_path), again=(), kept="two cells are in a file"):
        raise Stopped(signal.SIGINT)
    assert ended.value.exit_code == 130
    assert "stopped by Ctrl-C; two cells are in a file. Go on with: " in capsys.readouterr().err


def test_a_second_ctrl_c_ends_at_once():
    stop, ended, outside = StopOnSignal(), [], signal.getsignal(signal.SIGINT)
    with stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same one, from what started this
        stop._came -= 2 * SAME
        signal.raise_signal(signal.SIGTERM)  # asks for what is being done already
        before = signal.signal(signal.SIGINT, lambda *_: ended.append(True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("attn_plugins.training.stop.os.kill", lambda *args: ended.append(args))
            before(signal.SIGINT, None)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert ended == [(os.getpid(), signal.SIGINT)]
    assert stop.number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is outside


def test_processes_stop_at_the_same_step(tree, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    told |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    out, config = tmp_path / "out", config_file(tmp_path, tree)
    both = [
        signalled(config, out, [signal.SIGTERM], 2, "1", {**told, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    ended = [program.wait() for program in both]
    for done in ended:
        assert done.returncode == 143, done.stderr
        assert "Traceback" not in done.stderr
    assert ["stopped by SIGTERM" in done.stderr for done in ended] == [True, False], "one says so for all"
    assert last_whole_checkpoint(out) == str(out / "checkpoint-4")


class Child(list):
    """A process that notes the signals that it gets, and ends with the first."""

    def poll(self):
        return 143 if self else None

    def wait(self):
        return 143

    send_signal = terminate = lambda self, number=None: self.append(number)


def test_who_starts_processes_passes_signals_on_and_ends_as_they_do(monkeypatch):
    children = [Child(), Child()]
    monkeypatch.setattr("attn_plugins.training.launch.time.sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    assert _wait(children) == 143
    assert [child[0] for child in children] == [signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Parent:
    def __init__(self, *line):
        self.line = list(line)

    def cmdline(self):
        return self.line


@pytest.mark.parametrize(
    ("parents", "command"),
    [
        ([], "attn-plugins finetune -c 'my file.yaml' --resume"),
        ([["bash", "run.sh"]], "attn-plugins finetune -c 'my file.yaml' --resume"),
        (
            [["accelerate", "launch", "-m", "attn_plugins", "finetune", "-c", "my file.yaml"], ["bash"]],
            "accelerate launch -m attn_plugins finetune -c 'my file.yaml' --resume",
        ),
    ],
    ids=["alone", "script", "launched"],
)
def test_the_command_that_goes_on_is_the_one_that_began(monkeypatch, parents, command):
    monkeypatch.setattr("sys.argv", ["/bin/attn-plugins", "finetune", "-c", "my file.yaml"])
    monkeypatch.setattr("psutil.Process.parents", lambda self: [Parent(*line) for line in parents])
    assert command_again() == command
