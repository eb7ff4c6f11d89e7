"""Where text comes from, and what becomes of it."""

import json

import pytest
from conftest import WORDS, tokenizer, write_rows
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.data.text import check_classes, label_names, labelled_examples, python_docs, token_blocks


def texts(data):
    return list(data["text"])


def test_python_docs_are_the_same_each_time_and_split_by_topic():
    first, second = python_docs(), python_docs()
    for split in ("train", "validation"):
        assert first[split].to_dict() == second[split].to_dict()
        assert all(texts(first[split]))
    assert len(first["train"]) > 5 * len(first["validation"]) > 20
    assert not set(first["train"]["topic"]) & set(first["validation"]["topic"])
    train, held_out = load_data(DataConfig(source="python-docs"))
    assert (texts(train), texts(held_out)) == (texts(first["train"]), texts(first["validation"]))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt"])
def test_local_files_of_each_kind(tmp_path, suffix):
    rows = [f"text {number}" for number in range(10)]
    if suffix == "txt":
        for number, row in enumerate(rows):
            (tmp_path / f"{number}.txt").write_text(row + "\n\nsecond paragraph", encoding="utf-8")
        train, held_out = load_data(DataConfig(source=str(tmp_path / "*.txt"), eval_fraction=0.2))
        rows = [row + "\n\nsecond paragraph" for row in rows]  # a file is one text, not one a line
    else:
        getattr(Dataset.from_dict({"body": rows}), {"jsonl": "to_json"}.get(suffix, f"to_{suffix}"))(
            tmp_path / f"t.{suffix}"
        )
        train, held_out = load_data(
            DataConfig(source=str(tmp_path / f"t.{suffix}"), text_column="body", eval_fraction=0.2)
        )
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted([*texts(train), *texts(held_out)]) == rows
    assert train.column_names == ["text"]


def test_the_held_out_rows_stay_the_same_and_are_not_trained_on(text):
    one, two = load_data(DataConfig(source=text)), load_data(DataConfig(source=text))
    assert texts(one[1]) == texts(two[1])
    assert len(one[0]) + len(one[1]) == 40
    assert not set(texts(one[0])) & set(texts(one[1]))


def test_a_file_of_its_own_for_evaluation_and_row_limits(tmp_path, text):
    other = write_rows(tmp_path / "other.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    train, held_out = load_data(DataConfig(source=[text], eval_source=other, max_train_rows=7, max_eval_rows=2))
    assert (len(train), texts(held_out)) == (7, ["a", "b"])


def test_a_saved_data_set_with_its_own_splits(tmp_path):
    parts = {"train": Dataset.from_dict({"text": ["x"]}), "test": Dataset.from_dict({"text": ["y"]})}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    train, held_out = load_data(DataConfig(source=str(tmp_path / "saved"), eval_split="test"))
    assert (texts(train), texts(held_out)) == (["x"], ["y"])
    with pytest.raises(ValueError, match="has no split 'training'; it has: train, test"):
        load_data(DataConfig(source=str(tmp_path / "saved"), train_split="training"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "nothing.jsonl"}, "no such file or folder: nothing.jsonl"),
        ({"source": "/nowhere/at/all"}, "no such file or folder: /nowhere/at/all"),
        ({"source": "*.jsonl"}, r"no such file or folder: \*.jsonl"),
        ({"source": ["one.jsonl", "two.jsonl"]}, "no such file or folder: one.jsonl"),
    ],
)
def test_missing_files_are_named(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(**settings))


