"""Results on disk: reading changes nothing, writers lose nothing, and what another version measured does not pass."""

import json
import os
import subprocess
import time
from pathlib import Path

import programs
import pytest

from attn_plugins.benchmark.cost.kernels import BenchConfig, cells, prepare_bench, run_bench
from attn_plugins.benchmark.cost.kernels_report import KernelResults, write_bench_report
from attn_plugins.benchmark.results import store
from attn_plugins.benchmark.results.store import Results
from attn_plugins.config import versions as version_file
from attn_plugins.config.versions import commit, spelled, versions
from attn_plugins.core.options import build

WHOLE = json.dumps({"key": "a", "status": "ok", "result": {}, "versions": versions()})


def keys(path):
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tail", [WHOLE[:9], WHOLE.replace('"a"', '"b"'), ""])
def test_opening_only_reads(tmp_path, tail):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{WHOLE}\n{tail}")
    before = path.read_bytes()
    held = Results(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "not even a lock is made to read"
    whole = ["a", "b"] if tail.endswith("}") else ["a"]
    assert list(held.records) == whole
    held.add({"key": "c", "status": "ok"})
    assert keys(path) == list(held.records) == [*whole, "c"]


WRITER = """
import io, sys, time
from pathlib import Path
from attn_plugins.benchmark.results.store import Results


class Halves(io.FileIO):  # writes in two parts, as a disk may
    def write(self, data):
        written = super().write(data[:9])
        time.sleep(0.002)
        return written + super().write(data[9:])


results = Results(Path(sys.argv[1]))
Path.open = lambda path, mode: Halves(path, mode)
Path(f"{sys.argv[1]}.{sys.argv[2]}").touch()
while not Path(f"{sys.argv[1]}.go").exists():
    pass
for number in range(60):
    results.add({"key": f"{sys.argv[2]}{number}", "status": "ok"})
"""


def test_two_processes_that_write_lose_nothing_and_a_reader_takes_nothing_away(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(WHOLE[:9])  # of a run that was killed
    writers = [programs.start("-c", WRITER, path, name) for name in "pq"]
    deadline = time.monotonic() + 120
    while any(not Path(f"{path}.{name}").exists() for name in "pq"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    Path(f"{path}.go").touch()
    while path.read_bytes().count(b"\n") < 2 * 60:
        assert time.monotonic() < deadline
        Results(path)
    for writer in writers:
        done = writer.wait()
        assert done.returncode == 0, done.stderr
    assert sorted(keys(path)) == sorted(f"{name}{number}" for name in "pq" for number in range(60))


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "out" / "results.jsonl"
    one, other = Results(path), Results(path)
    refused = r"another run is measuring into .*results\.jsonl; wait until it ends, or name another output_dir"
    with one.lock(), one.lock():
        one.add({"key": "a", "status": "ok"})
        with pytest.raises(ValueError, match=refused):
            other.lock()
    with other.lock():
        assert list(other.records) == ["a"], "what the first has left is read when the second's turn comes"


def test_where_nothing_can_be_written_it_is_said_before_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot read .*file/results\.jsonl: Not a directory"):
        Results(tmp_path / "file" / "results.jsonl")
    results = Results(tmp_path / "later" / "results.jsonl")
    (tmp_path / "later").touch()
    with pytest.raises(ValueError, match=r"cannot write .*later/results\.jsonl: File exists"):
        results.lock()
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"cannot read .*results\.jsonl: Is a directory"):
        Results(tmp_path / "results.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"key": "a", "status": "ok", "result": ' + b'{"a":' * 100_000,
        b"null",
        b"[]",
        b'"key"',
        b"{}",
        b'{"key": ["a"], "status": "ok"}',
        b'{"key": {"a": 1}, "status": "ok"}',
        b'{"key": 7, "status": "ok"}',
        b'{"key": "a"}',
        b'{"key": "a", "status": null}',
        b'{"key": "a", "status": "ok", "result": [1]}',
        b'{"key": "a", "status": "ok", "versions": "1.0"}',
        b'{"key": "a", "status": "error", "error": {}}',
        b'{"key": "a", "status": "ok", "result": {"n": ' + b"9" * 5000 + b"}}",
        b"\xff\xfe{}",
        b"\x00",
        b"",
    ],
    ids=lambda line: repr(line[:50]),
)
def test_whatever_is_no_result_is_one_clear_line(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_bytes(WHOLE.encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2 is not a result; repair it, or move the file away"):
        Results(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [(["result", "figures", "loss"], None), (["result", "value"], "2"), (["seconds"], []), (["settings"], {})],
)
def test_a_record_that_was_changed_is_one_clear_line(tmp_path, place, value):
    path = tmp_path / "results.jsonl"
    record = {"key": "a", "status": "ok", "result": {"value": 2.0, "figures": {"loss": float("inf")}}, "seconds": 0.1}
    Results(path).add({**record, "settings": {"text": "é"}})
    written = path.read_bytes()
    assert Results(path).records["a"]["result"] == record["result"]
    changed = here = json.loads(written)
    for name in place[:-1]:
        here = here[name]
    here[place[-1]] = value
    path.write_text(json.dumps(changed) + "\n")
    with pytest.raises(
        ValueError, match=r"line 1 has been changed since it was written; take it out, or move the file"
    ):
        Results(path)
    del changed["check"]  # as records of earlier versions: they have none
    path.write_text(json.dumps(changed) + "\n")
    assert list(Results(path).records) == ["a"]


def test_numbers_for_names_are_read_as_they_were_written(tmp_path):
    rules = [{"type": "softmax", "kv_heads": {2: [0], 10: (1,)}}]
    Results(tmp_path / "results.jsonl").add({"key": "a", "status": "ok", "rules": rules})
    (read,) = Results(tmp_path / "results.jsonl").records.values()
    assert read["rules"] == [{"type": "softmax", "kv_heads": {"2": [0], "10": [1]}}]


def test_a_figure_may_be_infinite(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path).add({"key": "a", "status": "ok", "result": {"perplexity": float("inf")}})
    assert Results(path).records["a"]["result"] == {"perplexity": float("inf")}


SMALL = {"lengths": [16], "passes": ["forward"], "rounds": 1, "peers": False, "attentions": {"local": "local"}}


@pytest.mark.parametrize("name", ["attn_plugins", "commit", "torch", "transformers", "python", "device", "threads"])
def test_what_other_versions_measured_is_measured_again_and_said(tmp_path, monkeypatch, name):
    config = build(BenchConfig, {**SMALL, "output_dir": str(tmp_path)})
    monkeypatch.setattr(store, "versions", lambda: {**versions(), "commit": "abc", name: "another"})
    monkeypatch.setattr("attn_plugins.benchmark.results.cells.versions", store.versions)
    run_bench(config, prepare_bench(config), say=lambda line: None)
    monkeypatch.undo()
    monkeypatch.setattr(store, "versions", lambda: {**versions(), "commit": "abc"})
    results, said = prepare_bench(config), []
    (report, *_) = write_bench_report(KernelResults(config, results), tmp_path)[1]
    assert f"- Measured with {spelled(results.records[next(iter(results.records))]['versions'])}" in report.read_text()
    assert "- Stale: 1 of 1 cells were not measured with attn_plugins " in report.read_text()
    monkeypatch.setattr("attn_plugins.benchmark.results.cells.versions", store.versions)
    run_bench(config, results, say=said.append)
    assert said[0].startswith(f"1 of 1 cells in {results.path} are stale and are measured again: they are of ")
    assert "another" in said[0].partition("; now it is")[0]
    assert len(said) == 2
    run_bench(config, results, say=said.append)
    assert said[2:] == [f"1 of 1 cells are in {results.path} already (--fresh measures them again)"]
    (report, *_) = write_bench_report(KernelResults(config, results), tmp_path)[1]
    assert "Stale" not in report.read_text()


def test_results_from_before_versions_were_recorded_say_so(tmp_path):
    config = build(BenchConfig, {**SMALL, "output_dir": str(tmp_path)})
    results = prepare_bench(config)
    run_bench(config, results, say=lambda line: None)
    ((cell,),) = cells(config)
    old = {name: value for name, value in versions().items() if name not in version_file.OWN}
    results.add({**results.records[cell.key], "versions": old})
    assert results.resume_summary([cell.key])[0].startswith("1 of 1 cells in ")
    assert "they are of attn_plugins version not recorded, " in results.resume_summary([cell.key])[0]
    assert results.provenance([cell.key])[0].startswith("- Measured with attn_plugins version not recorded, python ")


def test_plug_ins_are_recorded_too(monkeypatch):
    class Entry:
        class dist:  # noqa: N801
            name, version = "their-attention", "7.1"

    monkeypatch.setattr(version_file.metadata, "entry_points", lambda group: [Entry])
    version_file._own.cache_clear()
    try:
        assert versions()["their-attention"] == "7.1"
        assert "their-attention 7.1" in spelled(versions())
    finally:
        version_file._own.cache_clear()


def test_the_commit_is_the_last_that_changed_the_package(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("one")
    assert commit(package) is None
    git("init")
    (tmp_path / "note").touch()
    git("add", "note")
    git("commit", "-m", "note")
    assert commit(package) is None, "a checkout of something else, with the package lying in it"
    git("add", ".")
    git("commit", "-m", "package")
    first = commit(package)
    assert len(first) == 12
    (tmp_path / "note").write_text("changed")
    git("commit", "-a", "-m", "note again")
    assert commit(package) == first, "what is beside the package does not matter"
    (package / "a.py").write_text("two")
    second = commit(package)
    (package / "b.py").write_text("new")
    third = commit(package)
    assert second.startswith(f"{first} with changes ")
    assert len({first, second, third}) == 3
    git("add", ".")
    git("commit", "-m", "both")
    assert len(commit(package)) == 12
    assert commit(package) != first
    here = commit(package)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert commit(package) == here
    monkeypatch.setenv("PATH", os.devnull)
    assert commit(package) is None
