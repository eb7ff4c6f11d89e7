"""Runs made one, shown, compared: the last record of a cell counts, nothing damaged passes, noise is called so."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from attn_plugins import cli
from attn_plugins.benchmark.results.compared import diff_tables, name_of, show_table
from attn_plugins.benchmark.results.merge import merge, read_results
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import Table
from attn_plugins.config.versions import hardware, versions


def record(key, finished="2026-01-01T00:00:00+00:00", value=1.0, **changes):
    figures = {"metric": "perplexity", "better": "lower", "value": value, "figures": {}, "others": {}}
    its = {"key": key, "model": "m", "attention": "local", "measure": "evaluate", "seed": 0, "status": "ok"}
    return {**its, "result": figures, "finished": finished, "settings": {}, "versions": versions(), **changes}


def kept(folder, *records):
    for one in records:
        Results(folder / "results.jsonl").add(one)
    return str(folder)


def call(*arguments, status=0):
    ran = CliRunner().invoke(cli.app, ["results", *map(str, arguments)], env={"COLUMNS": "250"})
    assert ran.exit_code == status, ran.output + str(ran.exception)
    return ran.stdout if status == 0 else ran.stderr


def test_the_record_that_ended_last_counts_wherever_it_is(tmp_path):
    late, early = "2026-01-03T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    a = kept(tmp_path / "a", record("x", late, 3.0), record("y", early, 1.0), record("old", ""))
    b = kept(tmp_path / "b", record("x", early, 2.0), record("y", late, 4.0, status="error"), record("z", early, 5.0))
    said = call("merge", tmp_path / "out", a, b)
    assert f"{tmp_path}/a/results.jsonl: 2 of 3 cells" in said
    assert f"{tmp_path}/out/results.jsonl: 4 cells, 1 failed" in said
    merged = Results(tmp_path / "out" / "results.jsonl")
    assert {key: one["result"]["value"] for key, one in merged.records.items()} == {
        **{"old": 1.0, "z": 5.0, "x": 3.0, "y": 4.0}
    }
    assert merged.records["x"] == Results(tmp_path / "a" / "results.jsonl").records["x"], "unchanged, with its check"
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    merge(tmp_path / "out", [a])
    assert (tmp_path / "out" / "results.jsonl").read_text() == lines, "what the folder holds counts too"
    assert [
        path.name for path in (tmp_path / "out").iterdir() if "lock" not in path.name and "run" not in path.name
    ] == ["results.jsonl"]


def test_what_is_damaged_is_named_and_nothing_is_written(tmp_path):
    a = kept(tmp_path / "a", record("x"))
    bad = tmp_path / "b" / "results.jsonl"
    kept(tmp_path / "b", record("y"), record("z"))
    whole = bad.read_text().splitlines()
    bad.write_text(f"{whole[0]}\n{whole[1][:40]}\n{whole[1]}\n")
    assert f"error: {bad}, line 2 is not a result; repair it" in call("merge", tmp_path / "out", a, bad, status=2)
    bad.write_text(whole[0].replace("1.0", "7.0", 1) + "\n")
    assert f"{bad}, line 1 has been changed since it was written" in call("merge", tmp_path / "out", a, bad, status=2)
    assert not (tmp_path / "out").exists()
    none = call("merge", tmp_path / "out", tmp_path / "none", status=2)
    assert f"no results at '{tmp_path}/none'; allowed: a folder with results.jsonl, or such a file" in none
    with Results(tmp_path / "a" / "results.jsonl").lock():
        assert "another run is measuring into" in call("merge", tmp_path / "a", a, status=2)


def test_records_from_before_checks_are_merged(tmp_path):
    (tmp_path / "old.jsonl").write_text(json.dumps({"key": "a", "status": "ok", "result": {}}) + "\n")
    merged, _ = merge(tmp_path / "out", [str(tmp_path / "old.jsonl")])
    assert "schema" not in merged.records["a"], "it is not said to be what it is not"
    assert Results(merged.path).records["a"]["check"]


def test_show_tells_figures_failures_and_machines(tmp_path):
    failed = {**record("y", seed=1), "status": "error", "error": "ValueError: too long", "hardware": hardware()}
    del failed["result"]
    stale = record("z", seed=2, versions={**versions(), "torch": "1.0"}, settings={"scope": "model", "length": 64})
    without = {**failed, "key": "w", "status": "left out", "error": "no such press"}
    folder = kept(tmp_path, record("x", seconds=3.2), failed, stale, without)
    rows = show_table(read_results(folder)).rows
    assert [row[:4] for row in rows] == [
        ["m · local · evaluate", "0", "perplexity 1.00", "3"],
        ["m · local · evaluate", "1", "error: ValueError: too long", ""],
        ["m · local · evaluate · model · 64", "2", "perplexity 1.00 (stale)", ""],
        ["m · local · evaluate", "1", "left out: no such press", ""],
    ]
    said = call("show", folder)
    assert "4 cells, 1 failed" in said
    assert "1 are stale: of other versions" in show_table(read_results(folder)).note
    assert said.count("- Measured with attn_plugins ") == 2
    assert f"- On cpu {hardware()['cpu']}, cores " in said


def test_a_long_name_leaves_room_for_what_is_said_of_it():
    table = Table(
        "Errors", "", ["cells", "error"], [["model · an attention at 25 % of the bytes · evaluate" * 2, "why"]]
    )
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(table.rich())
    assert "why" in terminal.file.getvalue()


def test_cells_without_labels_have_their_key_for_a_name():
    assert name_of({"key": "abc", "status": "ok"}) == "abc"
    assert name_of({"key": "abc", "label": "l", "measure": "bench", "settings": {"which": "forward", "length": 8}}) == (
        "bench · l · 8 · forward"
    )


def seeds(values, **changes):
    return [record(f"{changes}{seed}", value=value, seed=seed, **changes) for seed, value in values.items()]


def diff(tmp_path, one, other):
    tables = diff_tables(*(read_results(kept(tmp_path / name, *own)) for name, own in (("a", one), ("b", other))))
    return tables[0], [row for table in tables[1:] for row in table.rows]


def test_a_difference_within_the_noise_is_called_so(tmp_path):
    one = [*seeds({0: 1.0, 1: 2.0, 2: 3.0}), *seeds({0: 5.0}, attention="one"), *seeds({0: 5.0}, attention="same")]
    other = [*seeds({0: 1.4, 1: 1.8, 2: 3.1}), *seeds({0: 5.5}, attention="one"), *seeds({0: 5.0}, attention="same")]
    table, alone = diff(tmp_path, one, other)
    rows = {row[0]: row[1:5] for row in table.rows}
    assert rows["m · local · evaluate"][:3] == ["perplexity", "2.00 ± 1.00", "2.10 ± 0.889"]
    assert rows["m · local · evaluate"][3] == "+0.100 ± 0.173 (within noise, p 0.62)"
    assert rows["m · one · evaluate"][3] == "+0.500 (one seed, noise unknown)"
    assert set(rows) == {"m · local · evaluate", "m · one · evaluate"}
    assert "1 of 3 cells that both have are the same" in table.note
    assert alone == []


def test_timing_is_held_against_its_rounds_and_bytes_are_exact(tmp_path):
    def timed(measure, **figures):
        result = {"passes": {"forward": figures}}
        return record(measure, measure=measure, result=result, settings={"scope": "model", "length": 8})

    fast = {"times_as_fast": 2.0, "lowest": 1.9, "highest": 2.2}
    one = [timed("speed", **fast), timed("memory", bytes=100)]
    other = [timed("speed", **{**fast, "times_as_fast": 2.1}), timed("memory", bytes=110)]
    table, _ = diff(tmp_path, one, other)
    assert [row[:5] for row in table.rows] == [
        ["m · local · speed · model · 8", "forward times_as_fast", "2.00", "2.10", "+0.10 (within the rounds' spread)"],
        ["m · local · memory · model · 8", "forward bytes", "100.00", "110.00", "+10.0 %"],
    ]
    paper = {"launches": 4, "least_seconds": 1.0}
    costs = [[record("p", measure="cost", result={**paper, "least_seconds": one})] for one in (1.0, 2.0)]
    table, _ = diff(tmp_path / "third", *costs)
    assert [row[1:5] for row in table.rows] == [["least_seconds", "1.00", "2.00", "+100.0 %"]]
    other = [timed("speed", times_as_fast=3.0, lowest=2.3, highest=3.1)]
    table, alone = diff(tmp_path / "second", one, other)
    assert table.rows[0][4] == "+1.00 (beyond the rounds' spread)"
    assert alone == [["m · local · memory · model · 8", "A", "forward bytes 100.00"]]


def test_what_else_differs_is_said(tmp_path):
    one = record("a", settings={"dtype": "float32", "data": {"source": "x"}}, hashes={"model": "1", "train": "2"})
    other = record("b", value=2.0, settings={"dtype": "bfloat16", "data": {"source": "x"}}, hashes={"model": "9"})
    other["versions"] = {**versions(), "torch": "1.0"}
    table, _ = diff(tmp_path, [one], [other])
    assert table.rows[0][5] == "settings dtype; versions torch; contents of model, train"
    failed = {**record("c"), "status": "error", "error": "ValueError: no"}
    del failed["result"]
    table, _ = diff(tmp_path / "second", [one], [failed])
    assert table.rows[0][1:4] == ["outcome", "ok", "error: ValueError: no"]
    assert "A" in call("diff", tmp_path / "a", tmp_path / "b")


def test_the_last_of_changed_settings_counts(tmp_path):
    now = record("new", finished="2026-02-01T00:00:00+00:00", value=4.0)
    table, _ = diff(tmp_path, [now, record("old", value=1.0)], [record("new", value=4.0)])
    assert table.rows == []
    before = [record(f"old{seed}", value=1.0, seed=seed, settings={"dtype": "float32"}) for seed in (0, 1)]
    part = [*before, {**now, "settings": {"dtype": "bfloat16"}}]  # stopped after its first seed
    table, _ = diff(tmp_path / "second", part, [record("new", value=5.0)])
    assert table.rows[0][2:5] == ["4.00", "5.00", "+1.00 (one seed, noise unknown)"]


@pytest.mark.parametrize("kind", ["cpu", "decode"])
def test_benchmarks_that_are_kept_are_the_same_as_themselves(kind):
    path = f"{cli.__file__.rpartition('/attn_plugins/')[0]}/docs/benchmarks/{kind}/results.jsonl"
    table, *alone = diff_tables(read_results(path), read_results(path))
    assert (table.rows, alone) == ([], [])
    assert len(show_table(read_results(path)).rows) > 10