def test_what_else_can_be_wrong_with_files(tmp_path, text):
    (tmp_path / "x.pdf").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"\n{"text"')
    one = write_rows(tmp_path / "one.jsonl", [{"text": "x"}])
    for settings, message in [
        ({"source": str(tmp_path / "x.pdf")}, r"suffixes \['.pdf'\]; allowed: files of one kind of .jsonl"),
        ({"source": [one, str(tmp_path / "x.pdf")]}, r"suffixes \['.jsonl', '.pdf'\]"),
        ({"source": str(tmp_path / "bad.jsonl")}, "cannot read .*bad.jsonl as .jsonl"),
        ({"source": text, "text_column": "body"}, r"has no column 'body' \(text_column\); it has: text"),
        ({"source": one}, "only 1 row, so nothing can be held out; name an eval_source"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_data(DataConfig(**settings))
    with pytest.raises(ValueError, match=r"has no column 'label' \(label_column\)"):
        load_data(DataConfig(source=text), ("text", "label"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"null", "a.json, line 1 is null; allowed: objects such as"),
        ("a.json", b"\n null null\n", "a.json, line 2 is null"),
        ("a.json", b'{"text": "x"}\nnull\n', "a.json, line 2 is null"),
        ("a.jsonl", b"null\nnull\n", "a.jsonl, line 1 is null"),
        ("a.jsonl", b'{"text": "x"}\nnull\n', "a.jsonl, line 2 is null"),
        ("a.json", b"", "a.json is empty"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.txt", "café".encode("latin-1"), "a.txt is not UTF-8: byte 0xe9; convert it, such as by iconv -f latin1"),
        ("a.csv", "text\ncafé\nb\n".encode("latin-1"), "a.csv is not UTF-8: byte 0xe9"),
        ("a.jsonl", '{"text": "café"}\n{"text": "b"}\n'.encode("latin-1"), "a.jsonl is not UTF-8: byte 0xe9"),
        ("a.csv", b"text\n1\n2\n3\n", r"a.csv: column 'text' \(text_column\) holds int64; allowed: strings"),
        ("a.jsonl", b'{"text": ["x"]}\n{"text": ["y"]}\n', r"column 'text' \(text_column\) holds List; allowed"),
        ("a.jsonl", b'{"text": {"a": "x"}}\n{"text": {"a": "y"}}\n', r"\(text_column\) holds dict; allowed: strings"),
        (
            "a.jsonl",
            b'{"text": null}\n{"text": null}\n',
            "column 'text' .* is null in 1 of 1 rows; fill them, or leave",
        ),
        ("a.csv", b"text,n\nx,1\n,2\n,3\ny,4\n", "a.csv: column 'text' .* is null in [12] of 3 rows; fill them"),
    ],
)
def test_files_that_would_be_read_wrong_or_end_the_process_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(source=str(tmp_path / name)))
    if "column" not in message:
        with pytest.raises(ValueError, match=message):
            load_data(DataConfig(source=str(tmp_path)))


def test_a_folder_is_not_refused_for_a_file_that_is_not_read(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}])
    (tmp_path / "NOTES.md").write_bytes("café".encode("latin-1"))
    assert len(load_data(DataConfig(source=str(tmp_path)))[0]) == 1


def test_json_that_is_read_rightly_stays(tmp_path):
    pretty = json.dumps([{"text": "é", "tags": [None]}, {"text": "b", "tags": [None]}], indent=1, ensure_ascii=False)
    assert "\n   null\n" in pretty
    (tmp_path / "a.json").write_text(pretty, encoding="utf-8")
    assert sorted(texts(load_data(DataConfig(source=str(tmp_path / "a.json"), eval_fraction=0.5))[0])) in (["b"], ["é"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", None, "b", None], r"t.jsonl: column 'label' \(label_column\) is null in 2 of 4 rows"),
        ([["a"], ["b"], ["a"], ["b"]], "column 'label' .* holds List; allowed: one class a row"),
        ([{"a": 1}] * 4, "column 'label' .* holds dict; allowed: one class a row, as a string or a whole number"),
        ([0.5, 1.5, 2.0, 3.0], "column 'label' .* holds float64; allowed: one class a row"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, message):
    path = write_rows(tmp_path / "t.jsonl", [{"text": "x", "label": label} for label in labels])
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(source=path, eval_source=path), ("text", "label"))
    load_data(DataConfig(source=path))


def test_numbers_of_classes_that_are_not_there_are_refused(tmp_path):
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    parts = {"train": [0, 1], "validation": [-1, -1]}  # as the test sets of the hub have it
    saved = DatasetDict(
        {n: Dataset.from_dict({"text": ["x", "y"], "label": v}, features=kinds) for n, v in parts.items()}
    )
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"holds numbers from -1 to -1 for 2 classes; allowed: 0 to 1\. Test sets"):
        load_data(DataConfig(source=str(tmp_path / "saved")), ("text", "label"))


