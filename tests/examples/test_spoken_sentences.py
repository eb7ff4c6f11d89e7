"""examples/training/spoken_sentences.py: a table of recordings, of what flite is asked to say."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.tasks import trained_task

EXAMPLE = Path(__file__).parents[2] / "examples" / "training" / "spoken_sentences.py"
FLITE = """#!{python}
import sys, wave
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with wave.open(options["-o"], "wb") as file:
    file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
    file.writeframes(options["-t"].encode() * 40)
"""


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("spoken_sentences", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_it_writes_is_data_for_speech_recognition(example, tmp_path, monkeypatch):
    flite = tmp_path / "bin" / "flite"
    flite.parent.mkdir()
    flite.write_text(FLITE.format(python=sys.executable))
    flite.chmod(0o755)
    monkeypatch.setenv("PATH", f"{flite.parent}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "spoken"
    monkeypatch.setattr(sys, "argv", ["", "--out", str(out), "--train", "5", "--validation", "2"])
    example.main()
    train, held_out = load_data(DataConfig(source=str(out)), trained_task("speech-recognition").columns)
    assert (len(train), len(held_out)) == (5, 2)
    for row in map(json.loads, (out / "train.jsonl").read_text().splitlines()):
        assert (out / row["audio"]).read_bytes().endswith(row["text"].encode() * 40), (
            "it is this sentence that was said"
        )
        assert row["text"].replace(",", "").replace(" ", "").isalpha()


def test_it_says_what_is_missing(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit):
        example.main()
    assert "flite is not installed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="asked for 2 sentences, and the texts have 1 of plain words"):
        example.sentences(["No. Here is a sentence of plain words. And `another` that is not plain at all."], 2)
