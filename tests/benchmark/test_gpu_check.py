"""What make gpu-check does on a GPU, on a CPU: what it finds is kept as it comes, shown, and within its time."""

import json
import time
from functools import partial

import pytest
import torch
import typer

from attn_plugins.benchmark.checks import gpu_check, gpu_training
from attn_plugins.benchmark.checks.backend_contract import heads_of
from attn_plugins.benchmark.checks.gpu_check import Log, Target, contract_record, kernel_records, run_part, targets
from attn_plugins.benchmark.checks.gpu_report import (
    checked_results,
    contract_table,
    kernel_table,
    training_table,
    write_report,
)
from attn_plugins.benchmark.checks.gpu_training import ModelShape, Step, training_record, training_steps
from attn_plugins.core.backend import list_backends
from attn_plugins.core.registry import get_attention, list_attentions

TINY = ModelShape(layers=2, hidden_size=24, heads=3, key_value_heads=1, intermediate_size=16, vocabulary=32)


def soon():
    return time.monotonic() + 60


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "out", say=lambda line: None)


def test_every_attention_is_checked_by_its_batched_form_and_by_every_backend():
    for small in (True, False):
        found = targets(list_attentions(), small=small)
        assert {(one.attention, one.backend) for one in found} == {
            (name, backend) for name in list_attentions() for backend in ("batched", *list_backends())
        }
        assert found[0].backend == "batched"


def test_a_contract_passes_fails_or_is_refused(monkeypatch):
    target = Target("nystrom", {}, "batched")
    monkeypatch.setattr(gpu_check, "DTYPES", (torch.float32,))
    (passed,) = contract_record(target, "cpu")
    assert (passed["passed"], passed["failures"]) == (True, [])
    attend = get_attention("nystrom").attend_batched
    monkeypatch.setattr(get_attention("nystrom"), "attend_batched", lambda *a, **o: 2 * attend(*a, **o))
    (failed,) = contract_record(target, "cpu")
    assert not failed["passed"]
    assert "whole rows: output differs by" in failed["failures"][0]
    monkeypatch.setattr(gpu_check, "contract", lambda *a, **o: int("planted refusal"))
    assert "planted refusal" in next(contract_record(target, "cpu"))["refused"]
    monkeypatch.setattr(gpu_check, "contract", lambda *a, **o: 1 / 0)
    assert next(contract_record(target, "cpu"))["failures"] == ["ZeroDivisionError: division by zero"]
    records = [passed, failed, {**passed, "attention": "local"}]
    assert [row[0] for row in contract_table(records).rows] == ["nystrom", "local"]
    assert contract_table(records).rows[1][1] == "passed"
    results = {(one["attention"], one["backend"]): one for one in checked_results(records)}
    assert results["local", "batched"]["passed"]
    assert "differs by" in results["nystrom", "batched"]["note"]


def test_what_there_is_no_time_for_is_named(log):
    for part in ("contract", "kernels", "training"):
        run_part(part, log, ["local", "linear"], "cpu", time.monotonic() - 1, [16], 0)
    contracts, kernels, training = (record["left_out"] for record in log.records)
    assert "for lack of time: local by batched; " in contracts
    assert "for lack of time: sdpa flash; sdpa cuDNN; flex causal; local by batched; linear by batched" in kernels
    assert "dense by sdpa, 8192; local by batched, 8192" in training


def test_a_target_that_ends_its_process_has_failed(log, monkeypatch):
    def each(items, work, *, failed, add, **options):
        add(failed(items[-1], "planted end"))
        return []

    monkeypatch.setattr(gpu_check, "each_apart", each)
    for part in ("contract", "kernels", "training"):
        run_part(part, log, ["local"], "cpu", soon(), [16], 0)
    assert log.records[0]["failures"] == ["planted end"]
    assert (log.records[1]["length"], log.records[1]["error"]) == (16, "planted end")
    assert (log.records[2]["length"], log.records[2]["error"]) == (32768, "planted end")


