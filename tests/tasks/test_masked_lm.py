"""Masked language models: what is masked follows from seed, epoch and row alone; figures are those of the logits."""

import math

import pytest
import torch
from conftest import WORDS, tokenizer
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, TrainerState

import attn_plugins as ap
from attn_plugins.tasks import get_task, run_task
from attn_plugins.tasks.masked_lm import Masking

CLS = get_task("masked-lm")
TEXTS = [" ".join(WORDS[(first + 3 * i * i) % len(WORDS)] for i in range(n)) for first, n in enumerate((30, 9, 40, 25))]
DATA = Dataset.from_dict({"text": TEXTS})
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def filling():
    made = tokenizer(encoder=True)
    made.add_special_tokens({"mask_token": "<mask>"})
    return made


def model():
    torch.manual_seed(0)
    sizes = {**SIZES, "max_position_embeddings": 64, "initializer_range": 0.3}
    return BertForMaskedLM(BertConfig(vocab_size=len(filling()), pad_token_id=3, **sizes)).eval()


def measured(model, **options):
    task = CLS(CLS.Config(**options))
    return run_task(task, model, task.prepare(DATA, filling(), model))


@pytest.mark.parametrize("rule", [None, {"type": "local", "window_size": 4}])
@pytest.mark.parametrize("packed", [False, True])
def test_figures_are_those_of_the_masked_tokens_whatever_the_batches(rule, packed):
    its = model() if rule is None else ap.swap_attention(model(), rule)
    options = {"max_length": 20, "packed": packed, "mlm_probability": 0.3}
    one, three = (measured(its, batch_size=size, **options) for size in (1, 3))
    assert one == pytest.approx(three, rel=1e-5)
    task = CLS(CLS.Config(**options))
    losses, right = [], 0
    for row in task.examples(DATA, filling(), its):
        masked = Masking(filling(), 0.3, 0).row(row)
        with torch.no_grad():
            logits = its(input_ids=torch.tensor([masked["input_ids"]])).logits[0]
        labels = torch.tensor(masked["labels"])
        asked = labels != -100
        losses += cross_entropy(logits[asked], labels[asked], reduction="none").tolist()
        right += int((logits.argmax(-1) == labels)[asked].sum())
    assert one["tokens"] == len(losses)
    assert one["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert one["accuracy"] == pytest.approx(right / len(losses))
    assert measured(its, **{**options, "seed": 1})["perplexity"] != one["perplexity"]


def test_tokens_are_masked_as_in_bert_and_special_ones_never():
    made = filling()
    row = {"input_ids": made(" ".join(WORDS * 500))["input_ids"]}
    masked = Masking(made, 0.2, 0).row(row)
    before, after, labels = (torch.tensor(one) for one in (row["input_ids"], masked["input_ids"], masked["labels"]))
    chosen = labels != -100
    assert torch.equal(labels[chosen], before[chosen])
    assert torch.equal(after[~chosen], before[~chosen])
    assert not chosen[[0, -1]].any()
    assert chosen.float().mean() == pytest.approx(0.2, abs=0.02)
    assert (after == made.mask_token_id)[chosen].float().mean() == pytest.approx(0.8, abs=0.03)
    assert (after == before)[chosen].float().mean() == pytest.approx(0.1 + 0.1 / len(made), abs=0.03)


def test_masks_change_with_the_epoch_and_with_nothing_else():
    rows = [{"input_ids": filling()(text)["input_ids"]} for text in TEXTS]

    def drawn(epoch, rows, seed=0):
        collate = Masking(filling(), 0.3, seed)
        torch.rand(len(rows))
        if epoch:
            collate.on_epoch_begin(None, TrainerState(epoch=epoch), None)
        return [
            row[mask].tolist()
            for batch in [collate(rows)]
            for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        ]

    first = drawn(0, rows)
    assert drawn(0, rows[::-1])[::-1] == first
    assert drawn(0.75, rows) == first
    assert drawn(0, rows[2:3]) == first[2:3]
    assert drawn(1.0, rows) == drawn(1.5, rows) != first
    assert drawn(0, rows, seed=1) != first


def test_texts_are_cut_and_packed_ones_lose_nothing_but_the_end():
    made = filling()
    cut = CLS(CLS.Config(max_length=12)).examples(DATA, made, model())
    assert [len(ids) for ids in cut["input_ids"]] == [12, 11, 12, 12]
    assert {ids[-1] for ids in cut["input_ids"]} == {made.convert_tokens_to_ids("</s>")}
    packed = CLS(CLS.Config(max_length=12, packed=True)).examples(DATA, made, model())
    every = [token for text in TEXTS for token in made(text)["input_ids"]]
    assert [token for ids in packed["input_ids"] for token in ids] == every[: len(every) // 12 * 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 2}, "max_length=2; allowed: at least 3"),
        ({"mlm_probability": 1.0}, r"mlm_probability=1\.0; allowed: between 0 and 1"),
        ({"max_rows": 0}, "max_rows=0; allowed: at least 1, or null"),
        ({"max_length": 65}, "max_length=65; allowed: at most 64, what the model takes"),
        ({"max_length": 8, "mlm_probability": 1e-9}, "no token of 4 rows is masked at mlm_probability=1e-09; allowed"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        measured(model(), **options)


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="the model's tokenizer has no mask token"):
        CLS(CLS.Config(max_length=20)).prepare(DATA, tokenizer(encoder=True), model())
