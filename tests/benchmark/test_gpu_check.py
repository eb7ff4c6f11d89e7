"""What make gpu-check does on a GPU, on a CPU: what it finds is kept as it comes, shown, and within its time."""

import json
import time

import pytest
import torch
import typer

from attn_plugins.benchmark import gpu_check, gpu_training
from attn_plugins.benchmark.backend_contract import heads_of
from attn_plugins.benchmark.gpu_check import Log, Target, contract_record, targets
from attn_plugins.benchmark.gpu_report import (
    checked_results,
    contract_table,
    kernel_table,
    training_table,
    write_report,
)
from attn_plugins.benchmark.gpu_training import ModelShape, training_records
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
    passed = contract_record(target, "cpu")
    assert (passed["passed"], passed["failures"]) == (True, [])
    attend = get_attention("nystrom").attend_batched
    monkeypatch.setattr(get_attention("nystrom"), "attend_batched", lambda *a, **o: 2 * attend(*a, **o))
    failed = contract_record(target, "cpu")
    assert not failed["passed"]
    assert "whole rows: output differs by" in failed["failures"][0]
    monkeypatch.setattr(gpu_check, "contract", lambda *a, **o: int("planted refusal"))
    assert "planted refusal" in contract_record(target, "cpu")["refused"]
    monkeypatch.setattr(gpu_check, "contract", lambda *a, **o: 1 / 0)
    assert contract_record(target, "cpu")["failures"] == ["ZeroDivisionError: division by zero"]
    records = [passed, failed, {**passed, "attention": "local"}]
    assert [row[0] for row in contract_table(records).rows] == ["nystrom", "local"]
    assert contract_table(records).rows[1][1] == "passed"
    results = {(one["attention"], one["backend"]): one for one in checked_results(records)}
    assert results["local", "batched"]["passed"]
    assert "differs by" in results["nystrom", "batched"]["error"]


def test_what_there_is_no_time_for_is_named(log):
    over = time.monotonic() - 1
    gpu_check.check_contracts(log, ["local", "linear"], "cpu", over, 1)
    gpu_check.time_kernels(log, ["local"], "cpu", over, [16], heads_of(2, 2, 8))
    (training,) = training_records("cpu", over, lengths=[16], shape=TINY)
    assert "local by batched" in log.records[0]["left_out"]
    assert "local by batched from 16 on" in log.records[-1]["left_out"]
    assert "dense by sdpa, 16; local by batched, 16" in training["left_out"]


def test_time_and_memory_by_length(log, monkeypatch):
    monkeypatch.setattr(gpu_check, "list_backends", lambda: [])
    attend = get_attention("linear").attend_batched

    def short_only(self, q, *tensors, **options):
        if q.shape[2] > 16:
            raise RuntimeError("planted failure")
        return attend(self, q, *tensors, **options)

    monkeypatch.setattr(get_attention("linear"), "attend_batched", short_only)
    gpu_check.time_kernels(log, ["local", "linear"], "cpu", soon(), [32, 16], heads_of(2, 2, 8))
    table = {row[0]: row[2:] for row in kernel_table(log.records).rows}
    assert table["sdpa flash"][0].endswith("(1.00x)")
    assert all("ms (" in cell for cell in table["local"])
    assert table["linear"][1] == "fails"
    written = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert written == log.records
    assert checked_results(written)[0]["error"] == "RuntimeError: planted failure"
    monkeypatch.setattr(gpu_check, "LONGEST_PASS", 0.0)
    gpu_check.time_kernels(log, ["local"], "cpu", soon(), [32, 16], heads_of(2, 2, 8))
    assert "skipped" in log.records[-1]


def test_training_steps_learn_and_are_compared_with_the_dense_model(monkeypatch):
    monkeypatch.setattr(gpu_training, "list_backends", lambda: [])
    monkeypatch.setattr(gpu_training, "RULES", (None, {"type": "local", "window_size": 4}))
    records = list(training_records("cpu", soon(), lengths=[16], shape=TINY, steps=2))
    assert [record["backend"] for record in records] == ["sdpa", "batched"]
    for record in records:
        assert record["losses"][-1] < record["losses"][0]
    rows = training_table(records).rows
    assert rows[0][0] == "dense"
    assert rows[1][0] == "local, window_size 4"
    assert "1.00x" in rows[0][2]

    def fails(*args, checkpointed, **options):
        if not checkpointed:
            raise torch.OutOfMemoryError("planted")
        return {"seconds": 1.0, "bytes": 2**30}

    monkeypatch.setattr(gpu_training, "_measured", fails)
    record, _ = training_records("cpu", soon(), lengths=[16], shape=TINY)
    assert record["checkpointed"]
    assert "error" not in record
    assert "1.0 GiB, checkpointed" in training_table([record]).rows[0][2]


def test_a_whole_run_writes_a_report_plots_and_what_was_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(gpu_check, "list_backends", lambda: [])
    monkeypatch.setattr(gpu_check, "training_records", lambda *a: training_records(*a, lengths=[16], shape=TINY))
    monkeypatch.setattr(gpu_training, "RULES", (None,))
    gpu_check.main(tmp_path, None, ["softmax"], 60.0, "cpu", [16, 32], 1)
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
    gpu_check.check_contracts(log, ["softmax", "nystrom"], "cpu", time.monotonic() + 300, 2)
    assert {record["attention"] for record in log.records if record.get("passed")} == {"softmax", "nystrom"}
    write_report([{"part": "place", "versions": {}}, *log.records], log.path.parent)
