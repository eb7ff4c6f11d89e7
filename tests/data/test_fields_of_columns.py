"""A column may be a field of another, as hub data sets of translation have them."""

import pytest
from conftest import write_rows
from datasets import Dataset, Features, Image, Translation, Value

from attn_plugins.data.columns import _with_fields, named_by_role
from attn_plugins.data.sources import DataConfig, load_data

BOTH = {"source": "translation.en", "target": "translation.fr"}
FEATURES = Features({"id": Value("string"), "translation": Translation(["en", "fr"])})
ROWS = [{"id": str(number), "translation": {"en": f"red {number}", "fr": f"rouge {number}"}} for number in range(4)]


def test_fields_of_a_column():
    rows = named_by_role(Dataset.from_list(ROWS, features=FEATURES).select([3, 1]), BOTH, "rows")
    assert rows[:] == {"source": ["red 3", "red 1"], "target": ["rouge 3", "rouge 1"]}


def test_a_field_beside_a_column():
    rows = Dataset.from_list(ROWS, features=FEATURES).select([2, 0])
    rows = named_by_role(rows, {"source": "translation.fr", "target": "id"}, "rows")
    assert rows[:] == {"source": ["rouge 2", "rouge 0"], "target": ["2", "0"]}


def test_other_columns_stay_what_they_are():
    features = Features({**FEATURES, "text": Image(decode=False)})
    rows = Dataset.from_list([{**row, "text": {"bytes": b"", "path": "a.png"}} for row in ROWS], features=features)
    rows = _with_fields(rows, BOTH.values())
    assert sorted(rows.column_names) == ["id", "text", "translation.en", "translation.fr"]
    assert rows.features["text"] == Image(decode=False)


def test_fields_of_files(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    columns = {"source_column": "translation.en", "target_column": "translation.fr"}
    train, held_out = load_data(DataConfig(source=path, eval_source=path, **columns), ("source", "target"))
    assert train["source"][:] == held_out["source"][:] == ["red 0", "red 1", "red 2", "red 3"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "translation.de",
            r"has no column 'translation.de' \(source_column\); it has: id, translation.en, translation.fr",
        ),
        ("id.en", r"has no column 'id.en' \(source_column\); it has: translation, id"),
        ("else.en", r"has no column 'else.en' \(source_column\); it has: id, translation"),
        ("translation", r"column 'translation' \(source_column\) holds .*; allowed: strings"),
    ],
)
def test_fields_that_are_not_there(column, message):
    with pytest.raises(ValueError, match=message):
        named_by_role(Dataset.from_list(ROWS, features=FEATURES), {"source": column}, "rows")


def test_rows_without_a_field(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"id": "5", "translation": {"en": "red", "fr": None}}])
    data = DataConfig(source=path, eval_source=path, source_column="id", target_column="translation.fr")
    with pytest.raises(ValueError, match=r"column 'translation.fr' \(target_column\) is null in 1 of 5 rows"):
        load_data(data, ("source", "target"))
