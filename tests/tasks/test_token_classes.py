"""Classes of rows that tasks make themselves, of lists and of pixels, and of halves that belong together."""

import pictured
import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer, ModernBertConfig, ModernBertForSequenceClassification

from attn_plugins.data.halves import paired_halves
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.data.synthetic.listops import END, FIRST, OPERATIONS, PAD, TOKENS, result
from attn_plugins.tasks import get_task, run_task
from attn_plugins.tasks.token_classes import masked

pytestmark = pytest.mark.usefixtures("one_thread")


def task(name, **options):
    cls = get_task(name)
    return cls(cls.Config(**options))


def encoder(labels, vocab_size=TOKENS, length=64):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"])
    config = ModernBertConfig(vocab_size=vocab_size, **sizes, **ids, pad_token_id=0, max_position_embeddings=length)
    config.layer_types = ["full_attention"]
    config.id2label, config.label2id = dict(enumerate(labels)), {name: at for at, name in enumerate(labels)}
    torch.manual_seed(0)
    return ModernBertForSequenceClassification(config).eval()


def value(tokens):
    """What comes of a list, worked out from its tokens by a stack."""
    stack = [[]]
    for token in tokens:
        if token < 10:
            stack[-1].append(token)
        elif token == END:
            operation, *values = stack.pop()
            stack[-1].append(result(operation, values))
        else:
            stack.append([OPERATIONS[token - 10]])
    ((found,),) = stack
    return found


SHORT = {"min_length": 10, "max_length": 40, "train_rows": 30, "rows": 25, "batch_size": 7}


def test_lists_come_to_what_their_label_says():
    made = task("listops", **SHORT)
    rows = made.made(None, None, False)
    for ids, length, label in zip(*(rows[name].tolist() for name in ("input_ids", "length", "label")), strict=True):
        assert 10 <= length <= 40
        assert ids[0] == FIRST
        assert ids[length:] == [PAD] * (40 - length)
        assert value(ids[1:length]) == label
    assert len(rows["label"].unique()) > 4
    assert [result(name, [7, 3, 4, 9]) for name in OPERATIONS] == [3, 9, 5, 3]
    assert result("MED", [9, 1, 4]) == 4


