"""Tasks measure what they say, to the digit, also when several processes share the work."""

import math

import pytest
import torch
from conftest import tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from attn_plugins import tasks
from attn_plugins.data.text import token_blocks
from attn_plugins.tasks import TASKS, Task, get_task, list_tasks, register_task, rows_of, run_task
from attn_plugins.tasks.kinds import KINDS

ROWS = Dataset.from_dict({"text": ["red green blue one two three cat dog good bad fine poor the a is ."] * 5})


def test_the_registry_finds_the_files():
    assert {"accuracy", "perplexity"} <= set(list_tasks())
    for name in list_tasks():
        task = get_task(name)
        assert task.name == name
        assert task.__doc__
        assert task.better in ("lower", "higher")
        assert task.model in KINDS
    with pytest.raises(ValueError, match=r"unknown task 'perplxity' \(did you mean perplexity\?\); known: accuracy"):
        get_task("perplxity")


def test_a_name_is_not_taken_twice(monkeypatch):
    monkeypatch.setattr(TASKS, "classes", dict(TASKS.classes))

    class Other(Task):
        metric, better, model = "loss", "lower", "causal-lm"

    class Incomplete(Task):
        metric = "loss"

    with pytest.raises(ValueError, match=r"task 'perplexity' is already registered by attn_plugins\.tasks\.perplexity"):
        list_tasks() and register_task("perplexity")(Other)
    with pytest.raises(ValueError, match=r"task 'loss' \(.*Incomplete\) lacks: better, model$"):
        register_task("loss")(Incomplete)


def measured(model, task, data, maker):
    return run_task(task, model, task.prepare(data, maker, model))


def test_perplexity_is_that_of_the_models_own_loss(llama):
    model, maker = AutoModelForCausalLM.from_pretrained(llama), tokenizer()
    cls = get_task("perplexity")
    found = measured(model, cls(cls.Config(length=10, buckets=3, batch_size=3)), ROWS, maker)
    ids = torch.tensor(token_blocks(ROWS, maker, 10)["input_ids"][:])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    losses = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].double()
    assert (
        found["tokens"] == losses.numel() == 8 * 9
    )  # 85 tokens are 8 blocks of 10, the first token of each not scored
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert [(part["from"], part["to"]) for part in found["by_position"]] == [(1, 3), (4, 6), (7, 9)]
    for part in found["by_position"]:
        mean = losses[:, part["from"] - 1 : part["to"]].mean()  # column 0 is the loss of position 1
        assert part["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_perplexity_reads_only_as_much_as_it_is_told(llama):
    model, maker = AutoModelForCausalLM.from_pretrained(llama), tokenizer()
    cls = get_task("perplexity")
    few = measured(model, cls(cls.Config(length=10, max_tokens=29)), ROWS, maker)
    assert few["tokens"] == 2 * 9
    assert model.training is False
    model.train()
    measured(model, cls(cls.Config(length=10, max_tokens=10)), ROWS, maker)
    assert model.training is True
    with pytest.raises(ValueError, match="length=500; allowed: at most 128, the model's max_position_embeddings"):
        measured(model, cls(cls.Config(length=500)), ROWS, maker)


@pytest.mark.parametrize("kept", [True, False])
def test_perplexity_by_length_is_of_the_same_tokens_with_more_of_the_block_before_them(llama, kept, monkeypatch):
    model, maker = AutoModelForCausalLM.from_pretrained(llama), tokenizer()
    ids = torch.tensor(token_blocks(ROWS, maker, 20)["input_ids"][:])
    wanted = {}
    for length in (8, 20, 13):
        with torch.no_grad():
            scores = model(input_ids=ids[:, -length:]).logits.log_softmax(-1)
        wanted[length] = -scores[:, -6:-1].gather(2, ids[:, -5:, None]).double().mean().item()
    if not kept:
        whole = type(model).forward
        monkeypatch.setattr(type(model), "forward", lambda self, input_ids, use_cache: whole(self, input_ids))
    cls = get_task("perplexity")
    task = cls(cls.Config(lengths=[8, 20, 13], scored=5, batch_size=3))
    found = measured(model, task, ROWS, maker)
    assert [part["length"] for part in found["by_length"]] == [8, 20, 13]
    for part in found["by_length"]:
        assert part["loss"] == pytest.approx(wanted[part["length"]], rel=1e-5)
        assert part["perplexity"] == pytest.approx(math.exp(part["loss"]))
    assert (found["loss"], found["length"], found["tokens"]) == (found["by_length"][1]["loss"], 20, 4 * 5)
    assert len({round(loss, 6) for loss in wanted.values()}) == 3
    assert rows_of(found, "perplexity")["perplexity at length 13"] == found["by_length"][2]["perplexity"]
    with pytest.raises(ValueError, match="lengths=129; allowed: at most 128, the model's max_position_embeddings"):
        measured(model, cls(cls.Config(lengths=[8, 129], scored=5)), ROWS, maker)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("perplexity", {"lengths": []}, r"lengths=\[\]; allowed: at least one, from 2, each once, or null"),
        ("perplexity", {"lengths": [1024, 1024]}, "each once"),
        ("perplexity", {"lengths": [600, 512]}, "scored=512; allowed: 1 to the shortest of lengths - 1"),
        (
            "perplexity",
            {"lengths": [2048], "max_tokens": 2000},
            "max_tokens=2000; allowed: at least one block, length=2",
        ),
        ("perplexity", {"length": 1}, "length=1; allowed: at least 2"),
        ("perplexity", {"length": 8, "max_tokens": 7}, "max_tokens=7; allowed: at least one block, length=8, or null"),
        ("perplexity", {"length": 8, "buckets": 8}, "buckets=8; allowed: 1 to length - 1"),
        ("perplexity", {"batch_size": 0}, "batch_size=0; allowed: at least 1"),
        ("accuracy", {"max_length": 0}, "max_length=0; allowed: at least 1"),
        ("accuracy", {"max_rows": 0}, "max_rows=0; allowed: at least 1, or null"),
    ],
)
def test_options_out_of_range(task, options, message):
    with pytest.raises(ValueError, match=message):
        get_task(task).Config(**options)


