"""examples/high_resolution.py on a tiny model: figures that can be told beforehand, and what is kept of a run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

EXAMPLE = Path(__file__).parents[2] / "examples" / "high_resolution.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("high_resolution_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def objects(tmp_path):
    """Three discs of one colour each, an opaque picture and a small one."""
    from PIL import Image, ImageDraw

    folder = tmp_path / "objects" / "inner"
    folder.mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue")):
        picture = Image.new("RGBA", (100, 120), (0, 0, 0, 0))
        ImageDraw.Draw(picture).ellipse((5, 5, 95, 115), fill=colour)
        picture.save(folder / f"{number}.png")
    Image.new("RGB", (200, 200)).save(folder / "opaque.png")
    Image.new("RGBA", (20, 20)).save(folder / "small.png")
    return folder.parent


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    made = tf.Dinov2Model(tf.Dinov2Config(**sizes, layerscale_value=1.0, initializer_range=0.3))
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_scenes_are_the_same_at_every_size_and_classes_are_exact(example, objects):
    painter = example.Painter(objects, 3)
    small, large = (painter.scene(7, size) for size in (112, 224))
    assert small[0].shape == (3, 112, 112)
    halved = torch.nn.functional.interpolate(large[0].unsqueeze(0), scale_factor=0.5, mode="area")[0]
    assert (halved - small[0]).abs().mean() < 0.02
    assert (large[1][::2, ::2] == small[1]).float().mean() > 0.95
    assert not torch.equal(painter.scene(8, 112)[1], small[1])
    red = small[0][:, small[1] == 1].mean(dim=1)
    assert red[0] > 0.9
    assert red[1:].max() < 0.1
    found = painter.scenes(7, 1, 112, (16, 16))
    assert found.classes[0].shape == (256,)
    assert {-1, 0, 1, 2, 3} == set(found.classes[0].tolist())
    with pytest.raises(ValueError, match="has 3 PNG pictures with transparency, of 96 pixels at least; 4 are needed"):
        example.Painter(objects, 4)


def test_the_probe_and_its_measure(example):
    classes = torch.tensor([0, 1, 2, -1] * 20)
    states = torch.randn(80, 5, generator=torch.Generator().manual_seed(0)) * 0.01
    states[classes >= 0] += torch.eye(5)[classes[classes >= 0]]
    classify = example.probe([states[:40], states[40:]], [classes[:40], classes[40:]], 3)
    assert torch.equal(classify(states)[classes >= 0], classes[classes >= 0])
    assert example.mean_iou(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 1, -1]), 4) == pytest.approx(7 / 12)


def test_a_run(example, objects, model, tmp_path, monkeypatch, capsys, one_thread):
    out = tmp_path / "out"
    attentions = [
        "all={type: neighborhood_2d, kernel_size: 6}",
        "windows={type: window_2d, window_size: 2, shift_size: 0, layers: 0}",
        "linear={type: linear, feature_map: hedgehog}",
    ]
    chosen = [part for given in attentions for part in ("--attention", given)]
    arguments = ["--model", model, "--objects", objects, "--classes", 3, "--scenes", "56:1:1", "84:1:1", *chosen]
    arguments += ["--transfer-steps", 2, "--transfer-size", 56, "-o", out]
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    example.main()
    records = [json.loads(line) for line in (out / "high_resolution.jsonl").read_text("utf-8").splitlines()]
    found = {(record["size"], record["attention"], record["stage"]): record for record in records}
    assert len(found) == len(records) == 2 * (1 + 2 * 3)
    for size, side in ((56, 4), (84, 6)):
        own, every = found[size, "the model's own", ""], found[size, "all", "before"]
        assert own["grid"] == [side, side]
        assert own["agreement"] == pytest.approx(1)
        assert every["agreement"] == pytest.approx(1, abs=1e-4)
        assert every["mean_iou"] == pytest.approx(own["mean_iou"], abs=0.02)
        assert every["keys_seen"] == 1
        linear = found[size, "linear", "before"]
        assert linear["keys_seen"] is None
        assert linear["agreement"] < 0.999
        assert all(record["peak_bytes_of_a_layer"] > 0 for record in records if record["stage"] != "after")
    # In one of two layers patches see 4 of 36 and the class token, of the queries that are counted.
    assert 0.5 < found[84, "windows", "before"]["keys_seen"] < 0.75
    text = (out / "high_resolution.md").read_text("utf-8")
    assert text in capsys.readouterr().out
    assert text.count("| windows | ") == 2
    before = (out / "high_resolution.jsonl").read_text("utf-8")
    example.main()
    assert (out / "high_resolution.jsonl").read_text("utf-8") == before
