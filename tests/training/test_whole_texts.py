"""Texts packed without padding: each is to the model what it is alone."""

import pytest
import torch
from conftest import WORDS
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import attn_plugins  # noqa: F401
from attn_plugins.core.options import build
from attn_plugins.tasks import get_task
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [" ".join(WORDS[:7]), "", " ".join(reversed(WORDS)), "good cat", "cat"]


def packed(folder, length, attention):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_plugin=attention).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cls = get_task("perplexity")
    task = cls(cls.Config(length=length, packing="documents", buckets=1))
    rows = task.examples(Dataset.from_dict({"text": TEXTS}), tokenizer, model)
    return model, task, rows, task.collator(tokenizer, model)([dict(row) for row in rows])


@pytest.mark.parametrize("attention", [None, {"type": "local", "window_size": 4}, {"type": "linear"}], ids=str)
def test_the_loss_of_a_packed_batch_is_that_of_its_texts(llama, attention):
    model, task, rows, batch = packed(llama, 12, attention)
    assert [len(ids) for ids in rows["input_ids"]] == [8, 12, 3, 2], (
        "with the end token, cut, none without a next token"
    )
    assert batch["input_ids"].shape == (1, 25)
    assert batch["position_ids"][0].tolist() == [*range(8), *range(12), *range(3), *range(2)]
    assert task.limits() == {"input_ids": "length"}
    with torch.no_grad():
        together = model(**batch).loss
        losses = []
        for ids in rows["input_ids"]:
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            losses.append(cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none"))
    torch.testing.assert_close(together, torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)


def test_a_fine_tune_packs_texts_and_measures_blocks(llama, text, tmp_path):
    training = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.05, "logging_steps": 1}
    tree = {"model": llama, "data": {"source": text}, "output_dir": str(tmp_path / "out"), "attention": "local"}
    tree |= {"block_size": 24, "options": {"packing": "documents"}, "evaluation": {"length": 16}, "recall": False}
    run = prepare_finetune(
        build(FinetuneConfig, {**tree, "tune": "full", "training": {**training, "save_strategy": "no"}})
    )
    metrics = run.run(None)
    losses = [entry["loss"] for entry in metrics["train"]["losses"]]
    assert losses[-1] < losses[0]
    assert metrics["train"]["row"] == "text of at most 24 tokens"
    assert metrics["evaluation"]["after"]["length"] == 16


def test_what_cannot_be_packed_is_refused(llama):
    tree = {"model": llama, "data": {"source": "x.jsonl"}, "output_dir": "out", "options": {"packing": "rows"}}
    with pytest.raises(ValueError, match=r"options\.packing='rows'; allowed: 'blocks', 'documents'"):
        build(FinetuneConfig, tree)
    cls = get_task("perplexity")
    task = cls(cls.Config(packing="documents", length=8))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    with pytest.raises(ValueError, match="none of 2 texts has two tokens"):
        task.examples(Dataset.from_dict({"text": ["", ""]}), tokenizer, model)
    unplaced = type("Unplaced", (), {"forward": lambda self, input_ids: None})
    with pytest.raises(ValueError, match="by positions, which Unplaced does not take; allowed here: packing='blocks'"):
        task.examples(None, None, unplaced())
