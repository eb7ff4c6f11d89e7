"""The script that people copy: it trains a swapped classifier, and what it saved is one."""

import runpy
import sys
from pathlib import Path

import pictured
import pytest
import transformers as tf
from PIL import Image
from transformers.utils.import_utils import is_torchvision_available

from attn_plugins import describe_attention

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parents[2] / "examples" / "training" / "run_image_classification.py"


def test_it_trains_what_the_flag_says(tmp_path, monkeypatch, capsys):
    if type(tf.AutoImageProcessor) is not type and not is_torchvision_available():
        pytest.skip("this transformers has AutoImageProcessor with torchvision alone")
    for name, colour in pictured.COLOURS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(14):
            shade = tuple(value + number for value in colour)
            Image.new("RGB", (16, 16), shade).save(tmp_path / "data" / name / f"{number}.png")
    model, out = pictured.vit(tmp_path / "vit"), tmp_path / "out"
    given = ["--model", model, "--data", str(tmp_path / "data"), "--output-dir", str(out), "--steps", "30"]
    given += ["--batch-size", "8", "--learning-rate", "5e-3", "--attention", "neighborhood_2d"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *given, "--option", "kernel_size=3"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "accuracy 1.0000 of 5 pictures, saved in" in capsys.readouterr().out
    saved = tf.AutoModelForImageClassification.from_pretrained(out)
    assert [row.plugin for row in describe_attention(saved)] == ["neighborhood_2d"] * 2
    assert saved.config.id2label == {0: "blue", 1: "green", 2: "red"}
