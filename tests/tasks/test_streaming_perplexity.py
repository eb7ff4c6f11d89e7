"""Perplexity through a cache is that of one pass without, to the digit, for every kind of attention."""

import math

import pytest
import torch
from conftest import WORDS, tokenizer
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from attn_plugins.tasks import get_task, run_task

CLS = get_task("streaming_perplexity")
TEXTS = [" ".join(WORDS[(first + 3 * i * i) % len(WORDS)] for i in range(n)) for first, n in enumerate((30, 9, 40, 25))]
DATA = Dataset.from_dict({"text": TEXTS})


def measured(model, **options):
    task = CLS(CLS.Config(**options))
    return run_task(task, model, task.prepare(DATA, tokenizer(), model))


@pytest.mark.parametrize("rule", [None, {"type": "local", "window_size": 6, "num_sink_tokens": 2}, "linear", "topk"])
def test_it_is_that_of_one_pass_over_the_documents_that_are_long_enough(llama, rule):
    model = AutoModelForCausalLM.from_pretrained(llama, attn_plugin=rule)
    ids = torch.tensor([tokenizer()(text)["input_ids"][:25] for text in (TEXTS[0], TEXTS[2], TEXTS[3])])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").double()
    for piece, batch_size in ((1, 3), (7, 2), (25, 1)):
        found = measured(model, length=25, piece=piece, stretch=10, batch_size=batch_size)
        assert (found["documents"], found["tokens"], found["length"]) == (3, 3 * 24, 25)
        assert found["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
        assert found["loss"] == pytest.approx(math.log(found["perplexity"]))
        assert [(part["from"], part["to"]) for part in found["by_position"]] == [(1, 9), (10, 19), (20, 24)]
        for part in found["by_position"]:
            mean = losses[:, part["from"] - 1 : part["to"]].mean()  # column 0 is the loss of position 1
            assert part["perplexity"] == pytest.approx(mean.exp().item(), rel=1e-5)


def test_the_size_of_the_cache_is_that_of_one_document_at_its_end(llama):
    dense = AutoModelForCausalLM.from_pretrained(llama)
    one, several = (measured(dense, length=20, batch_size=size) for size in (1, 3))
    assert one["cache_bytes"] == several["cache_bytes"] == 20 * 2 * 2 * 8 * 4  # tokens, layers, k and v, size, bytes
    rule = {"type": "local", "window_size": 4, "num_sink_tokens": 0}
    local = AutoModelForCausalLM.from_pretrained(llama, attn_plugin=rule)
    sizes = {measured(local, length=n, piece=3)["cache_bytes"] for n in (10, 20, 40)}
    assert len(sizes) == 1
    assert sizes.pop() < one["cache_bytes"] / 3


def test_only_as_much_is_read_as_is_asked_for(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert measured(model, length=25, max_documents=2)["documents"] == 2
    with pytest.raises(ValueError, match="length=41, and the longest of 4 documents has 40 tokens; allowed: a smaller"):
        measured(model, length=41)


def test_the_models_own_limit_is_none(llama):
    model = AutoModelForCausalLM.from_pretrained(llama, attn_plugin={"type": "local", "window_size": 4})
    data = Dataset.from_dict({"text": [" ".join(WORDS * 10)]})
    task = CLS(CLS.Config(length=150, stretch=50))
    assert model.config.max_position_embeddings < 150
    assert run_task(task, model, task.prepare(data, tokenizer(), model))["tokens"] == 149


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length=1; allowed: at least 2"),
        ({"piece": 0}, "piece=0; allowed: at least 1"),
        ({"stretch": 1}, "stretch=1; allowed: at least 2"),
        ({"max_documents": 0}, "max_documents=0; allowed: at least 1, or null"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        CLS.Config(**options)
