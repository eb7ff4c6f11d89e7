"""What ``training`` passes on to Trainer, beside swapped attention: the best checkpoint, an early end, and the rest."""

from typing import ClassVar

import pytest
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from attn_plugins.core.options import build
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
EVALUATED = {**SMALL, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}


def settings(folder, rows, out, training, **changes):
    tree = {
        "model": folder,
        "data": {"source": rows},
        "output_dir": str(out),
        "attention": {"type": "linear", "feature_map": "hedgehog"},
        "tune": "full",
        "training": training,
    }
    ours = {"block_size": 16, "evaluation": {"length": 16, "max_tokens": 96}, "recall": False}
    return build(FinetuneConfig, {**tree, **(ours if changes.get("task") is None else {}), **changes})


def evaluations(run, name):
    return {entry["step"]: entry[name] for entry in run.trainer.state.log_history if name in entry}


def test_the_best_checkpoint_is_the_model_and_bad_ones_end_a_run(llama, text, tmp_path):
    training = {**EVALUATED, "max_steps": 40, "learning_rate": 2.0, "lr_scheduler_type": "constant"}
    config = settings(llama, text, tmp_path / "out", training, early_stopping={"patience": 2, "threshold": 1000.0})
    run = prepare_finetune(config)
    metrics = run.run(None)
    losses = evaluations(run, "eval_loss")
    best = min(losses, key=lambda step: losses[step])
    assert metrics["train"]["steps"] == max(losses) == 6, "no evaluation is so much better than the first"
    assert metrics["train"]["best"] == {"step": best, "loss": losses[best]}
    written, kept = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / f"out/checkpoint-{best}")
    )
    assert all((weight == kept[name]).all() for name, weight in written.items())

    # Killed after its second evaluation, it still knows how many were no better.
    (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").unlink()
    (tmp_path / "out" / "metrics.json").unlink()
    again = prepare_finetune(config, resume=True)
    assert again.run(None)["train"]["steps"] == metrics["train"]["steps"]
    assert evaluations(again, "eval_loss") == losses


def test_the_tasks_own_figure_tells_the_best(bert, labelled, tmp_path):
    changes = {"task": "classification", "evaluation": {"batch_size": 4}, "attention": {"type": "local"}}
    training = {**EVALUATED, "load_best_model_at_end": True, "max_steps": 4}
    run = prepare_finetune(settings(bert, labelled, tmp_path / "out", training, **changes))
    metrics = run.run(None)
    shares = evaluations(run, "eval_accuracy")
    assert run.trainer.args.greater_is_better
    assert metrics["train"]["best"]["accuracy"] == max(shares.values()) == metrics["evaluation"]["after"]["accuracy"]


def test_early_stopping_needs_something_to_look_at():
    with pytest.raises(
        ValueError, match=r"early_stopping looks at .*, and training\.eval_strategy is 'no'; allowed: steps"
    ):
        settings("no/model", "no.jsonl", "out", SMALL, early_stopping={"patience": 2})
    with pytest.raises(ValueError, match=r"early_stopping\.patience=0; allowed: at least 1"):
        settings("no/model", "no.jsonl", "out", EVALUATED, early_stopping={"patience": 0})
    with pytest.raises(ValueError, match=r"early_stopping\.threshold=-1\.0; allowed: at least 0"):
        settings("no/model", "no.jsonl", "out", EVALUATED, early_stopping={"threshold": -1})


def losses_with(llama, text, out, **training):
    metrics = prepare_finetune(settings(llama, text, out, {**SMALL, **training})).run(None)
    return [entry["loss"] for entry in metrics["train"]["losses"]]


def test_accumulated_gradients_are_those_of_the_whole_batch(llama, text, tmp_path):
    whole = losses_with(llama, text, tmp_path / "whole")
    parts = losses_with(llama, text, tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert parts == pytest.approx(whole, rel=1e-4)


def test_noise_in_embeddings_is_for_training_alone(llama, text, tmp_path):
    run = prepare_finetune(settings(llama, text, tmp_path / "noise", {**SMALL, "neftune_noise_alpha": 5.0}))
    noisy = [entry["loss"] for entry in run.run(None)["train"]["losses"]]
    plain = losses_with(llama, text, tmp_path / "plain")
    assert noisy[0] != pytest.approx(plain[0], rel=1e-3)
    assert noisy[0] == pytest.approx(plain[0], rel=0.2)
    assert not run.trainer.model.get_input_embeddings()._forward_hooks


class Reporter(TrainerCallback):
    said: ClassVar[list] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.said.append(dict(logs))


def test_what_reports_gets_losses(llama, text, tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Reporter)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    Reporter.said.clear()
    losses = losses_with(llama, text, tmp_path / "out", report_to="trackio")
    assert [entry["loss"] for entry in Reporter.said if "loss" in entry] == losses


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"report_to": "wandb"}, r"training\.report_to: wandb is not installed; allowed here: none"),
        ({"report_to": "wand"}, r"training\.report_to: wand is not installed; allowed here: none"),
        ({"use_liger_kernel": True}, "use_liger_kernel needs liger-kernel, which is not installed: pip install liger"),
    ],
)
def test_what_is_missing_is_said_before_a_model_is_loaded(monkeypatch, tmp_path, training, message):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    monkeypatch.setattr(transformers.utils, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        prepare_finetune(settings("/no/model", "no.jsonl", tmp_path / "out", {**SMALL, **training}))
