"""Classes of words: spans as conlleval reads them, a word's class at its first token, figures counted by hand."""

import pytest
import torch
from conftest import tokenizer
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from attn_plugins.data.columns import named_by_role
from attn_plugins.data.tags import tag_names, tagged_examples
from attn_plugins.tasks import get_task, run_task
from attn_plugins.tasks.token_classification import spans, tell_spans

CLS = get_task("token-classification")
TAGS = ["O", "B-X", "I-X", "B-Y", "I-Y"]
DATA = Dataset.from_dict(
    {
        "words": [["the", "red", "cat", "is", "good"], ["one", "dog"], ["a", "blue", "dog", ".", "green", "cat"]],
        "tags": [["O", "B-X", "I-X", "O", "B-Y"], ["B-Y", "I-Y"], ["O", "B-X", "I-X", "O", "O", "B-Y"]],
    }
)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-X I-X O B-X", {("X", 0, 2), ("X", 3, 4)}),
        ("B-X B-X", {("X", 0, 1), ("X", 1, 2)}),
        ("B-X I-Y I-Y", {("X", 0, 1), ("Y", 1, 3)}),
        ("I-X I-X O I-Y", {("X", 0, 2), ("Y", 3, 4)}),
        ("B-X I-X E-X I-X S-Y B-X", {("X", 0, 3), ("X", 3, 4), ("Y", 4, 5), ("X", 5, 6)}),
        ("B-A-B I-A-B", {("A-B", 0, 2)}),
        ("", set()),
    ],
)
def test_spans_are_those_of_conlleval(tags, found):
    assert spans(tags.split()) == found


def test_which_classes_tell_spans():
    assert tell_spans(["O", "B-X", "I-X"])
    assert not tell_spans(["O"])
    assert not tell_spans(["NOUN", "VERB"])
    assert not tell_spans(["O", "B-X", "I-"])


class Answering(torch.nn.Module):
    """Says what it was told for each word of each row."""

    def __init__(self, rows, names):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rows, self.names = list(rows), names
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
        self.config = BertConfig(max_position_embeddings=64, **labels)

    def forward(self, input_ids, attention_mask, **others):
        logits = torch.zeros(*input_ids.shape, len(self.names))
        for row, said in enumerate(self.rows[: len(input_ids)]):
            for at, tag in enumerate(said, 1):  # <s> stands first
                logits[row, at, self.names.index(tag)] = 10
        self.rows = self.rows[len(input_ids) :]
        return type("Output", (), {"logits": logits})


SAID = [["O", "B-X", "I-X", "O", "B-X"], ["B-Y", "I-Y"], ["O", "B-X", "O", "O", "O", "B-Y"]]


def answered(rows, names=TAGS, data=DATA, **options):
    task = CLS(CLS.Config(max_length=32, **options))
    model = Answering(rows, names)
    return run_task(task, model, task.prepare(data, tokenizer(encoder=True), model))


def test_figures_are_those_counted_by_hand():
    for size in (1, 2, 3):
        found = answered(SAID, batch_size=size)
        # True: X1 X2 of row 1, Y of row 1, Y of row 2, X and Y of row 3; said right: X, Y, Y; said wrong: X, X (short).
        assert (found["spans"], found["words"], found["words_cut"]) == (5, 13, 0)
        assert (found["precision"], found["recall"], found["f1"]) == (3 / 5, 3 / 5, pytest.approx(3 / 5))
        assert found["accuracy"] == 11 / 13
        assert found["majority"] == 5 / 13
    perfect = answered(DATA["tags"])
    assert perfect["f1"] == perfect["accuracy"] == 1
    silent = answered([["O"] * 6] * 3)
    assert (silent["f1"], silent["precision"], silent["recall"]) == (0, 0, 0)
    cut = answered([row[:4] for row in DATA["tags"]], batch_size=3)
    assert cut["f1"] == pytest.approx(2 * 3 / (5 + 3))


def test_classes_that_tell_no_spans_are_measured_as_scikit_learn_does():
    names = ["A", "B", "C", "D"]
    true = [["A", "B", "A", "A", "C"], ["A", "B"], ["C", "C", "A", "A", "B", "A"]]
    said = [["A", "A", "A", "B", "C"], ["A", "B"], ["C", "A", "A", "A", "B", "D"]]
    data = Dataset.from_dict({"words": DATA["words"], "tags": true})
    found = answered(said, names, data, batch_size=2)
    flat = [[tag for row in rows for tag in row] for rows in (true, said)]
    assert found["f1"] == pytest.approx(f1_score(*flat, average="macro"))
    assert "precision" not in found