def test_accuracy_counts_the_right_rows_and_padding_changes_nothing(bert):
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    torch.manual_seed(1)
    model, maker = AutoModelForSequenceClassification.from_pretrained(bert, **names), tokenizer(encoder=True)
    texts = ["red", "green blue one two", "the cat is good", "dog bad", "a", "one two three cat dog good bad"]
    data = Dataset.from_dict({"text": texts, "label": ["x", "y", "y", "z", "y", "x"]})
    with torch.no_grad():
        answers = [model(**maker(text, return_tensors="pt")).logits.argmax().item() for text in texts]
    right = sum(answer == label for answer, label in zip(answers, [0, 1, 1, 2, 1, 0], strict=True))
    cls = get_task("accuracy")
    one, four = (measured(model, cls(cls.Config(batch_size=size)), data, maker) for size in (1, 4))
    assert one["accuracy"] == four["accuracy"] == pytest.approx(right / 6)
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
    assert (one["majority"], one["rows"]) == (0.5, 6)
    assert measured(model, cls(cls.Config(max_rows=2)), data, maker)["rows"] == 2


@pytest.mark.parametrize(("total", "world"), [(7, 1), (7, 2), (8, 2), (2, 3), (1, 4)])
def test_processes_share_the_batches_in_equal_steps(total, world):
    shares = [list(tasks._share(total, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "a sharded model waits for all of its processes"
    counted = sorted(index for share in shares for index, counts in share if counts)
    assert counted == list(range(total))


def test_branches_of_an_attention_are_measured_alone_too(llama):
    maker, cls = tokenizer(), get_task("perplexity")
    task = cls(cls.Config(length=10, batch_size=3))
    rule, found = {"type": "linear_window", "window_size": 3}, {}
    for branch in ("both", "window", "linear"):
        model = AutoModelForCausalLM.from_pretrained(llama, attn_plugin={**rule, "branch": branch})
        figures = measured(model, task, ROWS, maker)
        found[branch] = figures["perplexity"]
        assert {slot.branch for slot in model.modules() if hasattr(slot, "branch")} == {branch}, "put back"
    assert figures["branches"] == {"window": found["window"], "linear": found["linear"]}
    assert len(set(found.values())) == 3
    model = AutoModelForCausalLM.from_pretrained(llama, attn_plugin="local")
    assert "branches" not in measured(model, task, ROWS, maker)
