"""Records say what they hold: the page names each field, a run writes no other, and old files are read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from attn_plugins.benchmark.results.hashes import PIECE, PIECES, hashes_of, model_hash, rows_hash
from attn_plugins.benchmark.results.schema import FIELDS, RESULTS, SCHEMA, schema_tables
from attn_plugins.benchmark.results.store import Results
from attn_plugins.config.versions import hardware

DOCS = Path(__file__).parents[2] / "docs"
KEPT = sorted(path for path in DOCS.rglob("*.jsonl") if '"status"' in path.read_text().partition("\n")[0])


def undescribed(records):
    """Fields that no table names, of records and of what was measured."""
    found = {name for record in records for name in record if name not in FIELDS}
    ok = [record for record in records if record["status"] == "ok" and record["measure"] in RESULTS]
    return found | {name for record in ok for name in record["result"] if name not in RESULTS[record["measure"]]}


def test_the_page_is_of_the_code():
    assert schema_tables() in (DOCS / "results.md").read_text()
    assert f"Schema {SCHEMA}." in (DOCS / "results.md").read_text()


def test_a_field_that_no_table_names_is_found():
    assert undescribed([{"status": "ok", "measure": "speed", "result": {"passes": {}, "speed": 1}, "new": 1}]) == {
        "new",
        "speed",
    }


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_files_of_earlier_versions_are_read(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert Results(path).records == {line["key"]: line for line in lines}


def test_records_of_a_later_schema_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path).add({"key": "a", "status": "ok"})
    assert json.loads(path.read_text())["schema"] == SCHEMA
    for end in ("\n", ""):
        path.write_text(json.dumps({"key": "a", "status": "ok", "schema": SCHEMA + 1}) + end)
        with pytest.raises(ValueError, match=rf"holds a record of schema {SCHEMA + 1}; allowed: up to {SCHEMA}, which"):
            Results(path)


def test_the_machine_is_told():
    found = hardware()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28


def test_other_weights_make_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = {"w": torch.arange(PIECES * PIECE, dtype=torch.float32)}
    save_file(weights, tmp_path / "model.safetensors")

    def told():
        model_hash.cache_clear()
        return model_hash(str(tmp_path))

    first = told()
    assert first.startswith("sha256:")
    assert told() == first
    for part in (slice(None, 1000), slice(60_000, None)):
        other = {"w": weights["w"].clone()}
        other["w"][part] *= 2
        save_file(other, tmp_path / "model.safetensors")
        assert told() != first
    save_file({"v": weights["w"]}, tmp_path / "model.safetensors")
    assert told() != first, "the names of the weights"
    save_file(weights, tmp_path / "model.safetensors")
    assert told() == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert told() != first
    assert model_hash("/no/such/model") is None


def test_rows_are_told_apart_by_what_they_hold_and_not_by_where_they_lie(tmp_path):
    datasets = pytest.importorskip("datasets")

    def rows(files):
        kept = datasets.Dataset.from_dict({"image": files, "label": [1, 2]})
        return rows_hash(kept.cast_column("image", datasets.Image(decode=False)))

    for folder, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(content)
    a, b, c = (rows([str(tmp_path / folder / "x.png")] * 2) for folder in "abc")
    assert a == b != c
    texts = datasets.Dataset.from_dict({"text": ["one", "two", "three"]})
    assert rows_hash(texts) == rows_hash(datasets.Dataset.from_dict({"text": ["one", "two", "three"]}))
    assert rows_hash(texts.select([1, 0, 2])) != rows_hash(texts)
    assert rows_hash(texts.select([0, 1])) == rows_hash(datasets.Dataset.from_dict({"text": ["one", "two"]}))


def test_what_cannot_be_told_is_left_out(text):
    data = {"source": text, "streaming": False}
    assert set(hashes_of({"hidden_size": 8}, data, ("text",))) == {"train", "held_out"}
    assert hashes_of("/no/such", {**data, "source": "/no/such.jsonl"}, ("text",)) == {}
    assert hashes_of("/no/such", data, ()) == {}, "of a task that makes its rows itself"
    assert set(hashes_of("/no/such", {**data, "streaming": True}, ("text",))) == {"held_out"}
