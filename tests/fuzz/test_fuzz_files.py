"""Damaged files: what can be read is read, what can't is refused in one line, and the file is as it was."""

import json
import tempfile
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from rounds import a_round, junk_in_files, one_clear_line
from transformers import AutoConfig, AutoModelForCausalLM

import attn_plugins as ap
from attn_plugins.benchmark.results import store as results
from attn_plugins.config import yaml as settings
from attn_plugins.data.sources import DataConfig, load_data

pytestmark = pytest.mark.fuzz

RECORDS = [{"key": f"k{n}", "status": "ok", "seconds": 0.5, "what": {"text": "naïve"}} for n in range(3)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
YAML = (
    b"model: a\ntraining: {max_steps: 3, learning_rate: 1e-4}\nrules: &r\n  - {type: local, window_size: 8}\nmore: *r\n"
)
ROWS = b'{"text": "one two", "label": "a"}\n{"text": "three", "label": "b"}\n{"text": "four", "label": "a"}\n'


@st.composite
def damaged(draw, raw):
    """A file cut off, with bytes changed, lines swapped or doubled, or junk put in."""
    found = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found)))
        match draw(st.sampled_from(["cut", "bytes", "double", "json", "digits", "deep"])):
            case "cut":
                found = found[:at]
            case "bytes":
                found[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
            case "double":
                found[at:at] = found[: draw(st.integers(0, len(found)))]
            case "json":
                found[at:at] = json.dumps(draw(junk_in_files)).encode("utf-8", "replace")
            case "digits":
                found[at:at] = b"9" * 5000
            case "deep":
                found[at:at] = draw(st.sampled_from([b"[", b'{"a":', b"- ", b"{a: "])) * draw(
                    st.sampled_from([3, 5000])
                )
    return bytes(found)


def written(raw, name):
    path = Path(tempfile.mkdtemp()) / name
    path.write_bytes(raw)
    return path


@a_round
@given(raw=damaged(LINES))
def test_results(raw):
    path = written(raw, "results.jsonl")
    with one_clear_line([]):
        read = results.Results(path)
        assert all(isinstance(record, dict) and record["key"] == key for key, record in read.records.items())
        assert path.read_bytes() == raw, "reading a file changed it"
        read.add({"key": "new", "status": "ok"})
        again = results.Results(path)
        assert again.records.keys() == read.records.keys() | {"new"}


@a_round
@given(raw=damaged(YAML))
def test_settings(raw):
    with one_clear_line([]):
        assert isinstance(settings.read_yaml(written(raw, "settings.yaml")), dict)


@a_round
@given(raw=damaged(ROWS), suffix=st.sampled_from(["jsonl", "json", "csv", "txt"]))
def test_data(raw, suffix):
    with one_clear_line([]):
        train, held_out = load_data(DataConfig(source=str(written(raw, f"rows.{suffix}"))))
        assert all(isinstance(text, str) for split in (train, held_out) for text in split["text"])


@a_round
@given(flag=junk_in_files, number=st.integers(0, 2))
def test_rules_in_a_checkpoint(flag, number):
    model = tiny.build("llama")
    ap.swap_attention(model, {"type": "local", "window_size": 4})
    folder = Path(tempfile.mkdtemp())
    model.save_pretrained(folder)
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    if number == 0:
        tree["attn_plugin"] = flag
    elif number == 1:
        tree["attn_plugin"][0]["window_size"] = flag
    else:
        tree["attn_plugin"].append(flag)
    path.write_text(json.dumps(tree))
    with one_clear_line([]):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        # What loads is what the file says: never a model that is not swapped under rules that say it is.
        assert AutoConfig.from_pretrained(folder).attn_plugin is None or any(
            row.plugin for row in ap.describe_attention(loaded)
        )
