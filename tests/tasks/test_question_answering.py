"""Answers in texts: windows hold what they say, the best span of all of them is the answer, scores are SQuAD's."""

import pytest
import torch
from conftest import WORDS, tokenizer
from datasets import Dataset
from transformers import BertConfig, BertForQuestionAnswering

from attn_plugins.data.answers import answer_tokens, best, exact, overlap, windows
from attn_plugins.data.columns import named_by_role
from attn_plugins.tasks import get_task, run_task

CLS = get_task("question-answering")
LONG = " ".join(WORDS[(7 * at + at // 16) % len(WORDS)] for at in range(60))
BERT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def squad(*rows):
    """Rows of (question, context, answers)."""
    names = ("question", "context", "answer")
    data = Dataset.from_dict({name: [row[at] for row in rows] for at, name in enumerate(names)})
    return named_by_role(data, {name: name for name in names}, "t")


@pytest.mark.parametrize(
    ("answer", "truths", "f1", "match"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("an old cat", ["the old black cat", "dog"], 2 * 2 / (2 + 3), 0),
        ("cat cat dog", ["cat dog dog"], 2 * 2 / 6, 0),
        ("dog", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 1),
        ("cat", ["the", "cat"], 1, 1),
        ("U.S.-made", ["us made", "USmade"], 1, 1),
    ],
)
def test_scores_are_squads(answer, truths, f1, match):
    assert best(overlap, answer, truths) == pytest.approx(f1)
    assert best(exact, answer, truths) == match


def test_windows_cover_the_context_and_overlap_by_the_stride():
    made, rows = tokenizer(encoder=True), {"question": [" one two ", "red"], "context": [LONG, "the cat"]}
    encoded, of_rows, places = windows(made, rows, 20, 6)
    assert of_rows == [0] * (len(of_rows) - 1) + [1]
    assert all(len(ids) <= 20 for ids in encoded["input_ids"])
    words = [LONG[place[0] : place[1]] for its in places[:-1] for place in its if place]
    seen = [words[:15]]
    for start in range(15, len(words), 15):
        seen.append(words[start : start + 15])
        assert seen[-1][:6] == seen[-2][9:15]
    assert [*seen[0], *(word for its in seen[1:] for word in its[6:])] == LONG.split()
    assert [place and rows["context"][1][slice(*place)] for place in places[-1]] == [None] * 3 + ["the", "cat", None]


def test_the_tokens_of_an_answer_are_those_of_its_characters():
    places = [None, (0, 3), (3, 3), (4, 7), (8, 12), None]
    assert answer_tokens(places, (4, 12)) == (3, 4)
    assert answer_tokens(places, (5, 6)) == (3, 3), "a part of a token is that token"
    assert answer_tokens(places, (0, 3)) == (1, 1)
    assert answer_tokens(places, (8, 13)) is None
    assert answer_tokens(places[3:], (0, 7)) is None
    assert answer_tokens(places, None) is None


def test_examples_point_at_the_answer_in_each_window_that_has_it_and_else_at_the_first_token():
    made, model = tokenizer(encoder=True), Marking({})
    answer = " ".join(LONG.split()[30:32])
    start = len(" ".join(LONG.split()[:30])) + 1
    data = squad(
        ("one two", LONG, {"text": [answer], "answer_start": [start]}),
        ("red", "a cat", {"text": [], "answer_start": []}),
    )
    rows = CLS(CLS.Config(max_length=20, stride=6)).examples(data, made, model)
    held = [row for row in rows if row["start_positions"] or row["end_positions"]]
    assert 1 <= len(held) < len(rows)
    for row in held:
        assert made.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]) == answer
    batch = CLS(CLS.Config()).collator(made, model)([rows[at] for at in range(len(rows))])
    assert set(batch) == {"input_ids", "attention_mask", "start_positions", "end_positions"} | (
        {"token_type_ids"} & set(batch)
    )
    made.padding_side = "left"
    assert torch.equal(CLS(CLS.Config()).collator(made, model)(list(rows))["input_ids"], batch["input_ids"])


class Marking(torch.nn.Module):
    """Marks the first place of given words in its row, each pair of them (first, last) with a score, and the first
    token with one for no answer."""

    def __init__(self, marks, null=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.marks, self.null = marks, null
        self.config = BertConfig(max_position_embeddings=64)

    def forward(self, input_ids, attention_mask, **others):
        start, end = torch.full((2, *input_ids.shape), -50.0)
        start[:, 0] = end[:, 0] = self.null / 2
        for row, ids in enumerate(input_ids.tolist()):
            for (first, last), score in self.marks.items():
                if first in ids and last in ids:
                    start[row, ids.index(first)] = end[row, ids.index(last)] = score / 2
        return type("Output", (), {"start_logits": start, "end_logits": end})


def marked(marks, data, null=0.0, **options):
    made = tokenizer(encoder=True)
    ids = {tuple(made.convert_tokens_to_ids(list(pair))): score for pair, score in marks.items()}
    task, model = CLS(CLS.Config(**{"max_length": 16, "stride": 2, **options})), Marking(ids, null)
    return run_task(task, model, task.prepare(data, made, model))


def test_the_best_span_of_all_windows_is_the_answer():
    context = f"{'. ' * 20}the red cat {'. ' * 20}a blue dog"
    data = squad(("three", context, ["red cat"]), ("three", context, ["blue dog"]))
    for size in (1, 4, 50):
        cats = marked({("red", "cat"): 9, ("blue", "dog"): 8}, data, batch_size=size)
        assert (cats["f1"], cats["exact"], cats["questions"]) == (0.5, 0.5, 2)
        long = marked({("the", "cat"): 9}, data, batch_size=size, null=-1000.0)
        assert long["exact"] == 0.5, "without its article"
        assert marked({("the", "cat"): 9}, data, max_answer_length=2)["exact"] == 0
    turned = marked({("cat", "red"): 9, ("blue", "dog"): 8}, data)
    assert turned["exact"] == 0.5, "a span whose end is before its start is none"
    assert "unanswerable" not in marked({}, data, null=1000.0), "where all have an answer, none is left without"


def test_a_model_may_say_that_there_is_no_answer_where_some_rows_have_none():
    data = squad(
        ("three", "the red cat", ["red"]), ("three", "is a dog", [""]), ("three", ". " * 30 + "red .", ["red"])
    )
    found = marked({("red", "red"): 9}, data)
    assert (found["f1"], found["exact"], found["unanswerable"]) == (1, 1, 1)
    none = marked({("red", "red"): 9}, data, null=20.0)
    assert (none["exact"], none["exact_answerable"], none["exact_unanswerable"]) == (pytest.approx(1 / 3), 0, 1)
    assert marked({("red", "red"): 9}, data, null=20.0, null_threshold=12.0)["exact_answerable"] == 1


def test_answers_as_texts_are_found_in_the_context():
    data = squad(("q", "red cat, red cat", ["red cat"]), ("q", "dog", [""]), ("q", "a dog", ["dog", "a"]))
    assert data["answer"][:] == [
        {"text": ["red cat"], "answer_start": [0]},
        {"text": [], "answer_start": []},
        {"text": ["dog", "a"], "answer_start": [2, 0]},
    ]
    plain = squad(("q", "red cat", "cat"), ("q", "dog", ""))
    assert plain["answer"][:] == [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            ["cat", "green"],
            r"'answer' \(answer_column\) has 'green' in row 2 of 2, which stands nowhere in its context",
        ),
        (["blue", "green"], "in row 1 of 2, .*; so it is in 1 more rows. An answer is a part of its context; without"),
        (["cat", None], "has no answers in row 2 of 2"),
        ([{"text": ["cat"], "answer_start": [3]}] * 2, "has 'cat' in row 1 of 2, which stands not at 3 in its context"),
        ([{"text": ["cat"], "answer_start": []}] * 2, "has no answers in row 1 of 2, or not a start for each"),
        ([1, 2], r"holds int64; allowed: texts, or \{\"text\": \[...\], \"answer_start\": \[...\]\} as in SQuAD"),
        ([{"text": ["cat"]}] * 2, "holds dict; allowed: texts"),
    ],
)
def test_answers_that_do_not_fit(answers, message):
    with pytest.raises(ValueError, match=message):
        squad(("q", "red cat", answers[0]), ("q", "red cat", answers[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 7}, "max_length=7; allowed: at least 8"),
        ({"max_length": 16, "stride": 9}, "stride=9; allowed: 0 to half of max_length"),
        ({"max_answer_length": 0}, "max_answer_length=0; allowed: at least 1"),
        ({"max_length": 65}, "max_length=65; allowed: at most 64, what the model takes"),
        (
            {"max_length": 10, "stride": 2},
            "the question in row 2 of 2 has 5 tokens; allowed: at most 4, with max_length",
        ),
    ],
)
def test_options_and_questions_that_do_not_fit(options, message):
    data = squad(("one", "cat", ["cat"]), ("one two three one two", "cat", ["cat"]))
    with pytest.raises(ValueError, match=message):
        marked({}, data, **options)


def test_a_model_is_measured_as_it_answers():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, max_position_embeddings=64, initializer_range=0.3, pad_token_id=3, **BERT)
    model, made = BertForQuestionAnswering(config).eval(), tokenizer(encoder=True)
    data = squad(*[("one two", LONG[at:], [LONG[at : at + 9].strip()]) for at in (30, 60, 120)])
    with torch.no_grad():
        outs = [model(**made("one two", row["context"], return_tensors="pt")) for row in data]
    f1 = 0.0
    for row, out in zip(data, outs, strict=True):
        encoded = made("one two", row["context"], return_offsets_mapping=True)
        its = [at for at, part in enumerate(encoded.sequence_ids()) if part == 1]
        pairs = [(first, last) for first in its for last in its if first <= last < first + 30]
        first, last = max(pairs, key=lambda pair: float(out.start_logits[0, pair[0]] + out.end_logits[0, pair[1]]))
        places = encoded["offset_mapping"]
        f1 += best(overlap, row["context"][places[first][0] : places[last][1]], row["answer"]["text"]) / 3
    task = CLS(CLS.Config(max_length=64, stride=8, batch_size=2))
    assert run_task(task, model, task.prepare(data, made, model))["f1"] == pytest.approx(f1)
