"""Processes that were started together run each cell once, what is timed alone, and leave the table of one process."""

import json
import re
import threading

import fleet
import pytest
import torch
import yaml
from test_chosen import Cell

from attn_plugins.benchmark.results import shares as shares_file
from attn_plugins.benchmark.results.cells import run_cells
from attn_plugins.benchmark.results.shares import PLACE, Shares, shares
from attn_plugins.benchmark.results.store import Results

CELLS = [Cell(attention, measure, seed) for attention in "ab" for measure in ("evaluate", "speed") for seed in range(4)]


def run_together(path, number, measure, **options):
    """What each of the processes, here threads, has said."""
    store, said = torch.distributed.HashStore(), [[] for _ in range(number)]

    def run(rank):
        its = {"say": said[rank].append, "shares": Shares(store, rank, number), "fresh": False, "announce": True}
        timed = lambda cell: cell.measure == "speed"  # noqa: E731
        run_cells(
            [[cell] for cell in CELLS], Results(path), lambda group: measure(rank, group), note, timed=timed, **its
        )

    def note(cell, result):
        return "noted"

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return said


def test_each_cell_is_run_once_and_what_is_timed_by_the_first_when_all_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(shares_file, "POLL", 0.01)
    ran, both = [], threading.Barrier(2)

    def measure(rank, group):
        (cell,) = group
        if len({one for one, _ in ran}) < 2 and cell.measure != "speed":
            ran.append((rank, cell))
            both.wait(30)  # two are measuring at the same time
        else:
            ran.append((rank, cell))
        outcome = {"status": "error", "error": "no"} if cell.seed == 3 else {"status": "ok", "result": {}}
        yield cell, outcome

    said = run_together(tmp_path / "results.jsonl", 2, measure)
    keys = [cell.key for _, cell in ran]
    assert sorted(keys) == sorted(cell.key for cell in CELLS), "once each, what fails too"
    assert {rank for rank, cell in ran if cell.measure == "evaluate"} == {0, 1}
    assert {rank for rank, cell in ran if cell.measure == "speed"} == {0}
    assert [cell.measure for _, cell in ran] == ["evaluate"] * 8 + ["speed"] * 8
    assert all(
        re.match(rf"process {rank + 1}: \[\d+/16\] .*: (noted|no)$", line) for rank in (0, 1) for line in said[rank]
    )
    assert len(Results(tmp_path / "results.jsonl").records) == 16


def test_alone_there_is_nothing_to_share(monkeypatch):
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    assert shares() is None


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "PARALLELISM_CONFIG"])
def test_models_that_processes_hold_together_are_refused(monkeypatch, kind):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=f"each process runs cells of its own.*allowed: several without {kind}"):
        shares()


def test_processes_without_a_place_to_meet_are_told_how_to_start(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match=r"the processes cannot meet: .*RANK expected.*start them by accelerate launch or"
    ):
        shares()


@pytest.mark.parametrize(
    ("visible", "local", "seen"), [(None, 1, "1"), ("4,7", 1, "7"), ("4,7", 0, "4"), ("4", 1, None)]
)
def test_each_process_of_a_machine_sees_a_device_of_its_own(monkeypatch, visible, local, seen):
    for name, value in {"WORLD_SIZE": 2, "RANK": 3, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(torch.distributed.HashStore(), 3, 4)]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if seen is None:
        with pytest.raises(ValueError, match="process 2 of this machine has no device; allowed: up to 1 processes"):
            shares()
        return
    found = shares()
    assert (found.rank, found.number, found.first) == (3, 4, False)
    environment = shares_file.os.environ
    assert environment["CUDA_VISIBLE_DEVICES"] == seen
    assert environment["RANK"] == "3", "by which one of them speaks"
    assert not set(PLACE) & set(environment), "nothing trains with others"


def test_a_comparison_over_two_processes(llama, text, tmp_path):
    finetune = {"block_size": 16, "lora": {"r": 2}, "training": {"max_steps": 2, "save_strategy": "no"}}
    settings = {
        "models": {"tiny": llama},
        "attentions": {
            "dense": None,
            "learned": {"type": "linear", "feature_map": "hedgehog"},
        },
        "data": {"source": text},
        "evaluation": {"length": 16, "max_tokens": 64},
        "untrained": False,
        "transfer": {"length": 16, "steps": 2},
        "finetune": {**finetune, "training": {**finetune["training"], "disable_tqdm": True}},
        "speed": {"lengths": {"attention": [16]}, "passes": ["forward"], "rounds": 1},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    words = ["compare", "-c", str(tmp_path / "c.yaml"), "-o"]
    launches = [
        fleet.Launch(name="two", arguments=[*words, str(tmp_path / "two")], processes=2),
        fleet.Launch(name="one", arguments=[*words, str(tmp_path / "one")]),
        fleet.Launch(name="fresh", arguments=[*words, str(tmp_path / "two"), "--fresh"], processes=2),
        fleet.Launch(name="wrong", arguments=[*words, str(tmp_path / "x"), "-s", "attentions.w=locl"], processes=2),
    ]
    two, one, fresh, wrong = fleet.train(tmp_path, launches)
    assert two.statuses == [0, 0], two.said
    assert one.statuses == [0], one.said
    found = [
        [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    ]
    assert [record["measure"] for record in found[0]][-2:] == ["speed"] * 2
    values = [{record["key"]: record["result"].get("value") for record in records} for records in found]
    assert len(found[0]) == len(values[0]) == 5
    assert values[0] == values[1]
    assert {record["result"]["train"].get("processes", 1) for record in found[0] if "train" in record["result"]} == {1}
    assert {line.partition(":")[0] for line in two.said.splitlines() if line.startswith("process ")} == {
        "process 1",
        "process 2",
    }
    assert two.said.count("files:\n") == 1
    for refused, why in ((fresh, "--fresh takes away what other processes use"), (wrong, "attentions.w: unknown")):
        (line,) = refused.said.splitlines()
        assert line.startswith(f"error: {why}"), "one of them says so"
