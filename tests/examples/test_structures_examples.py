"""examples/structures: each runs small, and says what its page says of it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples" / "structures"


@pytest.fixture
def run(monkeypatch, capsys):
    threads = torch.get_num_threads()

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
        module.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return module, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]

    yield run
    torch.set_num_threads(threads)


def test_neighbours_tell_the_class_of_a_node(run):
    module, rows = run("nodes", "--nodes", 200, "--steps", 2)
    assert all(0 <= float(row[2].rstrip("%")) <= 100 for row in rows)
    alone, neighbours, two_steps = (int(row[1].replace(",", "")) for row in rows)
    assert neighbours < two_steps < alone == 200 * 200
    edges, features, label_N = module.draw(200, 4)
    assert (label_N[edges[:, 0]] == label_N[edges[:, 1]]).float().mean() > 0.8
    nearest = torch.stack([features[label_N == one].mean(dim=0) for one in range(4)])
    guessed = torch.cdist(features, nearest).argmin(dim=1)
    assert (guessed == label_N).float().mean() < 0.7, "features alone do not tell it"


def test_sections_equal_dense_attention_under_the_same_mask(run, monkeypatch):
    module, rows = run("sections", "--lengths", 300, 700)
    assert [row[0] for row in rows] == ["300", "700"]
    assert all(float(row[3]) < 1e-5 for row in rows)
    assert module.document(700).num_pairs < 700 * 700


def test_questions_about_tables(run):
    module, rows = run("table_questions", "--steps", 2, "--rows", 6, "--columns", 3)
    assert len(rows) == 2
    assert all(0 <= float(row[1].rstrip("%")) <= 100 for row in rows)
    given = module.batch(5, 4, 3, torch.Generator().manual_seed(0))
    for ids, types, labels in zip(*(given[name] for name in ("input_ids", "token_type_ids", "labels")), strict=True):
        (answer,) = labels.nonzero().flatten().tolist()
        row, column = int(types[answer, 2]), int(types[answer, 1])
        asked = {(int(types[at, 2]), int(types[at, 1])) for at in (ids == module.ASKED).nonzero().flatten().tolist()}
        assert asked == {(0, 0), (row, 1), (0, column)}, "the question, the first cell of the row, the header"
        assert row > 0
        assert column > 1


def test_cost_is_measured_beside_dense_attention(run, tmp_path):
    _, rows = run("cost", "--nodes", 64, 128, "--output", tmp_path / "cost.json")
    written = json.loads((tmp_path / "cost.json").read_text())
    assert [row["nodes"] for row in written["rows"]] == [int(row[0]) for row in rows] == [64, 128]
    for row in written["rows"]:
        assert row["dense / graph, forward"] == pytest.approx(row["dense, forward"] / row["graph, forward"])
