"""The tables of docs/cpu.md are those of the results in docs/benchmarks."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "docs" / "benchmarks" / "compiled" / "table.py"


@pytest.fixture
def made():
    spec = importlib.util.spec_from_file_location("compiled_table", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_results(made):
    page = made.PAGE.read_text(encoding="utf8")
    assert made.with_tables(page) == page
    assert "| local, C++ |" in page


def test_a_page_without_a_place_for_a_table_is_refused(made):
    with pytest.raises(ValueError, match="no place for the table 'kernels'"):
        made.with_tables("# On a CPU\n")
