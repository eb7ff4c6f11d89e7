"""The table of docs/recurrent.md is that of the results beside it."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def script():
    spec = importlib.util.spec_from_file_location("recurrent_figure", DOCS / "recurrent" / "figure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_of_the_results(tmp_path):
    made = script()
    found, page = made.rows(), made.PAGE.read_text(encoding="utf8")
    assert {"none", "scaled dot"} <= set(found)
    assert made.with_table(page, found) == page
    made.draw(tmp_path / "figure.png", found)
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_several_seeds_are_a_mean_with_the_least_and_the_most():
    parts = [[{"length": "1-5", "sacrebleu": bleu}] for bleu in (1.0, 4.0)]
    figures = [{"sacrebleu": 2.0, "chrf": 9.0, "loss": 1.0, "by_length": part} for part in parts]
    assert "| additive | 2.0 (2.0 to 2.0) | 2.5 (1.0 to 4.0) | 9.0 (9.0 to 9.0) | 1.00 | 2 |" in script().table(
        {"additive": figures}
    )
