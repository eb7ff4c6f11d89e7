"""examples/transfer/lengths.py measures tiny models, and what was measured is not measured again."""

import importlib.util
import json
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "transfer" / "lengths.py"


def test_every_case_is_measured_at_every_length(llama, text, tmp_path, monkeypatch, one_thread):
    spec = importlib.util.spec_from_file_location("lengths_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    cases = {label: (rules, length and length // 32) for label, (rules, length) in example.CASES.items()}
    window = {"window_size": 4, "num_sink_tokens": 1}
    small = {label: (rules and {**rules, **window}, length) for label, (rules, length) in cases.items()}
    monkeypatch.setattr(example, "CASES", small)
    measured = example.measure
    sizes = {"lengths": (16, 32), "rows": 2, "steps": 2}
    monkeypatch.setattr(example, "measure", lambda seed, label, **given: measured(seed, label, **{**given, **sizes}))
    out = tmp_path / "lengths.jsonl"
    monkeypatch.setattr(sys, "argv", ["", f"--model={llama}", f"--texts={text}", f"--out={out}"])
    example.main()
    example.main()
    lines = [json.loads(line) for line in out.read_text("utf8").splitlines()]
    found = {line["settings"]["case"]: line["result"] for line in lines}
    assert list(found) == list(small)
    assert len(lines) == len(small)
    assert all(list(result) == ["16", "32"] for result in found.values())
    assert len({result["32"] for result in found.values()}) == len(found)
