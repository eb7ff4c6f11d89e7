"""Preferred answers: likelihoods against the model's own loss, what the reference is, rows that are no use."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tokenizer, write_rows
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

import attn_plugins as ap
from attn_plugins.core.options import build
from attn_plugins.tasks import get_task, run_task
from attn_plugins.tasks.preference import _reference
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.evaluate import prepare_measurements
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.transfer.run import task_batches

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = {"type": "linear", "feature_map": "hedgehog"}
ROWS = [
    {"prompt": "the cat is", "chosen": " good fine good", "rejected": " bad"},
    *({"prompt": "the dog is", "chosen": " good .", "rejected": f" {word} bad ."} for word in ("red", "one", "blue")),
]


def made(**options):
    cls = get_task("preference")
    return cls(build(cls.Config, {"batch_size": 2, **options}, "options"))


def test_figures_are_those_of_the_models_own_loss(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    task = made()
    batches = task.prepare(Dataset.from_list(ROWS), tokenizer(), model)
    before = run_task(task, model, batches)
    assert (before["reward_accuracy"], before["margin"], before["rows"], before["left_out"]) == (0.5, 0, 4, 0)

    def likelihood(model, row, answer):
        ids, asked = (tokenizer()(text, return_tensors="pt")["input_ids"] for text in (answer, row["prompt"]))
        labels = ids.clone()
        labels[:, : asked.shape[1]] = -100
        return -model(input_ids=ids, labels=labels).loss.item() * (labels != -100).sum().item()

    def likelihoods(model):
        return [
            [likelihood(model, row, row["prompt"] + row[one] + "</s>") for one in ("chosen", "rejected")]
            for row in ROWS
        ]

    reference = likelihoods(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    now = likelihoods(model)
    found = run_task(task, model, batches)
    margins = [(a - c) - (b - d) for (a, b), (c, d) in zip(now, reference, strict=True)]
    assert found["margin"] == pytest.approx(sum(margins) / 4, rel=1e-3)
    assert found["reward_accuracy"] == sum(margin > 0 for margin in margins) / 4
    assert found["accuracy"] == sum(chosen > rejected for chosen, rejected in now) / 4


def test_long_answers_are_cut_and_long_prompts_left_out(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    rows = [*ROWS, {"prompt": "the cat is the dog is", "chosen": " good", "rejected": " bad"}]
    task = made(max_length=5)
    batches = task.prepare(Dataset.from_list(rows), tokenizer(), model)
    assert max(batch["input_ids"].shape[1] for batch in batches) == 5
    figures = run_task(task, model, batches)
    assert (figures["rows"], figures["left_out"]) == (4, 1)
    with pytest.raises(ValueError, match="all 5 prompts have max_length=3 tokens or more; allowed: more"):
        made(max_length=3).prepare(Dataset.from_list(rows), tokenizer(), model)


def test_a_tokenizer_without_an_end_is_refused(llama):
    made_without = tokenizer()
    made_without.eos_token = None
    with pytest.raises(
        ValueError, match="the tokenizer has no end-of-sequence token, which tells where an answer ends"
    ):
        made().examples(Dataset.from_list(ROWS), made_without, None)


def test_columns_of_other_tasks_are_not_there():
    tasks = [made(), get_task("perplexity")()]
    with pytest.raises(
        ValueError, match="task='perplexity' needs text_column, which preference reads no rows by; meas"
    ):
        prepare_measurements(tasks, Dataset.from_list(ROWS), None)


def test_transfer_has_no_batches_of_it():
    with pytest.raises(
        ValueError, match="task='preference' makes no batches that a model is called with; allowed: ano"
    ):
        task_batches(made(), None, SimpleNamespace(processing=None), Dataset.from_list(ROWS), 1, 1)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_reference_is_the_model_before_training_with_its_attention(llama, tmp_path, tune):
    pytest.importorskip("trl", reason="TRL is not installed")
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1, "save_strategy": "no"}
    tree = {
        "model": llama,
        "data": {"source": write_rows(tmp_path / "rows.jsonl", ROWS * 2)},
        "output_dir": str(tmp_path / "out"),
        "attention": LINEAR,
        "task": "preference",
        "tune": tune,
        "training": training,
    }
    run = prepare_finetune(build(FinetuneConfig, tree))
    model, reference = run.trainer.model, run.trainer.ref_model
    if tune == "lora":
        assert reference is None
        assert list(model.peft_config) == ["default"]
    else:
        assert [row.plugin for row in ap.describe_attention(reference)] == ["linear", "linear"]
        weights = model.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in reference.state_dict().items())
        assert not any(parameter.requires_grad for parameter in reference.parameters())
    metrics = run.run(None)
    first = metrics["train"]["losses"][0]["loss"] if metrics["train"]["losses"] else metrics["train"]["loss"]
    assert first == pytest.approx(0.6931, abs=1e-3), "at its first step a model is its own reference"
    assert not (tmp_path / "out" / "ref").exists()


@pytest.mark.parametrize("named", [False, True])
def test_the_reference_is_where_the_model_is(llama, named):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama))
    with _reference(model, llama if named else None) as reference:
        assert {weight.device.type for weight in reference.parameters()} == {"meta"}
