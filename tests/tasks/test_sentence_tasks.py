"""Embeddings of texts: figures against what they are by hand, rows that are no use, what is written and where."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_rows
from datasets import Dataset

from attn_plugins.core.options import build
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.tasks import get_task
from attn_plugins.training.config import FinetuneConfig


def made(name, **options):
    cls = get_task(name)
    return cls(build(cls.Config, options, "options"))


def sums(vectors, rows):
    return {
        "vectors": [np.array(vector, "float32") for vector in vectors],
        "numbers": [*range(len(vectors))],
        "rows": rows,
    }


class Embedder:
    """Stands for a SentenceTransformer where nothing is embedded."""

    config = SimpleNamespace(max_position_embeddings=32)

    def preprocess(self, texts):
        return {"texts": texts}


def test_a_rank_is_among_all_second_texts():
    # Texts 0 to 2 on three axes; their pairs, texts 3 to 5: the own one the nearest, the second nearest, the last.
    vectors = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [5, 1, 0.1], [3, 2, 0.1], [3, 2.1, 0]]
    found = made("sentence-embedding", recall_at=[1, 2]).finish(sums(vectors, [(0, 3), (1, 4), (2, 5)]))
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found["recall_at_1"] == pytest.approx(1 / 3)
    assert found["recall_at_2"] == pytest.approx(2 / 3)
    assert (found["candidates"], found["rows"]) == (3, 3)


def test_embeddings_that_are_all_the_same_find_nothing():
    found = made("sentence-embedding").finish(sums([[1, 2]] * 8, [(number, number + 4) for number in range(4)]))
    assert found["mrr"] == pytest.approx(1 / 4)
    assert found["recall_at_1"] == 0


def test_several_pairs_of_a_text_are_all_right():
    vectors = [[1, 0], [0, 1], [1, 0.1], [1, 0.2], [0.1, 1]]
    found = made("sentence-embedding").finish(sums(vectors, [(0, 2), (0, 3), (1, 4)]))
    assert found["recall_at_1"] == 1


def test_a_batch_embeds_its_texts_once_and_short_pairs_come_first():
    data = Dataset.from_dict({"text": ["aaaa", "bb", "bb"], "text_pair": ["dddd", "c", "aaaa"]})
    batches = made("sentence-embedding", batch_size=2).prepare(data, None, Embedder())
    assert [batch["inputs"]["texts"] for batch in batches] == [["bb", "c", "aaaa"], ["aaaa", "dddd"]]
    names = {n: text for batch in batches for n, text in zip(batch["numbers"], batch["inputs"]["texts"], strict=True)}
    rows = [tuple(names[number] for number in row) for batch in batches for row in batch["rows"]]
    assert rows == [("bb", "c"), ("bb", "aaaa"), ("aaaa", "dddd")]


def test_correlation_is_that_of_ranks():
    vectors = [[1, 0], [1, 0.1], [1, 1], [0, 1]]
    rows = [(0, 1, 100.0), (0, 2, 2.0), (0, 3, 1.5)]
    found = made("sentence-similarity").finish(sums(vectors, rows))
    assert found["spearman"] == pytest.approx(1)
    assert 0 < found["pearson"] < 0.95
    assert made("sentence-similarity").finish(sums([[1, 0]] * 4, rows))["spearman"] == 0


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("sentence-embedding", {"text": ["a", "b"], "text_pair": ["c", "c"]}, "1 different second texts; allowed: at"),
        (
            "sentence-similarity",
            {"text": ["a", "b"], "text_pair": ["c", "d"], "score": [1, 1]},
            r"have the scores \[1\]; allowed: at least two",
        ),
    ],
)
def test_rows_that_cannot_be_measured(task, rows, message):
    with pytest.raises(ValueError, match=message):
        made(task).prepare(Dataset.from_dict(rows), None, Embedder())


@pytest.mark.parametrize(
    ("task", "options", "scores", "message"),
    [
        ("sentence-embedding", {"max_length": 33}, [0, 1], "max_length=33; allowed: at most 32, the model's max_pos"),
        ("sentence-similarity", {}, [2, 2], "the 2 rows to train on all have the score 2; allowed: at least two"),
        ("sentence-similarity", {"loss": "cosine"}, [0, 5], "scores from 0 to 5; allowed with loss='cosine': -1 to 1"),
    ],
)
def test_rows_that_cannot_be_trained_on(task, options, scores, message):
    data = Dataset.from_dict({"text": ["a", "b"], "text_pair": ["c", "d"], "score": scores})
    with pytest.raises(ValueError, match=message):
        made(task, **options).examples(data, None, Embedder())


@pytest.mark.parametrize(("size", "rows"), [(1, 9), (8, 1)])
def test_a_batch_of_one_pair_has_no_negatives(size, rows):
    arguments = SimpleNamespace(per_device_train_batch_size=size)
    with pytest.raises(
        ValueError, match="batches of 1 pair have no other to tell a text's own from; allowed: at least 2"
    ):
        made("sentence-embedding").make_trainer(args=arguments, train_dataset=range(rows))


@pytest.mark.parametrize(
    ("columns", "scores", "message"),
    [
        ({}, [1.5, 2], r"text_pair_column names no column, and the task needs one; .*jsonl has: text, other, alike"),
        (
            {"text_pair_column": "other"},
            ["much", "little"],
            r"column 'alike' \(label_column\) holds string; allowed: a nu",
        ),
        (
            {"text_pair_column": "other"},
            [1.5, float("nan")],
            r"column 'alike' \(label_column\) holds numbers that are not",
        ),
    ],
)
def test_columns_of_scored_pairs(tmp_path, columns, scores, message):
    rows = [{"text": "a", "other": "b", "alike": score} for score in scores] * 2
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(source=source, label_column="alike", **columns), get_task("sentence-similarity").columns)


def test_a_sentence_transformer_is_not_distilled():
    tree = {"model": "m", "data": {"source": "d.jsonl"}, "output_dir": "out", "attention": "local", "loss": "kl"}
    with pytest.raises(ValueError, match="loss='kl' is not for task='sentence-embedding'; allowed: loss='task'"):
        build(FinetuneConfig, {**tree, "task": "sentence-embedding"})
