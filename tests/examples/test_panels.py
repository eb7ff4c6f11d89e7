"""examples/training/panels.py: pictures of four pieces, named row by row, from a folder of idx files."""

import importlib.util
import json
import struct
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "training" / "panels.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("panels", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fashion(tmp_path):
    """Each piece is of one shade, which tells its class."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for split, rows in (("train", 24), ("t10k", 8)):
        labels = bytes(row % 10 for row in range(rows))
        pixels = b"".join(bytes([20 * label + 5]) * 28 * 28 for label in labels)
        header = bytes([0, 0, 8, 3]) + struct.pack(">3I", rows, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + pixels)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", rows) + labels)
    return folder


def run(example, monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["panels.py", *map(str, given)])
    example.main()


def test_a_caption_names_the_pieces_where_they_stand(example, fashion, tmp_path, monkeypatch):
    out = tmp_path / "panels"
    run(example, monkeypatch, "--fashion-mnist", fashion, "--out", out, "--train", 6, "--validation", 2)
    used = []
    for split, number in (("train", 6), ("validation", 2)):
        rows = [json.loads(line) for line in (out / f"{split}.jsonl").read_text(encoding="utf8").splitlines()]
        assert len(rows) == number
        for row in rows:
            image = Image.open(out / row["image"])
            assert image.size == (56, 56)
            shades = [image.getpixel(place) for place in ((10, 10), (40, 10), (10, 40), (40, 40))]
            assert [20 * label + 5 for label in row["labels"]] == shades
            assert row["caption"] == ", ".join(example.NAMES[label] for label in row["labels"])
        used.append(sorted(label for row in rows for label in row["labels"]))
    assert used == [sorted(row % 10 for row in range(24)), list(range(8))], "each piece once, held out from test"


def test_more_than_there_are_is_refused_before_anything_is_written(example, fashion, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(example, monkeypatch, "--fashion-mnist", fashion, "--out", tmp_path / "out", "--train", 6)
    assert "--validation 300: four pieces each; test has 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
