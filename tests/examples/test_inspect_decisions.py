"""examples/inspect_decisions.py on tiny models, and, marked real, that Whisper's alignment runs along the recording."""

import importlib.util
import json
import sys
from pathlib import Path

import pictured
import pytest
import sounding
import tiny
import torch
from conftest import WORDS, on_disk, tokenizer, write_rows
from PIL import Image

from attn_plugins.inspection.sounds import over_time

EXAMPLE = Path(__file__).parents[2] / "examples" / "inspect_decisions.py"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("inspect_decisions_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ran(example, tmp_path, capsys, monkeypatch):
    """Runs the script; its table, label -> column -> cell."""

    def run(verb, *arguments):
        picture = tmp_path / "out" / "one.png"
        monkeypatch.setattr(sys, "argv", ["", verb, *map(str, arguments), "--output", str(picture)])
        capsys.readouterr()
        example.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        with Image.open(picture) as made:
            assert made.width > 300
        return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}

    return run


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    tiny.build("llama", vocab_size=20).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_review(ran, bert):
    """Both labels are one model here: what is in its window differs from nothing."""
    cells = ran("review", "--text", "the cat is good", f"one={bert}", f"two={bert}")
    assert cells["one"] == cells["two"]
    assert cells["one"]["error"] == "0.00"


def test_a_translation_with_heads_that_align(ran, decoder, example):
    window = "{type: local, window_size: 2, num_sink_tokens: 0}"
    given = ["--model", decoder, "--text", "red cat is good", "--tokens", 4, "--window", 2, "--keep", 6, "--heads", 2]
    cells = ran("translation", *given, f"window={window}")
    assert list(cells) == ["dense", "window", "window, 6 heads kept"]
    assert cells["window"]["of these heads, on the source"] == "0.00"
    assert cells["dense"]["error"] == "0.00"
    assert float(cells["window, 6 heads kept"]["of these heads, on the source"]) > 0.1
    assert cells["window"]["loss of the dense one's"] > cells["dense"]["loss of the dense one's"]


def test_heads_that_align_are_no_sinks(example):
    class Layer:
        layer, heads = 3, [0, 1]
        sink = torch.zeros(4, 6)
        sink[:, 2] = 1.0
        weights_BhqK = torch.stack([sink, torch.eye(6)[1:5] * 0.6])[None]

    assert example.aligning([Layer], slice(0, 6), 1) == [(3, 1)]


def test_a_caption_and_a_recording(ran, tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "red.png")
    folder = pictured.captioner(tmp_path / "captioner")
    given = ["--model", folder, "--image", tmp_path / "red.png", "--tokens", 3]
    cells = ran("caption", *given, "near={type: neighborhood_2d, kernel_size: 3, roles: [encoder]}")
    assert float(cells["dense"]["entropy"]) <= float(cells["dense"]["entropy of an even one"])
    assert cells["near"]["error"] == "0.00", "cross-attention is the model's own in both"
    sounding.recordings(tmp_path, 1)
    whisper = ["--model", sounding.whisper(tmp_path / "whisper"), "--audio", tmp_path / "0.wav", "--tokens", 4]
    cells = ran("speech", *whisper, "two={type: topk, topk: 2, roles: [cross]}")
    assert float(cells["two"]["entropy"]) <= 0.7


def test_a_long_document(ran, decoder, tmp_path, example, monkeypatch):
    """The window sees nothing of the key: no head has any share of it."""
    rows = example.recall_rows

    def short(documents, words, **options):
        (row,) = rows(documents, words, **{**options, "parts": ["copy"], "passage": 12})
        return [type(row)(input_ids_N=row.input_ids_N, answers={"passkey": row.answers["copy"]})]

    monkeypatch.setattr(example, "recall_rows", short)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": " ".join(WORDS[(n * 7 + n // 5) % 16] for n in range(300))}])
    given = ["--model", decoder, "--texts", texts, "--length", 60]
    cells = ran("document", *given, "window={type: local, window_size: 4, num_sink_tokens: 0}")
    assert cells["window"]["most of a head on the key"] == "0.00"
    assert float(cells["dense"]["most of a head on the key"]) > 0


def test_what_is_not_labelled_is_an_error(example):
    with pytest.raises(ValueError, match="allowed: LABEL=FOLDER, LABEL=RULE"):
        example.labelled("local")


@pytest.mark.real
def test_whisper_listens_along_the_recording(example, ran, monkeypatch):
    folder, clips = on_disk("models", "whisper-tiny-en"), on_disk("data", "speech")
    row = json.loads((clips / "validation.jsonl").read_text(encoding="utf8").splitlines()[1])
    drawn = {}
    monkeypatch.setattr(example, "over_time", lambda sides, *rest: drawn.update(sides) or over_time(sides, *rest))
    rule = "best 16 frames={type: topk, topk: 16, roles: [cross]}"
    cells = ran("speech", "--model", folder, "--audio", clips / row["audio"], "--layers", "[2, 3]", rule)
    assert row["text"].split()[0] in cells["dense"]["it writes"].lower()
    assert float(cells["best 16 frames"]["entropy"]) < float(cells["dense"]["entropy"])
    places = drawn["dense"][1:-1].argmax(-1).double()
    order = torch.stack([places, torch.arange(len(places)).double()])
    assert torch.corrcoef(order)[0, 1] > 0.9
