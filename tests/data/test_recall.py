"""Rows for recall: answers are where they are said to be, and what was told stands as far away as was asked."""

import random

import pytest
import torch
from conftest import WORDS, tokenizer
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from attn_plugins.data.recall import PARTS, recall_rows

CHANCE = random.Random(0)
DOCUMENTS = [[CHANCE.randrange(200) for _ in range(size)] for size in (300, 40, 900, 500)]


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of letters, of digits three at a time, and of a space with the letter after it."""
    printable = [chr(number) for number in range(32, 127)] + ["\n"]
    merged = [f"{a}{b}" for a in "123456789" for b in "0123456789"] + [f" {letter}" for letter in "abcdefghijklmnop"]
    vocabulary = {word: number for number, word in enumerate(["<s>", "<unk>", *printable, *merged])}
    merges = [(word[0], word[1]) for word in merged]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


def told(part, answer):
    """What a row of this part has to say before it asks."""
    return {"passkey": f"key is {answer}.", "names": f": {answer.strip()}\n", "codes": f" is {answer}.\n"}[part]


@pytest.mark.parametrize("part", sorted(PARTS))
@pytest.mark.parametrize("length", [320, 450])
def test_answers_are_the_answers_tokens_and_stand_length_tokens_after_what_they_repeat(letters, part, length):
    rows = recall_rows(DOCUMENTS, letters, length=length, count=5, parts=[part], passage=30)
    assert len(rows) == 5
    for row in rows:
        ids = row.input_ids_N.tolist()
        assert (row.input_ids_N.dtype, len(ids)) == (torch.int64, length)
        assert len(row.spans(part)) == (5 if part == "names" else 1)
        middle = row.answers["text"][0] - 1
        for start, stop in row.spans(part):
            answer = ids[start:stop]
            assert middle < row.answers["text"][1] <= start < stop <= length
            before = [at for at in range(middle) if ids[at : at + stop - start] == answer]
            if part == "copy":
                assert stop == length
                assert stop - start == 30 - 8
                (at,) = before
                assert ids[at - 8 : at] == ids[start - 8 : start]
                assert start - at == length - 30 - 2 + 2, "all but the passage, which starts the row, and two newlines"
            else:
                text = letters.decode(answer)
                assert told(part, text) in letters.decode(ids[:middle])
                assert stop == length or letters.decode(ids[stop : stop + 1]) == "\n", "all of the answer"
                assert text.strip() == text or part == "names"
    assert len({tuple(row.input_ids_N.tolist()) for row in rows}) == 5


def test_several_parts_share_a_row_and_the_last_is_asked_for_first(letters):
    (row,) = recall_rows(DOCUMENTS, letters, length=700, count=1, parts=["names", "copy", "passkey"], passage=20)
    spans = list(row.answers.values())
    assert [name.split(" ")[0] for name in row.answers] == ["text", "copy", *["names"] * 5, "passkey"]
    assert spans == sorted(spans)
    assert spans[-1][1] == 700
    assert row.spans("codes") == []


def test_a_seed_gives_the_same_rows_and_another_one_others(letters):
    def made(seed, count=2):
        rows = recall_rows(DOCUMENTS, letters, length=300, count=count, seed=seed)
        return [row.input_ids_N.tolist() for row in rows]

    assert made(0) == made(0) == made(0, 4)[:2]
    assert not any(row in made(0) for row in made(1))


def test_a_row_begins_as_the_tokenizer_begins_texts(letters, monkeypatch):
    def first():
        (row,) = recall_rows(DOCUMENTS, letters, length=300, count=1, parts=["passkey"])
        return row.input_ids_N[:2].tolist()

    assert letters.decode(first()) == "Th"
    ends = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    monkeypatch.setattr(letters.backend_tokenizer, "post_processor", ends)
    assert first() == [0, letters("T", add_special_tokens=False)["input_ids"][0]]


def test_the_passage_is_of_the_text_and_not_in_what_lies_between(letters):
    document = list(range(1000, 1200))
    for seed in range(20):
        (row,) = recall_rows([document], letters, length=140, count=1, seed=seed, parts=["copy"], passage=40)
        ids, (start, stop) = row.input_ids_N.tolist(), row.answers["copy"]
        passage, between = ids[start - 8 : stop], ids[row.answers["text"][0] - 1 : row.answers["text"][1]]
        assert passage == list(range(passage[0], passage[0] + 40)), "in one piece"
        assert between == list(range(between[0], between[0] + len(between)))
        assert not set(passage) & set(between)


def test_short_documents_are_joined(letters):
    documents = [[1000 + n] * 30 for n in range(12)]
    (row,) = recall_rows(documents, letters, length=250, count=1, parts=["copy"], passage=20)
    ids, (start, stop) = row.input_ids_N.tolist(), row.answers["copy"]
    assert len(set(ids[start - 8 : stop])) == 1, "a document has room for the passage"
    newlines = letters("\n\n", add_special_tokens=False)["input_ids"]
    assert newlines[0] in ids[slice(*row.answers["text"])], "not for what lies between"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"length": 60, "parts": ["copy"]},
            "length=60; allowed: at least 134 for copy with this tokenizer and passage=64",
        ),
        ({"length": 60, "parts": ["passkey"]}, r"length=60; allowed: at least \d\d for passkey with this tokenizer$"),
        ({"length": 3000}, "the text has 1,748 tokens, which gives no stretch of 2... beside .* a smaller length"),
        (
            {"parts": ["copy"], "passage": 901, "length": 2800},
            "the text has 1,748 tokens, which gives no stretch of 994 beside",
        ),
        ({"parts": []}, r"parts=\[\]; allowed: any of passkey, names, codes, copy, each once"),
        ({"parts": ["key"]}, r"parts=\['key'\]; allowed: any of"),
        ({"parts": ["copy", "copy"]}, "each once"),
        ({"count": 0}, "count=0; allowed: at least 1"),
        ({"passage": 8}, "passage=8; allowed: more than the 8 tokens that are given of it"),
    ],
)
def test_what_cannot_be_made_is_an_error(letters, options, message):
    with pytest.raises(ValueError, match=message):
        recall_rows(DOCUMENTS, letters, **{"length": 400, "count": 1, **options})


def test_a_tokenizer_that_cannot_spell_an_answer_is_an_error():
    documents = [[WORDS.index("cat") + 4] * 300]
    with pytest.raises(ValueError, match=r"the tokenizer does not know the letters of '\d{7}', so that it cannot"):
        recall_rows(documents, tokenizer(), length=100, count=1, parts=["passkey"])
    (row,) = recall_rows(documents, tokenizer(), length=100, count=1, parts=["copy"], passage=20)
    assert row.answers == {"text": (21, 80), "copy": (88, 100)}