def test_time_and_memory_by_length(log, monkeypatch):
    attend = get_attention("linear").attend_batched

    def short_only(self, q, *tensors, **options):
        if q.shape[2] > 16:
            raise RuntimeError("planted failure")
        return attend(self, q, *tensors, **options)

    monkeypatch.setattr(get_attention("linear"), "attend_batched", short_only)
    for what in ("sdpa flash", Target("local", {}, "batched"), Target("linear", {}, "batched")):
        for record in kernel_records(what, "cpu", [32, 16], heads_of(2, 2, 8)):
            log.add(record)
    table = {row[0]: row[2:] for row in kernel_table(log.records).rows}
    assert table["sdpa flash"][0].endswith("(1.00x)")
    assert all("ms (" in cell for cell in table["local"])
    assert table["linear"][1] == "fails"
    written = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert written == log.records
    assert checked_results(written)[0]["note"] == "RuntimeError: planted failure"
    monkeypatch.setattr(gpu_check, "LONGEST_PASS", 0.0)
    assert "skipped" in list(kernel_records("sdpa flash", "cpu", [32, 16], heads_of(2, 2, 8)))[-1]
    (refused,) = kernel_records(Target("local", {}, "flex"), "cpu", [32, 16], heads_of(2, 2, 8))
    assert "it runs on cuda, not on cpu" in refused["refused"]


def test_training_steps_learn_and_are_compared_with_the_dense_model(monkeypatch):
    dense, local = Step(None, "sdpa", 16), Step({"type": "local", "window_size": 4}, "batched", 16)
    records = [record for step in (dense, local) for record in training_record(step, "cpu", shape=TINY, steps=2)]
    for record in records:
        assert record["losses"][-1] < record["losses"][0]
    rows = training_table(records).rows
    assert rows[0][0] == "dense"
    assert rows[1][0] == "local, window_size 4"
    assert "1.00x" in rows[0][2]
    (refused,) = training_record(Step({"type": "linear"}, "flex", 16), "cpu", shape=TINY)
    assert "flex" in refused["refused"]

    def fails(*args, checkpointed, **options):
        if not checkpointed:
            raise torch.OutOfMemoryError("planted")
        return {"seconds": 1.0, "bytes": 2**30}

    monkeypatch.setattr(gpu_training, "_measured", fails)
    (record,) = training_record(dense, "cpu")
    assert record["checkpointed"]
    assert "error" not in record
    assert "1.0 GiB, checkpointed" in training_table([record]).rows[0][2]


def test_a_whole_run_writes_a_report_plots_and_what_was_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(gpu_check, "list_backends", lambda: [])
    monkeypatch.setattr(gpu_check, "training_steps", lambda: training_steps([16])[:1])
    monkeypatch.setattr(gpu_check, "training_record", partial(training_record, shape=TINY))
    gpu_check.main(tmp_path, None, ["softmax"], 60.0, "cpu", [16, 32], 0)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("gpu_check.jsonl", "report.md", "checked.json", "kernels.png", "training.png")
    }
    report = (tmp_path / "report.md").read_text()
    for title in ("Contract", "Time", "Peak memory", "Training step"):
        assert f"## {title}\n" in report
    ((one,),) = [one["results"] for one in json.loads((tmp_path / "checked.json").read_text())]
    assert one["passed"]
    assert one["seconds"] > 0
    with pytest.raises(typer.BadParameter, match="'kernel'; allowed: a part of contract, kernels, training"):
        gpu_check.main(tmp_path, ["kernel"], None, 60.0, "cpu", None, 1)
    with pytest.raises(typer.BadParameter, match="'locale'; allowed"):
        gpu_check.main(tmp_path, None, ["locale"], 60.0, "cpu", None, 1)


@pytest.mark.slow
def test_contracts_run_in_processes_of_their_own(log):
    run_part("contract", log, ["softmax", "nystrom"], "cpu", time.monotonic() + 300, [16], 2)
    assert {record["attention"] for record in log.records if record.get("passed")} == {"softmax", "nystrom"}
    write_report([{"part": "place", "versions": {}}, *log.records], log.path.parent)
