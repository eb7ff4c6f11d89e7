"""Work in processes of its own: what crashes or hangs is told by name, and the others go on."""

import os
import time

import pytest

from attn_plugins.benchmark.checks.apart import each_apart


def work(item):
    yield {"item": item, "step": 1}
    if item == "crashes":
        os._exit(7)
    if item == "hangs":
        time.sleep(60)
    yield {"item": item, "step": 2}


def run(items, **options):
    records = []
    defaults = {"processes": 0, "deadline": time.monotonic() + 100, "patience": 50}
    left = each_apart(
        items,
        work,
        **{**defaults, **options},
        add=records.append,
        failed=lambda item, why: {"item": item, "why": why},
    )
    return records, left


def test_in_this_process_items_are_worked_on_in_their_order():
    records, left = run(["a", "b"])
    assert [(one["item"], one["step"]) for one in records] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert left == []


@pytest.mark.parametrize("processes", [0, 2])
def test_what_was_not_begun_by_the_deadline_is_left(processes):
    assert run(["a", "b"], deadline=time.monotonic() - 1, processes=processes) == ([], ["a", "b"])


def test_what_ends_its_process_is_named_and_the_others_go_on():
    records, left = run(["a", "crashes", "b"], processes=1)
    assert left == []
    assert [one["item"] for one in records if one.get("step") == 2] == ["a", "b"]
    assert [one for one in records if "why" in one] == [
        {"item": "crashes", "why": "its process ended with exit status 7"}
    ]
    assert {"item": "crashes", "step": 1} in records, "what was sent before is kept"


@pytest.mark.slow
def test_what_hangs_is_given_up_and_what_runs_at_the_deadline_is_left():
    records, left = run(["hangs", "a"], processes=2, patience=20)
    assert [one["why"] for one in records if "why" in one] == ["given up after 20 s"]
    assert {"item": "a", "step": 2} in records
    records, left = run(["a", "hangs", "b"], processes=1, deadline=time.monotonic() + 25)
    assert left == ["hangs", "b"]
    assert {"item": "a", "step": 2} in records
