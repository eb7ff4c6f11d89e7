"""Recipes: stages in a row, each from what the one before has left; a stopped one goes on to the same."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from attn_plugins.cli import app
from attn_plugins.core.options import build
from attn_plugins.training.config import EvaluateConfig
from attn_plugins.training.evaluate import prepare_evaluation
from attn_plugins.transfer import recipe
from attn_plugins.transfer.recipe import RecipeConfig, prepare_recipe, run_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = {"type": "linear", "feature_map": "hedgehog"}
LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 1}
STEPS = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "disable_tqdm": True}
LORA = {"r": 2, "target_modules": ["q_proj"]}
TRANSFER = {"transfer": {"steps": 4, "length": 16, "held_out": 2, "training": {"save_steps": 2, "disable_tqdm": True}}}
DISTILL = {"distill": {"block_size": 16, "training": STEPS, "recall": False}}
FINETUNE = {"finetune": {"block_size": 16, "lora": LORA, "training": STEPS, "recall": False}}


def tree(model, text, out, **changes):
    return {
        "model": model,
        "attention": LINEAR,
        "data": {"source": text},
        "output_dir": str(out),
        "evaluation": {"length": 16, "max_tokens": 64},
        "stages": [TRANSFER, DISTILL, FINETUNE],
        **changes,
    }


def run(config):
    prepare_recipe(config)
    return run_recipe(config, say=lambda line: None)


def value(row):
    return row["evaluation"]["after"]["perplexity"]


@pytest.fixture(scope="module")
def whole(llama, text, tmp_path_factory):
    """A recipe that ran to its end: its settings, its rows."""
    config = build(RecipeConfig, tree(llama, text, tmp_path_factory.mktemp("recipe") / "out"))
    return config, run(config)


def test_each_stage_starts_from_the_one_before(whole, llama, text):
    config, rows = whole
    out = Path(config.output_dir)
    names = ["the model itself", "swapped, untrained", "1. transfer", "2. distill", "3. finetune"]
    assert [row["name"] for row in rows] == names
    assert len({value(row) for row in rows}) == 5
    for row, attention in ((rows[0], None), (rows[1], LINEAR), *((row, "as-saved") for row in rows[2:])):
        asked = {"model": row["folder"], "attention": attention, "data": {"source": text}}
        found = prepare_evaluation(build(EvaluateConfig, {**asked, "evaluation": config.evaluation})).run()
        assert value(row) == pytest.approx(found["result"]["perplexity"], rel=1e-6)
    base = load_file(Path(llama) / "model.safetensors")
    for stage in ("1-transfer", "2-distill"):
        saved = load_file(out / stage / "model.safetensors")
        assert all(torch.equal(saved[name], weight) for name, weight in base.items())
        assert set(saved) > set(base)
    adapter = json.loads((out / "3-finetune" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == llama, "the last folder needs none of the others"
    card = (out / "3-finetune" / "README.md").read_text()
    assert "1. transfer (output), new weights alone: 4 steps" in card
    assert "2. distill (kl), new weights alone: 4 steps" in card


def test_the_report_tells_each_stage(whole):
    config, rows = whole
    out = Path(config.output_dir)
    assert json.loads((out / "report.json").read_text()) == rows
    lines = (out / "report.md").read_text().splitlines()
    header, *shown = (line.strip("| ").split(" | ") for line in lines if line.startswith("| "))
    assert header == ["stage", "trained", "steps", "seconds", "perplexity: perplexity", "error"]
    assert [cells[0] for cells in shown] == [row["name"] for row in rows]
    assert [cells[4] for cells in shown] == [f"{value(row):.4g}" for row in rows]
    assert (shown[2][1:3], shown[4][1:3]) == (["new weights alone", "4"], ["LoRA and new weights", "4"])
    assert shown[2][5] == f"{rows[2]['errors']['before']:.3f} to {rows[2]['errors']['after']:.3f}"


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", ["transfer", "between", "distill", "finetune"])
def test_a_killed_recipe_goes_on_to_the_same(whole, llama, text, tmp_path, monkeypatch, at):
    _, rows = whole
    config = build(RecipeConfig, tree(llama, text, tmp_path))
    calls = []

    def killed(trainer, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KilledError
        return stepped(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        if at == "between":
            patch.setattr(recipe, "prepare_finetune", None)
        else:
            module = "attn_plugins.transfer.trainer.TransferTrainer" if at == "transfer" else "transformers.Trainer"
            module = "attn_plugins.training.distillation_trainer.DistillationTrainer" if at == "distill" else module
            holder = pytest.importorskip(module.rpartition(".")[0])
            trainer = getattr(holder, module.rpartition(".")[2])
            stepped = trainer.training_step
            if at == "finetune":  # of Trainer itself, which the others call too
                calls = [0] * -8
            patch.setattr(trainer, "training_step", killed)
        with pytest.raises((KilledError, TypeError)):
            run(config)
    again = run(config)
    assert [value(row) for row in again] == pytest.approx([value(row) for row in rows], rel=1e-6)
    for stage in ("1-transfer/model", "2-distill/model", "3-finetune/adapter_model"):
        one = load_file(Path(whole[0].output_dir) / f"{stage}.safetensors")
        other = load_file(tmp_path / f"{stage}.safetensors")
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=1e-5)


def test_a_recipe_that_ended_trains_nothing(whole, monkeypatch):
    config, rows = whole
    for prepare in ("prepare_transfer", "prepare_finetune", "prepare_evaluation"):
        monkeypatch.setattr(recipe, prepare, None)
    assert run(config) == rows


def test_a_recipe_may_grow(llama, text, tmp_path):
    config = build(RecipeConfig, tree(llama, text, tmp_path, stages=[FINETUNE]))
    rows = run(config)
    on = {"finetune": {**FINETUNE["finetune"], "lora": {}}}  # of an adapter, as it is
    grown = run(build(RecipeConfig, tree(llama, text, tmp_path, stages=[FINETUNE, on])))
    assert grown[:-1] == rows
    assert grown[-1]["name"] == "2. finetune"
    assert value(grown[-1]) != value(rows[-1])


def test_another_recipe_is_refused_where_one_was(whole, llama, text):
    config, _ = whole
    other = [TRANSFER, {"distill": {**DISTILL["distill"], "temperature": 2.0}}, FINETUNE]
    for changes, path in (
        ({"stages": other}, "stages.1"),
        ({"stages": [TRANSFER]}, "stages.1, stages.2"),
        ({"seed": 1}, "seed"),
    ):
        with pytest.raises(ValueError, match=f"holds a recipe with other settings: {path};"):
            prepare_recipe(build(RecipeConfig, tree(llama, text, config.output_dir, **changes)))


def test_rules_that_were_chosen_are_those_of_the_stages_after(llama, text, tmp_path, monkeypatch):
    asked = []

    def choose(settings, told):
        asked.append(settings)
        Path(settings.output_dir).mkdir()
        (Path(settings.output_dir) / "rules.yaml").write_text(
            yaml.safe_dump([{"type": "softmax", "layers": [1]}, LOCAL])
        )

    monkeypatch.setattr(recipe, "choose", choose)
    stages = [{"choose": {"level": "layers", "budget": 0.5}}, FINETUNE]
    config = build(RecipeConfig, tree(llama, text, tmp_path, attention=LOCAL, stages=stages))
    rows = run(config)
    assert [row["name"] for row in rows] == ["the model itself", "1. choose", "swapped, untrained", "2. finetune"]
    assert (asked[0].attention, asked[0].budget, asked[0].data.source) == (LOCAL, 0.5, text)
    metrics = json.loads((tmp_path / "2-finetune" / "metrics.json").read_text())
    assert metrics["attention"]["modules"] == {"local": 1, "softmax": 1}
    assert run(config) == rows
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "stages is empty"),
        (
            {"stages": [{"transfr": {}}]},
            "stages.0 is .*did you mean transfer.*allowed: one of transfer, choose, dist",
        ),
        ({"stages": [{"transfer": {}, "finetune": {}}]}, "stages.0 is .*allowed: one of"),
        ({"stages": [{"transfer": 3}]}, "stages.0.transfer is 3; allowed: a mapping of settings"),
        ({"stages": [TRANSFER, {"distill": {"seed": 3}}]}, "stages.1.distill.seed is set for the whole recipe"),
        (
            {"stages": [TRANSFER, {"distill": {"tune": "full"}}]},
            "stages.1.distill: loss='kl' holds the model to itself",
        ),
        ({"stages": [TRANSFER, {"finetune": {"trainin": {}}}]}, "unknown key 'trainin' in stages.1.finetune"),
        (
            {"stages": [TRANSFER, {"choose": {}}]},
            "stages.1.choose is of heads, and comes after a stage that has trained",
        ),
        ({"evaluation": {"task": "perplexty"}}, "perplexty"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(changes, message):
    with pytest.raises(ValueError, match=message):
        build(RecipeConfig, tree("m", "t.jsonl", "out", **changes))


def test_the_command_runs_a_file(llama, text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(llama, text, tmp_path / "out", stages=[TRANSFER])))
    ran = CliRunner().invoke(app, ["recipe", "--config", str(file)])
    assert ran.exit_code == 0, ran.output
    assert "[1/1] transfer" in ran.output
    assert "swapped, untrained" in ran.output
    assert "the model is in" in ran.output
    wrong = CliRunner().invoke(app, ["recipe", "--config", str(file), "--set", "seed=3"])
    assert wrong.exit_code == 2
    assert "holds a recipe with other settings: seed" in wrong.output
