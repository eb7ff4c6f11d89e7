"""Fine-tuning: what trains, what is written, that it comes back, that a killed run goes on where it was."""

import json
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import programs
import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from conftest import KillAt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import attn_plugins as ap
from attn_plugins.core.options import build
from attn_plugins.training.config import EvaluateConfig, FinetuneConfig
from attn_plugins.training.evaluate import prepare_evaluation
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import skeleton
from attn_plugins.training.resume import finished, last_whole_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = {"type": "linear", "feature_map": "hedgehog"}
LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 1}
SMALL = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
}


def settings(folder, rows, out, **changes):
    tree = {
        "model": folder,
        "data": {"source": rows},
        "output_dir": str(out),
        "attention": LINEAR,
        "block_size": 16,
        "training": SMALL,
        "evaluation": {"length": 16, "max_tokens": 96},
    }
    if changes.get("task") == "classification":
        tree["evaluation"] = {"batch_size": 4}
    return build(FinetuneConfig, {**tree, **changes})


def close(one, other):
    """Whether two results of a task agree to rounding."""
    parts = [[part["perplexity"] for part in figures.pop("by_position", [])] for figures in (dict(one), dict(other))]
    flat = [{name: value for name, value in figures.items() if name != "by_position"} for figures in (one, other)]
    return flat[0] == pytest.approx(flat[1], rel=1e-5) and parts[0] == pytest.approx(parts[1], rel=1e-5)


def moved(model, reference):
    """Names of a saved model's weights that differ from the reference's, or are not there."""
    return {name for name, weight in model.items() if name not in reference or not torch.equal(weight, reference[name])}


def evaluated(model, data, **changes):
    tree = {"model": str(model), "data": {"source": data}, "evaluation": {"length": 16, "max_tokens": 96}}
    return prepare_evaluation(build(EvaluateConfig, {**tree, **changes})).run()


@pytest.mark.parametrize("tune", ["lora", "full", "new"])
def test_what_trains_is_what_was_asked_for(llama, text, tmp_path, tune):
    lora = {"lora": {"r": 2, "target_modules": ["q_proj"]}} if tune == "lora" else {}
    metrics = prepare_finetune(settings(llama, text, tmp_path / "out", tune=tune, evaluate_before=True, **lora)).run(
        None
    )
    before = load_file(Path(llama) / "model.safetensors")
    if tune == "lora":
        saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert all("lora_" in name or "attn_plugin" in name for name in saved)
        assert any("q_proj.lora_B" in name and weight.any() for name, weight in saved.items())
        assert not any("attn_plugin" in name and "lora_" in name for name in saved), "a slot trains whole"
        fresh = {n: w for n, w in saved.items() if "attn_plugin" in n}
    else:
        saved = load_file(tmp_path / "out" / "model.safetensors")
        changed = moved(saved, before)
        fresh = {n: w for n, w in saved.items() if "attn_plugin" in n}
        assert changed == set(saved) if tune == "full" else changed == set(fresh)
    start = AutoModelForCausalLM.from_pretrained(llama, attn_plugin=LINEAR).state_dict()
    assert len(fresh) == 4
    for name, weight in fresh.items():
        assert not torch.equal(weight, start[name.removeprefix("base_model.model.")])
    counts = metrics["parameters"]
    assert counts["attention"] == sum(weight.numel() for weight in fresh.values())
    assert (
        counts["trained"] == sum(weight.numel() for weight in saved.values()) - (counts["trained"] * 0)
        if tune != "new"
        else counts["attention"]
    )
    losses = [entry["loss"] for entry in metrics["train"]["losses"]]
    assert len(losses) == 4
    assert metrics["evaluation"]["after"]["perplexity"] < metrics["evaluation"]["before"]["perplexity"]


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("attention", [LINEAR, LOCAL, None], ids=["linear", "local", "own"])
def test_what_was_written_comes_back_and_measures_the_same(llama, text, tmp_path, tune, attention):
    out = tmp_path / "out"
    metrics = prepare_finetune(settings(llama, text, out, tune=tune, attention=attention)).run(None)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    again = evaluated(out, text)
    assert close(again["result"], metrics["evaluation"]["after"])
    assert again["attention"] == metrics["attention"]
    assert again["new_weights"] == 0
    if attention is not None:
        other = evaluated(out, text, attention=None)  # and without its attention it is another model
        assert other["attention"]["modules"] == {"own (sdpa)": 2}
        assert other["result"]["loss"] != pytest.approx(metrics["evaluation"]["after"]["loss"], rel=1e-6)


