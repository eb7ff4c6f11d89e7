"""A comparison of several tasks: a column for each beside the first, and recall against distance."""

import json
import random
from pathlib import Path

import pytest
from conftest import WORDS, write_rows

from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.report import CompareResults, write_report
from attn_plugins.benchmark.compare.run import prepare_compare, run_compare
from attn_plugins.core.options import build

pytestmark = pytest.mark.usefixtures("one_thread")

COPY = {"task": "copy", "distances": [48, 96], "rows": 2, "passage": 16}
PERPLEXITY = {"task": "perplexity", "length": 16, "max_tokens": 64}


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    chance = random.Random(0)
    rows = [{"text": " ".join(chance.choices(WORDS, k=200))} for _ in range(4)]
    return write_rows(tmp_path_factory.mktemp("long") / "long.jsonl", rows)


def compared(model, text, out, evaluation, **changes):
    tree = {
        "models": {"tiny": model},
        "attentions": {"dense": None, "local": {"type": "local", "window_size": 4, "num_sink_tokens": 1}},
        "output_dir": str(out),
        "data": {"source": text, "eval_source": text},
        "evaluation": evaluation,
        **changes,
    }
    config = build(CompareConfig, tree)
    results = prepare_compare(config)
    run_compare(config, results, say=lambda line: None)
    found = CompareResults(config, results)
    assert not found.errors
    tables, files = write_report(config, results)
    return config, found, tables[0], {file.name for file in files}


def test_other_tasks_are_columns_and_recall_is_drawn(llama, long_text, tmp_path):
    training = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    finetune = {"block_size": 16, "lora": {"r": 2, "target_modules": ["v_proj"]}, "training": training}
    config, found, table, files = compared(llama, long_text, tmp_path / "out", [PERPLEXITY, COPY], finetune=finetune)
    assert "tiny_recall_vs_distance.png" in files
    assert table.header[:3] == ["attention", "stage", "perplexity"]
    place = table.header.index("copy")
    assert [row[1] for row in table.rows] == ["untrained", "fine-tuned"] * 2
    for row, (attention, measure) in zip(
        table.rows, [(a, m) for a in config.attentions for m in ("evaluate", "finetune")], strict=True
    ):
        (record,) = found.of("tiny", attention, measure)
        assert record["result"]["metric"] == "perplexity"
        assert float(row[place]) == pytest.approx(record["result"]["others"]["copy"]["accuracy"], abs=0.01)
        assert len(record["result"]["others"]["copy"]["by_distance"]) == 2
    assert "copy: accuracy, higher is better" in table.note
    assert "recalls" not in table.note
    folder = Path(found.of("tiny", "local", "finetune")[0]["result"]["folder"])
    assert json.loads((folder / "metrics.json").read_text())["recall"] is None, "asked for as a column alone"


def test_recall_can_come_first_and_its_distances_are_columns(llama, long_text, tmp_path):
    _, _, table, files = compared(llama, long_text, tmp_path / "out", [COPY, PERPLEXITY])
    assert table.header[:6] == ["attention", "stage", "accuracy", "at 48", "at 96", "perplexity"]
    assert "tiny_recall_vs_distance.png" in files


def test_perplexity_alone_is_said_to_show_no_recall_where_an_attention_was_swapped(llama, long_text, tmp_path):
    _, _, table, files = compared(llama, long_text, tmp_path / "out", PERPLEXITY)
    assert "Perplexity does not show whether the model still recalls what stood far away" in table.note
    assert "tiny_recall_vs_distance.png" not in files
    _, _, table, _ = compared(llama, long_text, tmp_path / "own", PERPLEXITY, attentions={"dense": None})
    assert "recalls" not in table.note


def test_lengths_of_perplexity_are_columns(llama, long_text, tmp_path):
    lengths = {"task": "perplexity", "lengths": [16, 48], "scored": 8, "max_tokens": 96}
    _, found, table, _ = compared(llama, long_text, tmp_path / "out", lengths, attentions={"dense": None})
    assert table.header[:5] == ["attention", "stage", "perplexity", "at 16", "at 48"]
    (record,) = found.of("tiny", "dense", "evaluate")
    assert [part["length"] for part in record["result"]["figures"]["by_length"]] == [16, 48]
    assert table.rows[0][2] == table.rows[0][4] != table.rows[0][3]


def test_the_key_of_a_cell_has_the_other_tasks_in_it(long_text):
    def keys(evaluation):
        tree = {
            "models": {"a": "b"},
            "attentions": {"dense": None},
            "output_dir": "o",
            "data": {"source": long_text},
            "evaluation": evaluation,
        }
        return {cell.key for cell in cells(build(CompareConfig, tree))}

    assert not keys([PERPLEXITY]) & keys([PERPLEXITY, COPY])


def test_wrong_lists_are_refused(long_text):
    with pytest.raises(ValueError, match=r"evaluation\.1\.task='accuracy' is for classification models"):
        build(
            CompareConfig,
            {
                "models": {"a": "b"},
                "attentions": {"dense": None},
                "output_dir": "o",
                "data": {"source": long_text},
                "evaluation": [PERPLEXITY, {"task": "accuracy"}],
            },
        )
