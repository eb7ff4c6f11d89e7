"""Attention of rows that processes have parts of equals that of one process, in outputs and all gradients."""

import gc
import json
import weakref
from types import SimpleNamespace

import parts_program
import programs
import pytest
from pages import read

from attn_plugins.core.part import Part
from attn_plugins.ops.parts.halo import Reach
from attn_plugins.ops.parts.pattern import in_part
from attn_plugins.ops.parts.states import rounds
from attn_plugins.ops.softmax.patterns.band import Band

CASES = [parts_program.title(*case) for case in parts_program.cases()]
REFUSED = {
    title: "give each text a row of its own"
    for title in CASES
    if "bidirectional packed" in title and title.split()[0] in ("longformer", "linear")
}
"""What says why, by case."""


def results(folder, *given):
    """By number of processes and backend, then by case: what each process wrote."""
    done = programs.run(parts_program.__file__, folder, *given)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        _, number, backend = path.stem.split("-")
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault((int(number), backend), {}).setdefault(line["case"], []).append(line)
    return found


def check(found, case):
    for (number, backend), lines in found.items():
        assert len(lines[case]) == number, (number, backend)
        for line in lines[case]:
            if case in REFUSED:
                assert REFUSED[case] in line["refused"], (number, backend)
            else:
                assert line["error"] < 1e-10, (number, backend, line)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return results(tmp_path_factory.mktemp("parts"), 4, "auto")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return results(tmp_path_factory.mktemp("parts"), 2, "auto", 3, "auto", 4, "batched")


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(four, case):
    check(four, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_by_other_numbers_and_forms(others, case):
    check(others, case)


HALO, ROUNDS = 2 * 2 * (6 + 6) * 8, 3
"""Bytes of a token's keys and values in both rows, and rounds of four parts."""
SENT = {
    "local causal whole window_size=5 num_sink_tokens=0": HALO * 4,
    "local causal whole window_size=7 num_sink_tokens=4": HALO * (6 + 4 * ROUNDS),
    "local causal whole window_size=30 num_sink_tokens=2": HALO * (29 + 2 * ROUNDS),
    "linear causal whole feature_map=elu chunk_size=8": 2 * 2 * 6 * 7 * 8 * ROUNDS,
    "linear causal whole feature_map=hedgehog chunk_size=64": 2 * 2 * 12 * 7 * 8 * ROUNDS,
    "linear_window causal whole window_size=5 num_sink_tokens=4 chunk_size=8": HALO * (5 + 4 * ROUNDS)
    + 2 * 2 * 12 * 7 * 8 * ROUNDS,
    "retention causal whole chunk_size=4": 4 * (2 * 7 * 7 + 1) * 8 * ROUNDS,
    "gated_delta causal whole chunk_size=4 initial_beta=0.6 initial_memory=9.0": 2 * 2 * 7 * 14 * 8 * ROUNDS,
    "softmax causal whole ": HALO * 12 * 3,
}
"""Bytes that the first of four parts sends in the forward, as docs/scale.md says."""


@pytest.mark.parametrize("case", SENT)
def test_bytes_are_those_of_the_formulas(four, case):
    lines = four[4, "auto"][case]
    assert lines[0]["sent"] == SENT[case]
    assert max(line["sent"] for line in lines) == SENT[case]
    assert f"| {SENT[case]:,} |" in read("docs/scale.md")


def test_bytes_of_first_tokens_that_see_all(four):
    """Beside a halo on both sides: what they are, and what they find in each part."""
    lines = four[4, "auto"]["longformer bidirectional whole window_size=4 num_global_tokens=3"]
    number = 2 * 8 * 4 * 3  # bytes of one value for each of them, head and row
    sums = number * 2 * (6 + 6 + 1) * 3 // 4 + number * 3
    assert max(line["sent"] for line in lines) == HALO * (3 + 3 + 3 * ROUNDS) + sums


def test_a_ring_sends_what_grows_with_the_row():
    assert SENT["softmax causal whole "] == HALO * (parts_program.LENGTH - parts_program.LENGTH // 4)
    assert SENT["local causal whole window_size=5 num_sink_tokens=0"] == SENT["softmax causal whole "] // 9
    assert rounds(4) == ROUNDS
    assert [rounds(number) for number in (1, 2, 3, 5, 9, 1024)] == [0, 1, 2, 3, 4, 11]


def test_nothing_of_a_part_outlives_its_call():
    """Tables of whole rows would wait for the garbage collector, on a device that has no room for them."""

    def used():
        part = Part(parts_program.mask_of("packed", causal=True), SimpleNamespace(index=0, number=1))
        rules, reach = [(slice(0, 4), Band(5, 0, num_first=2))], Reach(0, 0, 2)
        around, ((_, rule),) = in_part(rules, part, reach)
        assert len(around.cached(rule, lambda: tuple(rule.tiles(around)))) == 1
        assert in_part(rules, part, reach)[0] is around
        return weakref.ref(part.mask)

    gc.disable()
    try:
        assert used()() is None
    finally:
        gc.enable()