@pytest.mark.parametrize("labels", [["a", "a"], [7, 7], [True, True]])
def test_rows_of_one_class_are_nothing_to_train_on(labels):
    rows = Dataset.from_dict({"text": ["x", "y"], "label": labels})
    with pytest.raises(
        ValueError, match=r"the 2 rows to train on are all of one class, .*; allowed: at least two classes"
    ):
        check_classes(rows)
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    with pytest.raises(ValueError, match="all of one class, 'pos'; allowed"):
        check_classes(Dataset.from_dict({"text": ["x", "y"], "label": [1, 1]}, features=kinds))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": ""}, "source=''; allowed: 'python-docs'"),
        ({"source": "x", "eval_fraction": 1.0}, "eval_fraction=1.0; allowed: between 0 and 1"),
        ({"source": "x", "max_eval_rows": 0}, "max_eval_rows=0; allowed: at least 1, or null"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_a_data_set_that_the_hub_does_not_give_is_one_clear_error(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError,
        match="'some/data' is neither 'python-docs' nor a local file, and the hub did not give it: no network",
    ):
        load_data(DataConfig(source="some/data"))


def test_blocks_lay_texts_end_to_end_with_an_end_token_after_each():
    maker = tokenizer()
    rows = Dataset.from_dict({"text": ["red green", "blue", "one two three cat dog"]})
    stream = ["red", "green", "</s>", "blue", "</s>", "one", "two", "three", "cat", "dog", "</s>"]
    blocks = token_blocks(rows, maker, 4)
    assert blocks.column_names == ["input_ids"]
    cut = [maker.convert_ids_to_tokens(block) for block in blocks["input_ids"]]
    assert cut == [stream[0:4], stream[4:8]]  # the last three are less than a block
    with pytest.raises(
        ValueError, match="3 texts give less than one block of 100 tokens; allowed: a smaller length, more text"
    ):
        token_blocks(rows, maker, 100)


def test_labels_get_the_models_numbers():
    maker = tokenizer(encoder=True)
    rows = Dataset.from_dict({"text": ["red", "green blue", "cat"], "label": ["b", "a", "b"]})
    assert label_names(rows) == ["a", "b"]
    made = labelled_examples(rows, maker, {"b": 0, "a": 1}, 3)
    assert made["labels"][:] == [0, 1, 0]
    assert maker.convert_ids_to_tokens(made["input_ids"][1]) == ["<s>", "green", "</s>"]  # cut to three
    with pytest.raises(ValueError, match=r"no class for the labels \['a'\]; its classes are \['b'\]"):
        labelled_examples(rows, maker, {"b": 0}, 3)


def test_labels_of_a_named_class_feature_go_by_name_then_by_number():
    maker = tokenizer(encoder=True)
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": ["red", "blue"], "label": [0, 1]}, features=kinds)
    assert label_names(rows) == ["neg", "pos"]
    assert labelled_examples(rows, maker, {"pos": 0, "neg": 1}, 9)["labels"][:] == [1, 0]
    assert labelled_examples(rows, maker, {"LABEL_0": 0, "LABEL_1": 1}, 9)["labels"][:] == [0, 1]
    numbers = Dataset.from_dict({"text": ["red"] * 11, "label": list(range(11))})
    assert label_names(numbers)[-1] == "10"


def test_pairs_of_texts(tmp_path):
    maker = tokenizer(encoder=True)
    rows = [{"q": "red", "r": "blue", "y": 1}, {"q": "cat", "r": "dog", "y": 0}]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    names = {"text_column": "q", "text_pair_column": "r", "label_column": "y"}
    train, held_out = load_data(DataConfig(source=path, eval_source=path, **names), ("text", "label"))
    made = labelled_examples(held_out, maker, {"0": 0, "1": 1}, 9)
    assert maker.convert_ids_to_tokens(made["input_ids"][0]) == ["<s>", "red", "</s>", "blue", "</s>"]
    assert sorted(train.column_names) == ["label", "text", "text_pair"]


def test_the_fixtures_are_text_that_the_tokenizer_knows(text):
    with open(text, encoding="utf-8") as lines:
        assert all(set(json.loads(line)["text"].split()) <= set(WORDS) for line in lines)
