"""The tasks like RULER's: figures of each part, answers in one pass and through the cache, rows that fit the model."""

import json
import random
import types

import pytest
import torch
from datasets import Dataset
from recalling import tiny
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

import attn_plugins as ap
from attn_plugins.data.text import position_limit
from attn_plugins.tasks import get_task, list_tasks, rows_of, run_task
from attn_plugins.tasks.ruler_rows import RulerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CHANCE = random.Random(0)
VOCABULARY = ["".join(CHANCE.choices("abcdefghijklmnop", k=5)) for _ in range(150)]
DATA = Dataset.from_list(
    [
        {
            "text": f"{' '.join(CHANCE.choices(VOCABULARY, k=300))}.",
            "question": f"Who is {name}?",
            "context": f"{' '.join(CHANCE.choices(VOCABULARY, k=20))}. {name} is Dr{name.upper()}.",
            "answer": {"text": [f"Dr{name.upper()}"], "answer_start": [0]},
        }
        for name in VOCABULARY[:20]
    ]
)
TASKS = [name for name in list_tasks() if get_task(name).Config is RulerConfig]
TEXTS = [name for name in TASKS if get_task(name).columns == ("text",)]


def letters():
    printable = ["<s>", "<unk>", *(chr(number) for number in range(32, 127)), "\n"]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(printable)}, [], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


class Knows(nn.Module):
    """Predicts the rows that it has seen, but for some tokens, which it takes for another."""

    def __init__(self, batches, wrong=()):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(8.0))
        self.rows = [row.tolist() for batch in batches for row in batch["input_ids"]]
        self.wrong = wrong
        self.config = types.SimpleNamespace(get_text_config=lambda **_: types.SimpleNamespace())

    def forward(self, input_ids, use_cache=False):
        after = torch.zeros_like(input_ids)
        for number, ids in enumerate(input_ids.tolist()):
            (row,) = (row for row in self.rows if row == ids)
            after[number, :-1] = torch.tensor([0 if token in self.wrong else token for token in row[1:]])
        return types.SimpleNamespace(logits=nn.functional.one_hot(after, 98).float() * self.size)


def prepared(name, model=None, **options):
    task = get_task(name)(RulerConfig(**{"distances": [1300, 1700], "rows": 2, **options}))
    return task, task.prepare(DATA, letters(), model or Knows([]))


def test_these_are_the_tasks():
    assert TASKS == ["common-words", "context-qa", "multikey", "multiquery", "ruler", "variable-tracking"]
    assert all(get_task(name).recalls and get_task(name).metric == "accuracy" for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_knows_the_answers_has_1_and_one_that_cannot_say_a_letter_is_wrong_there(name):
    task, batches = prepared(name, batch_size=3)
    assert [len(batch["input_ids"]) for batch in batches] == ([3, 3, 2] if name == "ruler" else [2]) * 2
    found = run_task(task, Knows(batches), batches)
    assert (found["accuracy"], found["exact"], found["rows"]) == (1, 1, 4)
    assert [(place["distance"], place["rows"]) for place in found["by_distance"]] == [(1300, 2), (1700, 2)]
    space = letters().convert_tokens_to_ids(" ")
    some = run_task(task, Knows(batches, wrong=[space]), batches)
    assert (0.7 < some["accuracy"] < 0.9, some["exact"]) == (True, 0)
    json.dumps(found)


def test_each_part_of_ruler_is_its_task():
    task, batches = prepared("ruler")
    wrong = [letters().convert_tokens_to_ids(digit) for digit in "123456789"]
    found = run_task(task, Knows(batches, wrong), batches)
    assert list(found["by_part"]) == ["multikey", "multiquery", "variable-tracking", "common-words"]
    for part, figures in found["by_part"].items():
        task, batches = prepared(part)
        assert figures == run_task(task, Knows(batches, wrong), batches)
        assert (figures["exact"], figures["rows"]) == ("needle" in part or part[0] in "vc", 4)
    for name in ("accuracy", "exact", "loss"):
        assert found[name] == pytest.approx(sum(part[name] for part in found["by_part"].values()) / 4)
    assert found["exact"] == 0.5
    assert rows_of(found, "accuracy")["common-words: accuracy at distance 1700"] == 1


@pytest.mark.parametrize("rule", [None, {"type": "local", "window_size": 8, "num_sink_tokens": 2}, "linear"])
def test_generated_through_the_cache_it_is_what_a_pass_over_all_that_is_generated_gives(rule):
    torch.manual_seed(0)
    model = tiny(max_position_embeddings=2048, vocab_size=98)
    if rule is not None:
        ap.swap_attention(model, rule)
    options = {"distances": [1300], "rows": 1, "by": "generate"}
    task, batches = prepared("ruler", model, **options)
    found = run_task(task, model, batches)
    together, joined = prepared("ruler", model, **options, batch_size=4)
    assert len(joined) == 1
    for figure, value in run_task(together, model, joined)["by_part"].items():
        assert value["loss"] == pytest.approx(found["by_part"][figure]["loss"], rel=1e-4)
    number = list(found["by_part"]).index("multiquery")
    ids_N, asked_N = batches[number]["input_ids"][0].clone(), batches[number]["asked"][0]
    losses = []
    for at in asked_N.nonzero().flatten().tolist():
        with torch.no_grad():
            logits_V = model(input_ids=ids_N[None, :at], use_cache=False).logits[0, -1]
        losses.append(-float(logits_V.log_softmax(-1)[ids_N[at]]))
        ids_N[at] = logits_V.argmax()
    assert found["by_part"]["multiquery"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_row_that_is_too_long_for_the_model_is_an_error_and_one_for_scaled_positions_is_not():
    with pytest.raises(ValueError, match="distances=1700; allowed: at most 512, the model's max_position_embeddings"):
        prepared("ruler", tiny())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10_000.0}
    scaled = tiny(rope_parameters=rope)
    assert position_limit(scaled) == 2048
    prepared("multikey", scaled)
    with pytest.raises(ValueError, match="distances=2049; allowed: at most 2048"):
        prepared("multikey", scaled, distances=[2049])
    assert position_limit(tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})) == 1024
    assert position_limit(tiny()) == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distances": [64, 64]}, "each once"),
        ({"rows": 0}, "rows=0; allowed: at least 1"),
        ({"needles": 1}, "needles=1; allowed: 2 to 40"),
        ({"needles": 41}, "needles=41; allowed: 2 to 40"),
        ({"chains": 0}, "chains=0; allowed: at least 1"),
        ({"hops": 0}, "hops=0; allowed: at least 1"),
        ({"distances": [200]}, r"length=200; allowed: at least \d+ for multikey"),
        ({"chat": True}, "chat=True, and the tokenizer has no chat template; allowed: chat=False"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        prepared("multikey", **options)