def test_words_beyond_the_cut_are_counted_and_not_measured():
    task = CLS(CLS.Config(max_length=5, batch_size=3))
    model = Answering([row[:3] for row in DATA["tags"]], TAGS)
    found = run_task(task, model, task.prepare(DATA, tokenizer(encoder=True), model))
    assert (found["words"], found["words_cut"], found["accuracy"], found["spans"]) == (3 + 2 + 3, 2 + 3, 1.0, 3)


def test_a_words_class_stands_at_its_first_token_as_in_running_text():
    letters = [chr(number) for number in range(33, 127)] + ["\u0120"]
    merges = [("c", "a"), ("ca", "t"), ("\u0120", "cat")]
    vocabulary = {word: at for at, word in enumerate([*letters, "ca", "cat", "\u0120cat"])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=made)
    data = Dataset.from_dict({"words": [["cat", "cat", "dog", "", "e"]], "tags": [["a", "b", "c", "a", "b"]]})
    (row,) = tagged_examples(data, made, {"a": 0, "b": 1, "c": 2}, 64)
    tokens = made.convert_ids_to_tokens(row["input_ids"])
    assert tokens[:5] == ["cat", "\u0120cat", "\u0120", "d", "o"]
    at = {place: label for place, label in enumerate(row["labels"]) if label != -100}
    assert list(at.values()) == [0, 1, 2, 1]
    assert list(at)[:2] == [0, 1]
    assert tokens[list(at)[2]] in ("\u0120", "d")
    assert list(at)[3] == len(tokens) - 1


def test_numbers_of_the_data_go_by_their_names_to_those_of_the_model():
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=["Y", "O", "X"]))})
    data = Dataset.from_dict({"words": [["cat", "dog", "red"]], "tags": [[0, 1, 2]]}, features=features)
    assert tag_names(data) == ["Y", "O", "X"]
    (row,) = tagged_examples(data, tokenizer(encoder=True), {"O": 0, "X": 1, "Y": 2}, 64)
    assert row["labels"] == [-100, 2, 0, 1, -100]
    with pytest.raises(
        ValueError, match=r"the model has no class for the labels \['X'\]; its classes are \['O', 'Y'\]"
    ):
        tagged_examples(data, tokenizer(encoder=True), {"O": 0, "Y": 1}, 64)


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        (["a b"], [["O", "O"]], r"t: column 'w' \(text_column\) holds string; allowed: a list of words a row"),
        ([[1, 2]], [["O", "O"]], "column 'w' .* holds lists of int64; allowed: a list of words"),
        (
            [["a"], None],
            [["O"], ["O"]],
            "column 'w' .* is null, or has a null, in 1 of 2 rows, the first of them row 2",
        ),
        ([["a"], ["b"]], [["O"], [None]], r"column 't' \(label_column\) is null, or has a null, in 1 of 2 rows"),
        ([["a"], ["b"]], ["O", "O"], "column 't' .* holds string; allowed: a list of classes a row, one for each word"),
        ([["a"], ["b"]], [[0.5], [1.0]], "column 't' .* holds lists of float64; allowed: a list of classes"),
        ([["a"], ["b", "c"]], [["O"], ["O"]], "has 1 classes in row 2 of 2, which has 2 words; allowed: one for each"),
    ],
)
def test_rows_that_do_not_fit(words, tags, message):
    with pytest.raises(ValueError, match=message):
        named_by_role(Dataset.from_dict({"w": words, "t": tags}), {"words": "w", "tags": "t"}, "t")


def test_numbers_without_a_class_and_a_single_class():
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=["Y", "O"]))})
    data = Dataset.from_dict({"words": [["cat"], ["dog"]], "tags": [[0], [-1]]}, features=features)
    with pytest.raises(ValueError, match="has -1 in row 2 of 2, and its classes are 0 to 1"):
        named_by_role(data, {"words": "words", "tags": "tags"}, "t")
    with pytest.raises(ValueError, match="the words of 1 rows to train on are all of one class, 'Y'; allowed"):
        tag_names(data.select([0]))


def test_a_model_is_measured_as_it_answers():
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(TAGS)), "label2id": {name: at for at, name in enumerate(TAGS)}}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, max_position_embeddings=64, initializer_range=0.3, pad_token_id=3, **sizes)
    config.update(names)
    model, made = BertForTokenClassification(config).eval(), tokenizer(encoder=True)
    said = []
    for words in DATA["words"]:
        with torch.no_grad():
            logits = model(**made(" ".join(words), return_tensors="pt")).logits[0, 1:-1]
        said.append([TAGS[at] for at in logits.argmax(-1).tolist()])
    task = CLS(CLS.Config(max_length=32, batch_size=3))
    found, expected = run_task(task, model, task.prepare(DATA, made, model)), answered(said)
    assert {**found, "loss": 0} == {**expected, "loss": 0}