def test_the_card_names_attention_data_and_results(llama, text, tmp_path):
    metrics = prepare_finetune(settings(llama, text, tmp_path / "out", evaluate_before=True)).run(None)
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == llama
    assert {"attn-plugins", "attention-linear", "lora"} <= set(front["tags"])
    assert "linear in 2" in card
    assert "feature_map: hedgehog" in card
    assert text in card
    for stage in ("before", "after"):
        assert f"{metrics['evaluation'][stage]['perplexity']:.4g}" in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
    scope = {}
    exec(code, scope)
    assert [row.plugin for row in ap.describe_attention(scope["model"])] == ["linear", "linear"]
    assert [row.plugin for row in ap.describe_attention(skeleton(str(tmp_path / "out")))] == ["linear", "linear"]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_what_is_pushed_is_all_of_it(llama, text, tmp_path, monkeypatch, tune):
    """The card of the fine-tune and its figures, not the card that Trainer would write."""
    sent = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return types.SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path, **kwargs):
            sent.append({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: Hub())
    training = {**SMALL, "push_to_hub": True, "hub_model_id": "someone/something", "hub_strategy": "end"}
    prepare_finetune(settings(llama, text, tmp_path / "out", tune=tune, training=training)).run(None)
    (pushed,) = sent
    card = pushed["README.md"].decode()
    assert f"# {llama} with linear attention" in card
    assert card.count("## Attention") == card.count("## Results") == 1
    assert {"config.json", "metrics.json"} <= set(pushed)
    assert yaml.safe_load(card.split("---")[1])["tags"][:2] == ["attn-plugins", "attention-linear"]
    assert (tmp_path / "out" / "README.md").read_text().count("## Attention") == 1


def test_classification_learns_its_labels(bert, labelled, tmp_path):
    training = {**SMALL, "max_steps": 120, "per_device_train_batch_size": 16, "learning_rate": 0.01}
    attention = {"type": "local", "window_size": 8}
    changes = {"task": "classification", "tune": "full", "attention": attention, "training": training, "max_length": 32}
    metrics = prepare_finetune(settings(bert, labelled, tmp_path / "out", evaluate_before=True, **changes)).run(None)
    before, after = metrics["evaluation"]["before"], metrics["evaluation"]["after"]
    assert after["accuracy"] == 1.0 > before["accuracy"]
    assert after["majority"] < 0.8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "minus", "1": "none", "2": "plus"}
    again = evaluated(tmp_path / "out", labelled, evaluation={"task": "accuracy"})
    assert again["result"]["accuracy"] == 1.0
    assert again["attention"]["modules"] == {"local": 2}


def test_a_classifiers_adapter_brings_its_head_and_labels(bert, labelled, tmp_path):
    changes = {"task": "classification", "attention": {"type": "local"}, "lora": {"target_modules": ["query"]}}
    metrics = prepare_finetune(settings(bert, labelled, tmp_path / "out", **changes)).run(None)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("classifier" in name for name in saved)
    assert any("pooler" not in name for name in saved)
    again = evaluated(tmp_path / "out", labelled, evaluation={"task": "accuracy"})
    assert close(again["result"], metrics["evaluation"]["after"])


