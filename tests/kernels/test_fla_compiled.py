"""flash-linear-attention's kernels as the backend fla launches them, compiled for GPUs that are not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flex_in_triton import GPUS

pytestmark = pytest.mark.kernels

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "kernels.md"
ATTENTIONS = ("linear", "retention", "gated_linear", "delta", "gated_delta")


def said(architecture, what):
    """What the script prints, in a process of its own, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = Path(__file__).with_name("fla_compiled.py")
    run = [sys.executable, str(script), str(architecture), what, *ATTENTIONS]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", GPUS)
def test_kernels_compile_and_fit_into_shared_memory_as_the_page_says(architecture):
    most = {}
    for row in said(architecture, "compile"):
        assert row["shared"] <= GPUS[architecture], row
        most[row["kernel"]] = max(row["shared"], most.get(row["kernel"], 0))
    column = list(GPUS).index(architecture)
    lines = re.findall(r"^\| `(\w+)` \| [\w, ]+ \| (\d+) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    assert most == {name: int(sizes[column]) for name, *sizes in lines}


def test_a_layer_asks_for_as_much_at_every_length_as_the_page_says():
    rows = said(100, "count")
    found = {name: {tuple(row[key] for key in ("operations", "kernels")) for row in rows if row["attention"] == name
                    and not row["packed"]} for name in ATTENTIONS}  # fmt: skip
    lines = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert found == {name: {(int(operations), int(kernels))} for name, operations, kernels, *_ in lines}
    for name, _, _, syncs, peak in lines:
        mine = [row for row in rows if row["attention"] == name]
        assert {row["syncs"] for row in mine if row["packed"]} == {int(syncs)}
        assert all(row["syncs"] == 0 and row["peak"] < float(peak) + 0.5 for row in mine if not row["packed"]), mine
