"""The tables of docs/recurrent.md are those of the results beside it."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def made():
    spec = importlib.util.spec_from_file_location("recurrent_figure", DOCS / "recurrent" / "figure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_results(made, tmp_path):
    page = made.PAGE.read_text(encoding="utf8")
    assert made.with_tables(page) == page
    found = made.compared(made.RESULTS / "results.jsonl")
    assert set(found) == {"none", "additive", "scaled dot", "luong_local", "linear"}
    assert all(len(seeds) == 3 for seeds in found.values())
    made.draw(tmp_path / "figure.png", found)
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_page_without_a_place_for_a_table_is_refused(made):
    with pytest.raises(ValueError, match="no place for the table 'translation by length'"):
        made.with_tables("# Recurrent models\n")


def test_several_seeds_are_a_mean_with_the_least_and_the_most(made):
    parts = [[{"length": "1-5", "sacrebleu": bleu}] for bleu in (1.0, 4.0)]
    figures = [{"sacrebleu": 2.0, "loss": 1.0, "by_length": part} for part in parts]
    columns = {"BLEU": ("sacrebleu", 1), "loss": ("loss", 2)}
    assert made.table({"additive": figures}, columns, "sacrebleu").splitlines()[-1] == (
        "| additive | 2.0 (2.0 to 2.0) | 1.00 (1.00 to 1.00) | 2.5 (1.0 to 4.0) | 2 |"
    )


def test_names_count_where_they_stand(made):
    rows = [{"caption": "bag, coat", "written": "bag, boot, coat"}, {"caption": "coat, bag", "written": "bag"}]
    assert made.in_place(rows) == 25.0
