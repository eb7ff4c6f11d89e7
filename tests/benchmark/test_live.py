"""On a terminal cells are a table: what ended with its figures, what is under way, what failed and why."""

import io
import sys
import time

import pytest
from rich.console import Console
from test_chosen import Cell
from tqdm import tqdm

from attn_plugins.benchmark.results import live
from attn_plugins.benchmark.results.cells import run_cells
from attn_plugins.benchmark.results.live import LiveTable
from attn_plugins.benchmark.results.store import Results
from attn_plugins.config.versions import versions

CELLS = [
    Cell("dense", "evaluate", 0),
    Cell("local", "evaluate", 0),
    Cell("bad", "evaluate", 0),
    Cell("dense", "speed", 0),
]


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=120, height=40, color_system=None)


def shown(terminal):
    """What the terminal has been sent since it was last asked."""
    text = terminal.file.getvalue()
    terminal.file.truncate(0)
    terminal.file.seek(0)
    return text


def test_a_run_is_a_table_while_it_lasts(tmp_path, terminal):
    results = Results(tmp_path / "results.jsonl")
    results.add({"key": CELLS[0].key, **CELLS[0].labels, "status": "ok", "seconds": 125.0, "versions": versions()})
    before, seen = sys.stderr, {}

    def measure(group):
        (cell,) = group
        seen[cell.attention] = shown(terminal)
        if cell.attention == "bad":
            yield cell, {"status": "error", "error": "ValueError: [7] is no layer", "seconds": 1.0}
        else:
            print("a warning", file=sys.stderr)
            yield cell, {"status": "ok", "result": {}, "seconds": 1.0}

    def note(cell, result):
        return "perplexity 12.3"

    with LiveTable(CELLS, results, terminal) as table:
        its = {"fresh": False, "say": table.say, "watch": table, "timed": lambda cell: cell.measure == "speed"}
        run_cells([[cell] for cell in CELLS], results, measure, note, **its)
        last = shown(terminal)
    assert sys.stderr is before
    assert "1 of 4 cells are in" in seen["local"]
    assert "1 of 4 cells, at least 4:10 left" in seen["local"], "none is known that is timed"
    assert "about 2:05 in all" in seen["local"]
    assert "a warning" in seen["bad"]
    assert "perplexity 12.3" in seen["bad"]
    assert "4 of 4 cells, 1 failed" in last
    assert "ValueError: [7] is no layer" in last
    assert "bad · evaluate · 0" in last


def test_a_long_name_leaves_room_for_figures(tmp_path, terminal):
    named = Cell("{type: local, layers: [a, b]} " * 5, "evaluate", 0)
    with LiveTable([named], Results(tmp_path / "results.jsonl"), terminal) as table:
        table.ended(named, "perplexity 12.3", failed=False)
    last = shown(terminal)
    assert "perplexity 12.3" in last
    assert "[a, b]" in last, "a name is no markup"


def test_a_bar_is_a_line_of_the_table(tmp_path, terminal):
    with LiveTable(CELLS, Results(tmp_path / "results.jsonl"), terminal) as table:
        table.started(CELLS[0], timed=False)
        for number in tqdm(range(3), desc="reading", leave=False, mininterval=0):
            if number == 2:
                table.ended(CELLS[1], "x", failed=False)
                assert "reading:  67%" in shown(terminal)
        table.started(CELLS[1], timed=False)
        assert "reading" not in shown(terminal), "of the cell before"


def test_nothing_is_drawn_while_a_cell_is_timed(tmp_path, terminal, monkeypatch):
    monkeypatch.setattr(live, "TICK", 0.01)
    with LiveTable(CELLS, Results(tmp_path / "results.jsonl"), terminal) as table:

        def drawn(timed):
            table.started(CELLS[3], timed=timed)
            time.sleep(0.05)  # a picture that was begun
            shown(terminal)
            deadline = time.monotonic() + (0.2 if timed else 30)
            while not terminal.file.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
            return bool(shown(terminal))

        assert drawn(timed=False)
        assert not drawn(timed=True)
        table.ended(CELLS[3], "y", failed=False)
        assert drawn(timed=False)
