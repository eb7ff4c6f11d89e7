"""examples/transfer/encoder_starts.py on tiny encoders: figures told beforehand, and what is kept of a run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

EXAMPLE = Path(__file__).parents[2] / "examples" / "transfer" / "encoder_starts.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("encoder_starts_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bert(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "of", "a", "is", "and", "to", "in"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tf.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(vocab_size=len(words), initializer_range=0.5, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    return tmp_path / "bert"


@pytest.fixture
def vit(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    tf.ViTModel(tf.ViTConfig(**sizes, image_size=32, patch_size=8, initializer_range=0.5)).save_pretrained(
        tmp_path / "vit"
    )
    return tmp_path / "vit"


@pytest.fixture
def pictures(tmp_path):
    image_of = pytest.importorskip("PIL.Image")
    (tmp_path / "pictures").mkdir()
    for number, size in enumerate([(40, 50), (64, 32), (20, 20)]):
        image_of.new("RGB", size, (90 * number, 40, 10)).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def test_softmax_starts_at_the_model_itself(example, bert, vit, pictures):
    text, vision = example.Text(str(bert), length=24, rows=2), example.Vision(str(vit), pictures, rows=2)
    assert example.measure(0, text, "softmax")["lowest cosine"] == pytest.approx(1, abs=1e-5)
    assert max(example.measure(0, vision, "softmax").values()) < 1e-6
    assert example.measure(0, text, {"type": "local", "window_size": 1, "num_sink_tokens": 0})["cosine"] < 0.9999
    assert text.figures()["cosine"] == pytest.approx(1, abs=1e-5), "the model is its own again"
    with pytest.raises(ValueError, match=r"has 3 pictures .*; needed: 4"):
        example.Vision(str(vit), pictures, rows=4)


def test_a_run_is_kept_and_goes_on(example, bert, vit, pictures, tmp_path, monkeypatch):
    out = tmp_path / "starts.jsonl"

    def run(*rules):
        told = [f"--text={bert}", f"--vision={vit}", f"--pictures={pictures}", "--length=24", "--rows=2"]
        monkeypatch.setattr(sys, "argv", ["", *rules, *told, f"--out={out}"])
        example.main()
        return [json.loads(line) for line in out.read_text("utf-8").splitlines()]

    first = run("one={type: local, window_size: 1}", "delta")
    assert [(r["settings"]["kind"], r["status"]) for r in first] == [
        ("text", "ok"),
        ("text", "refused"),
        ("vision", "ok"),
        ("vision", "refused"),
    ]
    assert "no 'bidirectional'" in first[1]["error"]
    assert first[2]["result"]["error of CLS"] > 0
    assert run("one={type: local, window_size: 1}") == first, "what is there is not measured again"
