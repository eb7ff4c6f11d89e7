"""Cells are chosen by their labels or by shares, a dry run says how long they may take; however they were run, the
report is the same."""

import re
from dataclasses import dataclass, field

import pytest

from attn_plugins.benchmark.compare import run as compare
from attn_plugins.benchmark.compare.cells import cells
from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.compare.report import write_report
from attn_plugins.benchmark.compare.run import prepare_compare, run_compare
from attn_plugins.benchmark.results.chosen import chosen, planned
from attn_plugins.benchmark.results.merge import merge
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.versions import versions
from attn_plugins.core.options import build

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Cell:
    attention: str
    measure: str
    seed: int
    settings: dict = field(default_factory=dict)

    @property
    def labels(self):
        return {"attention": self.attention, "measure": self.measure, "seed": self.seed}

    @property
    def key(self):
        return hash_of(self.labels)

    def __str__(self):
        return f"{self.attention} · {self.measure} · {self.seed}"


CELLS = [
    Cell(attention, measure, seed)
    for measure in ("evaluate", "finetune")
    for attention in ("dense", "local", "local wide")
    for seed in (0, 1, 10)
]


def names(found):
    return [str(cell) for cell in found]


def test_patterns_choose_by_labels():
    assert chosen(CELLS) == CELLS
    assert names(chosen(CELLS, ["attention=local*", "measure=evaluate", "seed=1"])) == [
        "local · evaluate · 1",
        "local wide · evaluate · 1",
    ]
    assert len(chosen(CELLS, ["seed=0", "seed=10"])) == 12, "those of one label are alternatives"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["attn=local"],
            r"--cells 'attn=local' \(did you mean attention\?\); allowed: LABEL=PATTERN of attention, meas",
        ),
        (["local"], r"--cells 'local'.*; allowed: LABEL=PATTERN of attention, measure, seed"),
        (
            ["attention=linear"],
            "--cells 'attention=linear' matches nothing; attention is one of: dense, local, local w",
        ),
        (["seed=0", "seed=2"], "--cells 'seed=2' matches nothing; seed is one of: 0, 1, 10"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_there_is(patterns, message):
    with pytest.raises(ValueError, match=message):
        chosen(CELLS, patterns)


def test_patterns_that_match_nothing_together_are_refused():
    both = [Cell("dense", "speed", 0), Cell("local", "evaluate", 0)]
    with pytest.raises(ValueError, match="no cell matches --cells attention=dense --cells measure=evaluate at once"):
        chosen(both, ["attention=dense", "measure=evaluate"])


@pytest.mark.parametrize("number", [1, 2, 4, 30])
def test_shares_have_each_cell_once_and_no_measure_to_one_alone(number):
    shares = [chosen(CELLS, [], f"{k}/{number}") for k in range(1, number + 1)]
    assert sorted(cell.key for share in shares for cell in share) == sorted(cell.key for cell in CELLS)
    assert [chosen(list(reversed(CELLS)), [], f"{k}/{number}")[::-1] for k in range(1, number + 1)] == shares
    for measure in ("evaluate", "finetune"):
        sizes = [sum(cell.measure == measure for cell in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", ""])
def test_a_wrong_share_is_refused(shard):
    with pytest.raises(ValueError, match=rf"--shard '{shard}'; allowed: k/n with k from 1 to n, such as 1/4"):
        chosen(CELLS, [], shard)


def test_a_dry_run_knows_what_ran_before(tmp_path):
    results = Results(tmp_path / "results.jsonl")

    def ran(cell, **changes):
        results.add(
            {"key": cell.key, **cell.labels, "status": "ok", "seconds": 60.0, "versions": versions(), **changes}
        )

    ran(Cell("local", "finetune", 0))
    ran(Cell("dense", "finetune", 0), seconds=600.0)
    ran(Cell("local", "evaluate", 0), status="error", seconds=1.0)
    ran(Cell("dense", "evaluate", 0), versions={}, seconds=2.0)
    table = planned(CELLS, results, fresh=False, retry=True)
    rows = {row[1]: [row[0], row[2]] for row in table.rows}
    assert rows["local · finetune · 0"] == ["done", ""]
    assert rows["local · finetune · 1"] == ["to do", "60"]
    assert rows["local wide · finetune · 1"] == ["to do", "330"], "of the same measure, with any attention"
    assert rows["local · evaluate · 0"] == ["again", "2"], "it failed; how long that took says nothing"
    assert rows["dense · evaluate · 0"] == ["again", "2"], "it is of other versions"
    # 2 + 2 x 600 + 2 x 60 + 3 x 330 of finetune, 9 x 2 of evaluate
    assert table.note == "16 of 18 cells are to be run: about 38.8 minutes, by cells that ran before."
    left = {row[1]: [row[0], row[2]] for row in planned(CELLS, results, fresh=False, retry=False).rows}
    assert left["local · evaluate · 0"] == ["failed", ""]
    assert planned(CELLS, results, fresh=True, retry=True).note.startswith("18 of 18")
    empty = Results(tmp_path / "other.jsonl")
    assert planned(CELLS, empty, fresh=False, retry=True).note == "18 of 18 cells are to be run: nobody knows how long."
    empty.add({**results.records[Cell("dense", "evaluate", 0).key]})
    assert "about 0.3 minutes, by cells that ran before, and 9 of which none has run" in (
        planned(CELLS, empty, fresh=False, retry=True).note
    )


def settings(model, text, out):
    local = {"type": "local", "num_sink_tokens": 1}
    return build(
        CompareConfig,
        {
            "models": {"tiny": model},
            "attentions": {
                "dense": None,
                **{f"local {size}": {**local, "window_size": size} for size in (2, 4)},
                "learned": {"type": "linear", "feature_map": "hedgehog"},
                "bad": {"type": "local", "layers": 7},
            },
            "output_dir": str(out),
            "data": {"source": text},
            "evaluation": {"length": 16, "max_tokens": 64},
            "memory": {"lengths": {"attention": [16]}, "passes": ["forward"]},
            "seeds": [0, 1],
        },
    )


def quiet(line):
    pass


def report(config):
    """The report, but for times."""
    (text,) = (path.read_text() for path in write_report(config, prepare_compare(config))[1] if path.suffix == ".md")
    return re.sub(r"^- Time of all cells: .*$", "", text, flags=re.M)


def test_however_cells_were_run_the_report_is_the_same(llama, text, tmp_path):
    whole = settings(llama, text, tmp_path / "whole")
    run_compare(whole, prepare_compare(whole), say=quiet)
    (number,) = {len(cells(whole))}

    for k in (1, 2):
        part = settings(llama, text, tmp_path / f"shard{k}")
        own = chosen(cells(part), [], f"{k}/2")
        assert 0 < len(own) < number
        run_compare(part, prepare_compare(part), only=[cell.key for cell in own], say=quiet)
        assert f"- {number - len(own)} of {number} cells have not been run" in report(part)
    merge(tmp_path / "merged", [str(tmp_path / f"shard{k}") for k in (1, 2)])

    killed = settings(llama, text, tmp_path / "killed")

    def kill(line):
        if line.startswith("[7/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_compare(killed, prepare_compare(killed), say=kill)
    assert 4 < len(prepare_compare(killed).records) < number
    run_compare(killed, prepare_compare(killed), say=quiet)

    expected = report(whole)
    assert "layers=7 is out of range" in expected
    assert " noise, p " in expected or "the same with each of 2 seeds" in expected
    assert report(settings(llama, text, tmp_path / "merged")) == expected
    assert report(killed) == expected


def test_what_failed_is_run_again_or_left(llama, text, tmp_path, monkeypatch):
    config = settings(llama, text, tmp_path)
    bad = chosen(cells(config), ["attention=bad", "measure=evaluate", "seed=0"])
    tried = []

    def fail(*arguments):
        tried.append(True)
        raise ValueError("no")

    monkeypatch.setitem(compare._MEASURES, "evaluate", fail)
    said = []
    for retry, often in ((True, 1), (False, 1), (True, 2)):
        said.clear()
        only = [cell.key for cell in bad]
        run_compare(config, prepare_compare(config), only=only, retry=retry, say=said.append)
        assert len(tried) == often
        told = "they are run again" if retry else "they are left so (--no-retry)"
        assert any(told in line for line in said) == (len(tried) > 1 or not retry)
    results = prepare_compare(config)
    (record,) = results.records.values()
    results.add({**record, "versions": {**versions(), "torch": "1.0"}})
    run_compare(config, results, only=[record["key"]], retry=False, say=quiet)
    assert len(tried) == 3, "it may be right with these versions"


def test_a_cell_of_two_parts_is_found_by_either_and_is_one(text):
    config = settings("model", text, "out")
    parts = [("first", config), ("second", config)]
    alone = cells(config)
    assert len(chosen(compare.all_cells(parts))) == len(alone)
    for part in ("first", "second"):
        assert [cell.key for cell in chosen(compare.all_cells(parts), [f"part={part}"])] == [cell.key for cell in alone]
