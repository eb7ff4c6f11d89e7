"""examples/training/make_tables.py: tables of three tasks, of texts whose authors marked what is asked for."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.tasks import trained_task

EXAMPLE = Path(__file__).parents[2] / "examples" / "training" / "make_tables.py"
MADE = runpy.run_path(str(EXAMPLE))
PACKAGES = [
    {
        "document": f"A tool that has the number {n} in it and does one thing well, again and again. "
        f"This package provides the library of number {n}.",
        "summary": f"tool {n}",
    }
    for n in range(8)
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["make_tables.py", *map(str, words), "--out", str(tmp_path / "out")])
        MADE["main"]()
        return tmp_path / "out"

    return call


@pytest.fixture
def summaries(tmp_path):
    folder = tmp_path / "summaries"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PACKAGES * 3))
    return folder


def test_marks_of_code_become_tags():
    prose = 'The name ``open file`` is taken, and so is "x" of it.'
    (row,) = MADE["words"]([f"{prose}\n\n    an example with ``code`` in it, indented\n\ntoo ``short``", prose])
    code = {"open": "B-CODE", "file": "I-CODE", "x": "B-CODE"}
    assert " ".join(row["words"]) == "The name open file is taken , and so is x of it ."
    assert row["tags"] == [code.get(word, "O") for word in row["words"]]


@pytest.mark.parametrize(
    ("table", "task", "columns"),
    [
        ("words", "token-classification", {"text_column": "words", "label_column": "tags"}),
        ("questions", "question-answering", {}),
        ("preference", "preference", {}),
    ],
)
def test_what_it_writes_is_data_for_the_task(write, summaries, table, task, columns):
    more = [] if table == "words" else ["--summaries", summaries]
    out = write(table, *more, "--train", 4, "--validation", 2)
    train, held_out = load_data(DataConfig(source=str(out), **columns), trained_task(task).columns)
    assert (len(train), len(held_out)) == (4, 2)


def test_questions_are_of_what_the_package_provides_and_each_stands_once():
    found = MADE["questions"](PACKAGES * 2)
    assert [row["answers"] for row in found] == [f"the library of number {n}" for n in range(8)]
    assert all(row["answers"] in row["context"] for row in found)


def test_what_is_rejected_is_of_another_package():
    rows = [{"document": str(n) * 200, "summary": str(n % 3)} for n in range(9)]
    found = MADE["preference"](rows)
    assert found
    assert all(row["chosen"] == str(int(row["prompt"][0]) % 3) != row["rejected"] for row in found)


def test_rows_are_of_the_whole_table():
    assert MADE["spread"]({"train": list(range(100))}, {"train": 4}) == {"train": [0, 25, 50, 75]}


def test_it_says_what_is_missing(write, summaries, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for split in ("train", "validation"):
        (empty / f"{split}.jsonl").write_text(json.dumps({"document": "short", "summary": "s"}) + "\n")
    for words, message in (
        (["questions"], "questions needs --summaries"),
        (["words", "--summaries", summaries], "words takes no --summaries"),
        (["preference", "--summaries", empty], "train: no row of the source is of the kind that preference takes"),
    ):
        with pytest.raises(SystemExit):
            write(*words)
        assert message in capsys.readouterr().err