def test_a_model_without_a_head_is_not_evaluated(bert, labelled):
    with pytest.raises(
        ValueError, match=r"holds no weights for classifier\.bias, classifier\.weight, so accuracy would say nothing"
    ):
        evaluated(bert, labelled, evaluation={"task": "accuracy"})


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(llama, text, tmp_path, tune):
    training = {**SMALL, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = prepare_finetune(settings(llama, text, tmp_path / "whole", tune=tune, training=training)).run(None)
    killed = prepare_finetune(settings(llama, text, tmp_path / "killed", tune=tune, training=training))
    killed.trainer.add_callback(KillAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.run(None)
    assert last_whole_checkpoint(tmp_path / "killed") == str(tmp_path / "killed" / "checkpoint-4")
    cut_off = shutil.copytree(tmp_path / "killed" / "checkpoint-4", tmp_path / "killed" / "checkpoint-5")
    text_of_state = (cut_off / "trainer_state.json").read_text()
    (cut_off / "trainer_state.json").write_text(text_of_state[: len(text_of_state) // 2])

    with pytest.raises(ValueError, match=r"killed holds an earlier run; go on with it with --resume, or name another"):
        prepare_finetune(settings(llama, text, tmp_path / "killed", tune=tune, training=training))
    resumed = prepare_finetune(settings(llama, text, tmp_path / "killed", tune=tune, training=training), resume=True)
    metrics = resumed.run(None)
    assert metrics["train"]["resumed_from"].endswith("checkpoint-4")
    assert metrics["evaluation"]["after"] == whole["evaluation"]["after"]
    assert [entry["loss"] for entry in metrics["train"]["losses"]] == [
        entry["loss"] for entry in whole["train"]["losses"]
    ]
    name = "adapter_model.safetensors" if tune == "lora" else "model.safetensors"
    assert not moved(load_file(tmp_path / "killed" / name), load_file(tmp_path / "whole" / name))


def written(out):
    """What a run has left, as (name, time, bytes)."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "length",
    [{"max_steps": 4}, {"num_train_epochs": 0.5}, {"num_train_epochs": 2, "lr_scheduler_type": "polynomial"}],
    ids=["steps", "half an epoch", "epochs"],
)
def test_a_run_that_has_ended_is_not_trained_on(llama, text, tmp_path, length):
    out = tmp_path / "out"
    saving = {name: value for name, value in SMALL.items() if name != "max_steps"} | {"save_strategy": "epoch"}
    if "max_steps" in length:
        saving |= {"save_strategy": "steps", "save_steps": 2}
    config = settings(llama, text, out, tune="full", training={**saving, **length})
    whole = prepare_finetune(config).run(None)
    steps, weights = whole["train"]["steps"], load_file(out / "model.safetensors")
    assert finished(config) == whole
    assert finished(settings(llama, text, out, tune="full", training={**saving, **length}, block_size=8)) is None

    # Killed after its last checkpoint, and before what comes then: nothing is left to train, the rest is done.
    (out / "metrics.json").unlink()
    (out / "model.safetensors").unlink()
    assert last_whole_checkpoint(out) == str(out / f"checkpoint-{steps}")
    again = prepare_finetune(config, resume=True).run(None)
    assert again["train"]["steps"] == steps
    assert not moved(load_file(out / "model.safetensors"), weights)
    assert again["evaluation"] == whole["evaluation"]
    assert again["train"]["losses"] == whole["train"]["losses"]
    assert again["train"]["loss"] == pytest.approx(whole["train"]["loss"], rel=1e-3)

    shorter = {**length, "max_steps": steps - 1}
    with pytest.raises(ValueError, match=rf"checkpoint-{steps} has {steps} steps behind it,.* ask for {steps - 1};"):
        prepare_finetune(settings(llama, text, out, tune="full", training={**saving, **shorter}), resume=True)
    longer = {**length, "max_steps": steps + 2}  # the first of them is still at the rate of the end, which is zero
    more = prepare_finetune(settings(llama, text, out, tune="full", training={**saving, **longer}), resume=True)
    assert more.run(None)["train"]["steps"] == steps + 2
    assert moved(load_file(out / "model.safetensors"), weights)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"attention": LOCAL}, "attention.type, attention.feature_map"),
        ({"tune": "new"}, "tune"),
        ({"seed": 1}, "seed"),
        ({"block_size": 8}, "block_size"),
        ({"training": {**SMALL, "learning_rate": 0.1}}, "training.learning_rate"),
        ({"data": {"source": "other.jsonl"}}, "data.source"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(llama, text, tmp_path, change, path):
    out = tmp_path / "out"
    prepare_finetune(settings(llama, text, out, tune="full")).run(None)
    before = written(out)
    changed = settings(llama, text, out, **{"tune": "full", **change})
    with pytest.raises(ValueError, match=rf"out holds a run with other settings: {path}.*; a run goes on with"):
        prepare_finetune(changed, resume=True)
    longer = settings(llama, text, out, tune="full", training={**SMALL, "max_steps": 5})
    with pytest.raises(ValueError, match="holds a run that ended and left no checkpoint to go on from; name another"):
        prepare_finetune(longer, resume=True)
    assert written(out) == before
    (out / "settings.json").unlink()  # as runs of earlier versions: nothing to compare with, and still not trained on
    with pytest.raises(ValueError, match="ended and left no checkpoint"):
        prepare_finetune(changed, resume=True)


class Sharded(TrainerCallback):
    """What Trainer has after training under FSDP with sharded checkpoints, without the processes that it takes."""

    def __init__(self, trainer, monkeypatch):
        self.trainer, self.monkeypatch = trainer, monkeypatch

    def on_train_end(self, args, state, control, **kwargs):
        plugin = FullyShardedDataParallelPlugin(state_dict_type="SHARDED_STATE_DICT")
        self.monkeypatch.setattr(self.trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
        self.trainer.is_fsdp_enabled = True


def test_a_model_is_written_whole_where_checkpoints_are_sharded(llama, text, tmp_path, monkeypatch):
    run = prepare_finetune(settings(llama, text, tmp_path / "out", tune="full"))
    run.trainer.add_callback(Sharded(run.trainer, monkeypatch))
    metrics = run.run(None)
    monkeypatch.undo()
    assert close(evaluated(tmp_path / "out", text)["result"], metrics["evaluation"]["after"])


def test_a_run_whose_model_was_not_written_does_not_say_that_it_was(llama, text, tmp_path, monkeypatch):
    run = prepare_finetune(settings(llama, text, tmp_path / "out", tune="full"))
    monkeypatch.setattr(run.trainer, "save_model", lambda folder: None)
    with pytest.raises(
        RuntimeError, match=r"Trainer wrote no weights into .*out: with this way of sharding they are kept"
    ):
        run.run(None)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_what_cannot_be_written_is_said_before_anything_is_read(llama, text, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    nothing = {"model": "/no/such/model", "data": {"source": "no.jsonl"}}
    with pytest.raises(ValueError, match=r"output_dir='.*file/out': .*file is a file; allowed: a folder, or one to be"):
        prepare_finetune(build(FinetuneConfig, {**nothing, "output_dir": str(tmp_path / "file" / "out")}))
    with pytest.raises(ValueError, match=r"output='.*file/out.json': .*file is a file"):
        evaluated("/no/such/model", "no.jsonl", output=str(tmp_path / "file" / "out.json"))
    with pytest.raises(ValueError, match=r"output='.*' is a folder; allowed: a file"):
        evaluated("/no/such/model", "no.jsonl", output=str(tmp_path))
    with pytest.raises(ValueError, match=r"output_dir='.*' is the model's own folder; allowed: another"):
        prepare_finetune(settings(llama, text, llama))

    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"output_dir='.*new/out': cannot write into .*: Read-only file system"):
        prepare_finetune(build(FinetuneConfig, {**nothing, "output_dir": str(tmp_path / "new" / "out")}))
    assert not (tmp_path / "new").exists()


def test_a_home_folder_is_spelled_out(llama, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings(llama, text, "~/out").output_dir == str(tmp_path / "out")


def test_resume_without_a_checkpoint_starts_from_the_start(llama, text, tmp_path):
    run = prepare_finetune(settings(llama, text, tmp_path / "out"), resume=True)
    assert run.checkpoint is None
    assert last_whole_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("tune", ["lora", "new"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the evaluation, which needs none
def test_gradient_checkpointing_reaches_frozen_models(llama, text, tmp_path, reentrant, tune):
    plain = prepare_finetune(settings(llama, text, tmp_path / "plain", tune=tune)).run(None)
    saving = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    training = {**SMALL, **saving}
    run = prepare_finetune(settings(llama, text, tmp_path / "saving", tune=tune, training=training)).run(None)
    losses = [[entry["loss"] for entry in metrics["train"]["losses"]] for metrics in (plain, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"max_step": 3}}, r"unknown key 'max_step' in training \(did you mean max_steps\?\)"),
        ({"training": {"max_steps": "many"}}, "training.max_steps='many' is of type str; allowed: int"),
        ({"training": {"output_dir": "x"}}, "training.output_dir is not for a config; use output_dir"),
        ({"training": {"resume_from_checkpoint": "x"}}, "is not for a config; use --resume"),
        ({"training": {"do_train": True}}, "training.do_train is not for a config$"),
        ({"lora": {"rank": 3}}, "unknown key 'rank' in lora"),
        ({"lora": {"r": "8"}}, "lora.r='8' is of type str; allowed: int"),
        ({"tune": "full", "lora": {"r": 8}}, r"lora options \['r'\] go with tune='lora', not with tune='full'"),
        ({"tune": "all"}, "tune='all'; allowed: 'lora', 'full', 'new'"),
        ({"block_size": 1}, "block_size=1; allowed: at least 2"),
        ({"max_length": 0}, "max_length=0; allowed: at least 1"),
        ({"evaluation": {"lenght": 8}}, r"unknown key 'lenght' in evaluation \(did you mean length\?\)"),
        (
            {"evaluation": {"task": "accuracy"}},
            "evaluation.task='accuracy' is for classification models, and task='causal-lm'",
        ),
        ({"attention": {"type": "locl"}}, r"unknown attention 'locl' \(did you mean local\?\)"),
        ({"attention": "rules.yaml"}, "cannot read attention rules.yaml: No such file"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        settings("no/model", "no-data.jsonl", "out", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "no such model folder: '/no/such/model'"),
        ({"data": {"source": "no.jsonl"}}, "no such file or folder: no.jsonl"),
        ({"block_size": 999}, "block_size=999; allowed: at most 128, the model's max_position_embeddings"),
        (
            {"tune": "new", "attention": LOCAL},
            "tune='new' trains the weights that the checkpoint did not hold, and there are none",
        ),
        (
            {"lora": {"target_modules": ["nothing"]}},
            "lora: (Target modules .*nothing.* not found|No modules were targeted)",
        ),
        ({"attention": {"type": "local", "layers": 9}}, "layers=9 is out of range"),
        ({"training": {"lr_scheduler_type": "wild"}}, "training: .*wild"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(llama, text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare_finetune(settings(llama, text, tmp_path / "out", **changes))


def test_an_adapter_trains_on_as_it_is(llama, text, tmp_path):
    lora = {"lora": {"r": 2, "target_modules": ["q_proj"]}}
    first = prepare_finetune(settings(llama, text, tmp_path / "one", **lora)).run(None)
    on = {"attention": "as-saved", "evaluate_before": True}
    second = prepare_finetune(settings(str(tmp_path / "one"), text, tmp_path / "two", **on)).run(None)
    assert close(second["evaluation"]["before"], first["evaluation"]["after"])
    assert second["parameters"] == first["parameters"]
    assert second["base_model"] == llama
    one, two = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "two"))
    assert moved(two, one) == set(one), "LoRA and the slots train"
    assert close(evaluated(tmp_path / "two", text)["result"], second["evaluation"]["after"])
    for changes, got in (({"tune": "full"}, "tune='full'"), ({"tune": "new"}, "tune='new'"), (lora, "lora options")):
        with pytest.raises(ValueError, match=f"is a PEFT adapter, which trains on as it is.*{got}.*or merge it first"):
            prepare_finetune(settings(str(tmp_path / "one"), text, tmp_path / "three", attention="as-saved", **changes))


def launched(*command):
    """The end of both processes, started as torchrun and accelerate start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    told |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    return [
        program.wait()
        for program in [programs.start(*command, env={**told, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    ]


def launched_by_accelerate(*command):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    return [subprocess.run([*launch, *command], capture_output=True, text=True)]


@pytest.mark.parametrize("launch", [launched, pytest.param(launched_by_accelerate, marks=pytest.mark.slow)])
def test_two_processes_do_the_same_steps_as_one(llama, text, tmp_path, launch):
    training = {**SMALL, "max_steps": 2, "per_device_train_batch_size": 4}
    one = prepare_finetune(settings(llama, text, tmp_path / "one", tune="full", training=training)).run(None)
    config = tmp_path / "config.yaml"
    tree = {
        "model": llama,
        "data": {"source": text},
        "output_dir": str(tmp_path / "two"),
        "attention": LINEAR,
        "tune": "full",
        "block_size": 16,
        "training": {**training, "per_device_train_batch_size": 2},
        "evaluation": {"length": 16, "max_tokens": 80},  # 5 batches: the two processes have unequal shares
    }
    config.write_text(yaml.safe_dump(tree))
    for ran in launch("-m", "attn_plugins", "finetune", "--config", str(config)):
        assert ran.returncode == 0, ran.stderr
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (one["train"]["processes"], two["train"]["processes"]) == (1, 2)
    assert one["train"]["rows"] == two["train"]["rows"] == 8
    for first, second in zip(one["train"]["losses"], two["train"]["losses"], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-4)
    alone = evaluated(tmp_path / "two", text, evaluation={"length": 16, "max_tokens": 80})
    assert close(two["evaluation"]["after"], alone["result"])


def test_bfloat16_is_for_cpus_too(llama, text, tmp_path):
    config = settings(llama, text, tmp_path / "out", training={**SMALL, "bf16": True, "max_steps": 1}, recall=False)
    run = prepare_finetune(config)
    assert run.trainer.accelerator.mixed_precision == "bf16"
    run.run(None)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
