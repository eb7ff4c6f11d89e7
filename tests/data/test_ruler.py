"""Rows like RULER's: what is asked for is what a reader of the row finds, and all have the length that is asked for."""

import random
import re
import statistics
from collections import Counter

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from attn_plugins.data.context_questions import question_rows
from attn_plugins.data.recall import Stretches
from attn_plugins.data.ruler import RULER, Source, ruler_rows, words_of

CHANCE = random.Random(0)
VOCABULARY = ["".join(CHANCE.choices("abcdefghijklmnop", k=CHANCE.randint(4, 8))) for _ in range(300)]
TEXTS = [" ".join(word + CHANCE.choice(["", "", "", "."]) for word in CHANCE.choices(VOCABULARY, k=400)) for _ in "abc"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of letters, which begins texts with a token of its own and has a chat template."""
    printable = [chr(number) for number in range(32, 127)] + ["\n"]
    vocabulary = {word: number for number, word in enumerate(["<s>", "<unk>", *printable])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def source(letters):
    documents = [letters(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    text, words = Stretches(documents, letters), words_of(TEXTS)
    return Source(text=text, words=words, tokenizer=letters, needles=4, chains=2, hops=3)


def read(letters, row, part):
    """(all of the row as text, its body, its answers)"""
    ids = row.input_ids_N.tolist()
    start, stop = row.answers["text"]
    return (
        letters.decode(ids),
        letters.decode(ids[start - 1 : stop]),
        [letters.decode(ids[a:b]) for a, b in row.spans(part)],
    )


@pytest.mark.parametrize("part", sorted(RULER))
@pytest.mark.parametrize("length", [1500, 3001])
def test_rows_have_the_tokens_that_are_asked_for_and_end_with_the_last_answer(letters, source, part, length):
    rows = ruler_rows(source, part, length=length, count=4)
    assert [len(row.input_ids_N) for row in rows] == [length] * 4
    assert len({tuple(row.input_ids_N.tolist()) for row in rows}) == 4
    for row in rows:
        spans = row.spans(part)
        assert row.input_ids_N[0] == letters.bos_token_id
        assert (spans, spans[-1][1]) == (sorted(spans), length)
        assert row.answers["text"][1] < spans[0][0]
        _, body, answers = read(letters, row, part)
        assert all(re.fullmatch(r" \w+", answer) for answer in answers), "whole, and nothing else"
        if part != "common-words":
            for line in body.split("\n"):
                assert line.startswith(("One of", "VAR")) or line.strip() in " ".join(TEXTS) or "" in line.split(" ")
    again = ruler_rows(source, part, length=length, count=4)
    assert all((one.input_ids_N == other.input_ids_N).all() for one, other in zip(rows, again, strict=True))
    (other, *_) = ruler_rows(source, part, length=length, count=4, seed=1)
    assert not (other.input_ids_N == rows[0].input_ids_N).all()


def test_the_number_of_the_key_that_is_asked_for_is_the_answer_and_each_place_is_asked_for_in_turn(letters, source):
    asked, depths = [], []
    for row in ruler_rows(source, "multikey", length=2500, count=8):
        text, body, (answer,) = read(letters, row, "multikey")
        numbers = dict(re.findall(r"\nOne of the special magic numbers for (\w+) is: (\d{7})\.\n", body))
        (key,) = re.findall(r"What is the special magic number for (\w+) mentioned", text)
        assert len(numbers) == len(set(numbers.values())) == 4
        assert answer == f" {numbers[key]}"
        asked.append(list(numbers).index(key))
        depths.append(body.index(f"for {key} is") / len(body))
    assert asked == [0, 0, 1, 1, 2, 2, 3, 3]
    assert min(depths) < 0.3
    assert max(depths) > 0.7


def test_sentences_stand_between_sentences_of_the_text(letters, source):
    for row in ruler_rows(source, "multikey", length=2500, count=3):
        _, body, _ = read(letters, row, "multikey")
        assert len(re.findall(r"(?:\.|\.\n)\nOne of the special", body)) == 4


def test_all_numbers_are_asked_for_in_the_order_of_the_question(letters, source):
    orders = []
    for row in ruler_rows(source, "multiquery", length=2000, count=4):
        text, body, answers = read(letters, row, "multiquery")
        numbers = dict(re.findall(r"One of the special magic numbers for (\w+) is: (\d{7})\.", body))
        (keys,) = re.findall(r"What are all the special magic numbers for (.*) mentioned in the provided text\?", text)
        keys = keys.replace(" and ", " ").split(", ")
        assert [f" {numbers[key]}" for key in keys] == answers
        orders.append([list(numbers).index(key) for key in keys])
    assert len(set(map(tuple, orders))) > 1


def test_the_variables_that_have_the_value_are_those_that_an_interpreter_finds(letters, source):
    chains = []
    for row in ruler_rows(source, "variable-tracking", length=2500, count=4):
        text, body, answers = read(letters, row, "variable-tracking")
        example, whole = text[: text.index(body)], text[text.index(body) :]
        for read_in, said in ((example, None), (whole, answers)):
            values = {}
            for name, other, number in re.findall(r"^VAR (\w+) = (?:VAR (\w+)|(\d+))$", read_in, re.MULTILINE):
                values[name] = values[other] if other else number
            (value,) = re.findall(r"all variables that are assigned the value (\d+) in", read_in)
            having = [name for name, its in values.items() if its == value]
            assert (len(values), len(having)) == (8, 4)
            if said is None:
                assert f"they are: {', '.join(having)}\n\n" in example
            else:
                assert [f" {name}" for name in having] == said
        assert not set(answers) & set(re.findall(r" [A-Z]{5}\b", example)), "the example gives nothing away"
        chains.append(next(iter(values.values())) == value)
    assert len(set(chains)) == 2, "not always the chain that begins"


def test_the_three_words_are_the_most_common_ones_by_far(letters, source):
    for length in (1000, 4000):
        for row in ruler_rows(source, "common-words", length=length, count=3):
            _, body, answers = read(letters, row, "common-words")
            counts = Counter(body[len(body) % 2 :].split())
            common = counts.most_common(4)
            assert [f" {word}" for word, _ in common[:3]] == answers
            first, second, third, other = (number for _, number in common)
            assert first > second > third >= 3 * other
            assert third >= 5 * statistics.mode(counts.values())


def test_the_shortest_list_has_words_that_are_common_too(letters, source):
    with pytest.raises(ValueError, match="allowed: at least") as short:
        ruler_rows(source, "common-words", length=400, count=1)
    least = int(re.search(r"at least (\d+)", str(short.value))[1]) + 60
    (row,) = ruler_rows(source, "common-words", length=least, count=1)
    _, body, answers = read(letters, row, "common-words")
    counts = Counter(body.split())
    assert min(counts[answer.strip()] for answer in answers) >= 5 * statistics.mode(counts.values())


@pytest.mark.parametrize("part", sorted(RULER))
def test_with_a_chat_template_the_row_is_what_the_template_makes_of_it(letters, source, part):
    (row,) = ruler_rows(source, part, length=1600, count=1, chat=True)
    text, _, _ = read(letters, row, part)
    asked = text.removeprefix("<user>").partition("</><assistant>\n")
    said = [{"role": "user", "content": asked[0]}]
    assert letters.apply_chat_template(said, tokenize=False, add_generation_prompt=True) + asked[2] == text
    assert asked[2][0] in "TA", "no space before the assistant's first word"
    assert len(row.input_ids_N) == 1600


QUESTIONS = Dataset.from_list(
    [
        {
            "question": f"Who is {name}? ",
            "context": f"{TEXTS[0][50 * at : 50 * at + 100]} {name} is Dr{name.upper()}, "
            f"not Dr{VOCABULARY[at + 1].upper()}. {'x' * 7 * at}",
            "answer": {"text": [f"Dr{name.upper()}", "another"], "answer_start": [0, 0]},
        }
        for at, name in enumerate(VOCABULARY[:20])
    ]
    + [{"question": "Why?", "context": "No answer. " * 9, "answer": {"text": [], "answer_start": []}}]
)


def test_a_questions_answer_stands_in_one_whole_passage_and_nowhere_else(letters):
    kept, places = [], []
    for length in (900, 2000):
        rows = question_rows(QUESTIONS, letters, length=length, count=5)
        assert [len(row.input_ids_N) for row in rows] == [length] * 5
        names = []
        for row in rows:
            text, body, (answer,) = read(letters, row, "context-qa")
            (name,) = re.findall(r"Question: Who is (\w+)\? Answer:", text)
            (asked,) = (one for one in QUESTIONS if f"Who is {name}?" in one["question"])
            assert answer == f" {asked['answer']['text'][0]}"
            assert body.count(answer) == 1
            assert f"Passage:\n{asked['context'].strip()}\n\n" in body
            assert body.endswith("\n\n")
            passages = re.findall(r"(?:^|\n\n)Passage:\n(.*?)\n\n", body.replace("\n\n", "\n\n\n\n"))
            assert len(set(passages)) == len(passages) > 1
            assert "No answer" not in body
            names.append(name)
            places.append((length, passages.index(asked["context"].strip()) / (len(passages) - 1)))
        kept.append(names)
    assert kept[0] == kept[1]
    far = [place for length, place in places if length == 2000]
    assert (far, far[0] < 0.3, far[-1] > 0.7) == (sorted(far), True, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 300}, r"length=300; 0 of 20 questions with an answer fit into it .* at most 0 rows"),
        ({"length": 900, "count": 21}, r"length=900; 20 of 20 questions .* allowed: a greater length, or at most 20"),
        ({"length": 9000}, r"the passages without the answer 'Dr\w+' have [\d,]+ tokens, and [\d,]+ more are needed"),
    ],
)
def test_questions_that_do_not_fit_are_an_error(letters, options, message):
    with pytest.raises(ValueError, match=message):
        question_rows(QUESTIONS, letters, **{"count": 2, **options})


@pytest.mark.parametrize(
    ("part", "length", "message"),
    [
        ("multikey", 500, r"length=500; allowed: at least \d+ for multikey with this tokenizer$"),
        ("variable-tracking", 500, r"length=500; allowed: at least \d+ for variable-tracking"),
        ("common-words", 400, r"length=400; allowed: at least \d+ for common-words"),
        ("multikey", 99_999, "the text has .* tokens, which gives no stretch of"),
        ("needle", 500, r"part='needle'; allowed: multikey, multiquery, variable-tracking, common-words"),
    ],
)
def test_what_cannot_be_made_is_an_error(source, part, length, message):
    with pytest.raises(ValueError, match=message):
        ruler_rows(source, part, length=length, count=1)


def test_the_least_length_that_an_error_names_is_enough(source):
    for part in RULER:
        with pytest.raises(ValueError, match="at least") as error:
            ruler_rows(source, part, length=300, count=1)
        (least,) = re.findall(r"at least (\d+)", str(error.value))
        assert len(ruler_rows(source, part, length=int(least) + 40, count=1)) == 1


def test_too_few_words_and_no_chat_template_are_errors(letters, source, monkeypatch):
    few = Source(**{**vars(source), "words": VOCABULARY[:99]})
    with pytest.raises(ValueError, match=r"the text has 99 different words .* allowed: at least 100 for common-words"):
        ruler_rows(few, "common-words", length=2000, count=1)
    monkeypatch.setattr(letters, "chat_template", "{{ messages[0].content | upper }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match="chat template says 2 times what the user says; allowed: chat=False"):
        ruler_rows(source, "multikey", length=2000, count=1, chat=True)
    monkeypatch.setattr(letters, "chat_template", None)
    with pytest.raises(ValueError, match="the tokenizer has no chat template; allowed: chat=False"):
        ruler_rows(source, "multikey", length=2000, count=1, chat=True)