def test_lists_that_are_held_out_are_none_of_those_to_train_on():
    made = task("listops", min_length=4, max_length=8, max_depth=2, max_args=2, train_rows=2000, rows=2000)
    sides = [{tuple(row) for row in made.made(None, None, side)["input_ids"].tolist()} for side in (False, True)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert max(map(len, sides)) < 1500, "chance would have them share rows"


def test_rows_are_filled_up_and_what_with_is_masked():
    made = task("listops", **SHORT)
    model = encoder(made.labels(None))
    batches = made.prepare(None, None, model)
    assert [len(batch["labels"]) for batch in batches] == [7, 7, 7, 4]
    lengths = made.made(None, None, True)["length"]
    assert torch.equal(torch.cat([batch["attention_mask"].sum(1) for batch in batches]), lengths)
    for batch in batches:
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"] != PAD, batch["attention_mask"].bool())
    found = run_task(made, model, batches)
    with torch.no_grad():
        rows = made.made(None, None, True)
        alone = [
            model(ids[None, :length]).logits.argmax().item()
            for ids, length in zip(*list(rows.values())[:2], strict=True)
        ]
    assert found["accuracy"] == sum(a == b for a, b in zip(alone, rows["label"].tolist(), strict=True)) / 25
    assert found["rows"] == 25
    one = made.collator(None, model)([made.examples(None, None, model)[number] for number in (3, 4)])
    assert set(one) == {"input_ids", "attention_mask", "labels"}
    assert set(masked({"input_ids": torch.zeros(2, 3), "label": torch.zeros(2)})) == {"input_ids", "labels"}


def test_pixels_are_levels_of_grey_line_by_line(tmp_path):
    folder = pictured.pictures(tmp_path / "data", rows=24, columns=["label"])
    made = task("pixels", image_size=6, levels=4)
    train, held_out = load_data(DataConfig(source=folder, eval_fraction=0.25), made.columns)
    model = encoder(made.labels(train), vocab_size=5)
    rows = made.made(train, model, False)
    assert rows["input_ids"].shape == (18, 37)
    assert (rows["input_ids"][:, 0] == 4).all(), "the first token is no level"
    assert rows["input_ids"][:, 1:].max() <= 3
    assert len({tuple(row) for row in rows["input_ids"].tolist()}) > 1
    assert [list(model.config.label2id)[label] for label in rows["label"]] == [str(one) for one in train["label"]]
    assert run_task(made, model, made.prepare(held_out, None, model))["rows"] == 6


def test_a_picture_becomes_its_shades():
    from io import BytesIO

    from PIL import Image

    from attn_plugins.data.pictures import grey_levels

    picture, file = Image.new("L", (4, 2)), BytesIO()
    picture.putdata([0, 64, 128, 255, 10, 70, 130, 250])
    picture.save(file, "PNG")
    value = {"bytes": file.getvalue(), "path": None}
    assert grey_levels(value, 2, 256).tolist() == [32, 192, 40, 190], "means of what is made smaller, line by line"
    assert grey_levels(value, 2, 4).tolist() == [0, 3, 0, 2]


def test_every_other_half_is_of_another_text():
    texts = ["a" * 25 + "b" * 25, "c" * 50, "too short", "d" * 24]
    rows = paired_halves(Dataset.from_dict({"text": texts}), 10, 4, seed=0)
    assert len(rows) == 2 + 2 + 1
    assert [sorted(rows["label"][place : place + 2]) for place in (0, 2)] == [["other", "same"]] * 2
    assert all(len(rows[side][number]) == 10 for side in ("text", "text_pair") for number in range(5))
    assert (rows["text"][0], rows["text_pair"][0]) == ("a" * 10, "a" * 10)
    for first, second, label, whose in zip(*(rows[name] for name in rows.column_names), [0, 0, 1, 1, 3], strict=True):
        text, at = texts[whose], texts[whose].index(first)
        if label == "same":
            assert second == text[at + 14 : at + 24]
        else:
            assert not set(text) & set(second), "of the same text"
    assert rows["text"][2] == "c" * 10
    again = paired_halves(Dataset.from_dict({"text": texts}), 10, 4, seed=0)
    assert again["text_pair"] == rows["text_pair"]
    with pytest.raises(ValueError, match="of 4 texts, 0 have 84 characters, of which a piece is made"):
        paired_halves(Dataset.from_dict({"text": texts}), 40, 4, seed=0)


def test_where_a_half_stands_in_its_text_does_not_tell_its_class():
    data = Dataset.from_dict({"text": [f"{'begin':<24}{'end':<24}"] * 200})
    rows = paired_halves(data, 10, 4, seed=0)
    begins = [label for text, label in zip(rows["text"], rows["label"], strict=True) if text.startswith("begin")]
    assert rows["label"].count("same") == 200
    assert 70 < begins.count("same") < 130


def test_halves_are_read_in_one_row():
    made, maker = task("matching-halves", half=10, gap=4, batch_size=2), ByT5Tokenizer(extra_ids=0)
    data = Dataset.from_dict({"text": ["a" * 50, "c" * 50]})
    model = encoder(made.labels(data), vocab_size=len(maker))
    batches = made.prepare(data, maker, model)
    assert batches[0]["input_ids"][0].tolist() == [100] * 10 + [1] + [100] * 10 + [1]
    assert batches[0]["labels"].tolist() == [1, 0]
    found = run_task(made, model, batches)
    assert (found["rows"], found["majority"]) == (4, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("listops", {"min_length": 600}, "min_length=600; allowed: 1 to half of max_length"),
        ("listops", {"max_args": 1}, "max_args=1; allowed: at least 2"),
        ("listops", {"max_depth": 1}, "max_depth=1; allowed: at least 2"),
        ("listops", {"rows": 0}, "rows=0; allowed: at least 1"),
        ("pixels", {"image_size": 0}, "image_size=0; allowed: 1 to 1024"),
        ("pixels", {"levels": 1}, "levels=1; allowed: 2 to 256"),
        ("matching-halves", {"half": 0}, "half=0; allowed: at least 1"),
        ("matching-halves", {"gap": -1}, "gap=-1; allowed: at least 0"),
        ("matching-halves", {"max_length": 0}, "max_length=0; allowed: at least 1"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        task(name, **options)


def test_what_does_not_fit_the_model_is_said():
    made = task("listops", **{**SHORT, "max_length": 65})
    with pytest.raises(ValueError, match="rows need max_position_embeddings=65 or more, and the model has 64"):
        made.prepare(None, None, encoder(made.labels(None)))
    made = task("listops", **SHORT)
    with pytest.raises(ValueError, match="rows need vocab_size=17 or more, and the model has 16"):
        made.examples(None, None, encoder(made.labels(None), vocab_size=16))
    made = task("listops", min_length=100, max_length=200, max_depth=2, max_args=2, rows=1)
    with pytest.raises(
        ValueError, match="lists of at most 2 arguments, 2 deep, hardly have 100 to 200 tokens; allowed"
    ):
        made.made(None, None, True)
