"""The example of captions by an LSTM: a tiny encoder, a few pictures, an epoch; what it writes is read again."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image

import attn_plugins as ap

SCRIPT = Path(__file__).parents[2] / "examples" / "training" / "show_attend_tell.py"


@pytest.fixture
def folders(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path / "encoder")
    images = transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    images.save_pretrained(tmp_path / "encoder")
    data = tmp_path / "data"
    data.mkdir()
    for split, number in (("train", 6), ("validation", 2)):
        rows = []
        for row in range(number):
            Image.new("RGB", (30, 28), (40 * row, 0, 0)).save(data / f"{split}{row}.png")
            rows.append({"image": f"{split}{row}.png", "caption": f"A red of {row}."})
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return tmp_path


@pytest.mark.filterwarnings("ignore:Glyph")  # of tokens that are control characters
@pytest.mark.parametrize("place", ["luong", pytest.param("bahdanau", marks=pytest.mark.slow)])
def test_captioners_are_trained_measured_drawn_and_saved(folders, place, monkeypatch, capsys):
    out = folders / "out"
    given = [f"--encoder={folders / 'encoder'}", f"--data={folders / 'data'}", f"--out={out}", f"--place={place}"]
    given += [
        "--attention=none",
        "--attention=additive",
        "--seed=3",
        "--image-size=42",
        "--hidden-size=32",
        "--epochs=20",
        "--learning-rate=0.05",
    ]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, "--vocabulary=300", "--look=validation1.png"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    records = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf8").splitlines()]
    assert [(one["attention"], one["seed"], one["settings"]["place"]) for one in records] == [
        ("none", 3, place),
        ("additive", 3, place),
    ]
    for one in records:
        assert one["losses"][-1] < one["losses"][0] - 0.2
        assert {"loss", "chrf", "sacrebleu", "rougeL"} <= set(one["figures"])
        assert [row["caption"] for row in one["written"]] == ["A red of 0.", "A red of 1."]
    assert (out / "additive-3" / "looks.png").stat().st_size > 1000
    model = transformers.AutoModelForImageTextToText.from_pretrained(out / "additive-3")
    rows = {row.role: (row.plugin, model.decoder.config.attention) for row in ap.describe_attention(model)}
    assert rows == {"encoder": (None, place), "cross": ("additive", place)}
    assert "additive-3: trained from" in capsys.readouterr().out
    processor = transformers.AutoProcessor.from_pretrained(out / "additive-3")
    for row in records[1]["written"]:  # the states that it learned from are those that the saved encoder makes
        picture = Image.open(folders / "data" / row["image"]).convert("RGB")
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        ids = model.generate(pixel_values=pixels, max_new_tokens=24, do_sample=False, num_beams=1)
        assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == row["written"]
