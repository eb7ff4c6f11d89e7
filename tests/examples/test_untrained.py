"""examples/untrained.py on tiny models of each kind: figures that can be told beforehand, and what is kept of a run."""

import importlib.util
import json
import sys
import wave
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import WORDS, tokenizer, write_rows

EXAMPLE = Path(__file__).parents[2] / "examples" / "untrained.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("untrained_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measured(example, tmp_path, capsys, monkeypatch, one_thread):
    """Runs the script; label -> record, and what it printed."""

    def run(*arguments, attentions, rounds=1):
        chosen = [part for label, rule in attentions.items() for part in ("--attention", f"{label}={rule}")]
        out = tmp_path / "out"
        monkeypatch.setattr(
            sys, "argv", ["", *map(str, arguments), *chosen, f"--rounds={rounds}", "--output-dir", str(out)]
        )
        capsys.readouterr()
        example.main()
        lines = [json.loads(line) for line in (out / "untrained.jsonl").read_text("utf-8").splitlines()]
        assert (out / "untrained.md").read_text("utf-8") in capsys.readouterr().out
        return {line["attention"]: line for line in lines}, lines

    return run


@pytest.fixture
def texts(tmp_path):
    """Six texts of 60 words and one of 10."""
    rows = [{"text": " ".join(WORDS[(i * step) % len(WORDS)] for i in range(60))} for step in (1, 3, 5, 7, 9, 11)]
    return write_rows(tmp_path / "texts.jsonl", [{"text": "red cat"}, *rows])


def test_a_decoder(measured, llama, texts):
    attentions = {
        "softmax": "{type: softmax}",
        "window 5": "{type: local, window_size: 5, num_sink_tokens: 0}",
        "one layer": "{type: local, window_size: 5, num_sink_tokens: 0, layers: 0}",
        "linear": "{type: linear}",
        "half linear": "{type: linear, layers: 0}",
        "nystrom": "{type: nystrom}",
    }
    arguments = ["--decoder", llama, "--texts", texts, "--length", 40, "--documents", 2]
    first, _ = measured(*arguments, attentions=attentions, rounds=0)
    assert [line["speed"] for line in first.values() if line["status"] == "ok"] == [None] * 5
    found, lines = measured(*arguments, attentions=attentions)
    assert all(
        found[label][what] == first[label][what] for label in ("softmax", "linear") for what in ("own", "figures")
    )
    ids = [tokenizer()(row["text"])["input_ids"][:40] for row in map(json.loads, Path(texts).read_text().splitlines())]
    model = tf.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        rows = torch.tensor([row for row in ids if len(row) == 40][:2])
        want = float(model(input_ids=rows, labels=rows).loss.exp())
    assert found["softmax"]["own"]["perplexity"] == pytest.approx(want, rel=1e-5)
    assert found["softmax"]["figures"]["perplexity"] == pytest.approx(want, rel=1e-5)
    assert found["window 5"]["figures"]["perplexity"] != pytest.approx(want, rel=1e-5)
    assert found["softmax"]["pairs"] == 1
    seen = sum(min(i + 1, 5) for i in range(40)) / (40 * 41 / 2)
    assert found["window 5"]["pairs"] == pytest.approx(seen)
    assert found["one layer"]["pairs"] == pytest.approx((seen + 1) / 2)
    assert found["linear"]["pairs"] is None
    assert found["half linear"]["pairs"] == 0.5
    assert found["window 5"]["speed"]["lowest"] > 0
    assert found["nystrom"]["status"] == "refused"
    assert "no 'causal'" in found["nystrom"]["error"]
    again, more = measured(*arguments, attentions=attentions)
    assert [line["attention"] for line in more[len(lines) :]] == ["nystrom"], "what is there is not measured again"
    assert again["window 5"] == found["window 5"]


def test_what_cannot_be_measured_is_an_error(measured, llama, texts, capsys):
    with pytest.raises(SystemExit):
        measured("--decoder", llama, "--texts", texts, "--length", 90, attentions={"softmax": "{type: softmax}"})
    assert "has 90 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measured("--vision", llama, attentions={"softmax": "{type: softmax}"})
    assert "--vision needs --pictures" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measured("--vision", llama, "--pictures", texts, "--scope=attention", attentions={"softmax": "{type: softmax}"})
    assert "is for models of text" in capsys.readouterr().err


def test_a_sentence_encoder(measured, bert, texts):
    attentions = {"softmax": "{type: softmax}", "window 3": "{type: local, window_size: 3, num_sink_tokens: 0}"}
    arguments = ["--sentence-encoder", bert, "--texts", texts, "--sentence-length", 24, "--paragraphs", 7]
    found, _ = measured(*arguments, "--scope=attention", attentions=attentions)
    assert found["softmax"]["speed"]["scope"] == "attention"
    assert found["softmax"]["figures"] == pytest.approx({"cosine": 1, "lowest cosine": 1, "rank correlation": 1})
    few = found["window 3"]["figures"]
    assert few["lowest cosine"] < few["cosine"] < 0.9999
    assert few["rank correlation"] < 0.9999
    assert found["window 3"]["pairs"] == pytest.approx(
        sum(abs(i - j) < 3 for i in range(24) for j in range(24)) / 24**2
    )


def test_rank_correlation_is_spearmans(example):
    a, b = torch.tensor([20.0, 30, 1, 40, 50]), torch.tensor([2.0, 1, 3, 4, 5])
    assert example.rank_correlation(a, b) == pytest.approx(1 - 6 * 8 / (5 * 24))  # ranks differ by 0, 2, 2, 0, 0
    assert example.rank_correlation(a, -a) == pytest.approx(-1)


def test_speech(measured, tmp_path):
    pytest.importorskip("jiwer")
    torch.manual_seed(0)
    sizes = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    sizes |= {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20}
    positions = {"num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 32, "init_std": 0.5}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "decoder_start_token_id": 1}
    config = tf.WhisperConfig(**sizes, **positions, **ids, suppress_tokens=[0, 1, 2, 3], begin_suppress_tokens=None)
    model = tf.WhisperForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "whisper")
    tokenizer().save_pretrained(tmp_path / "whisper")
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    extractor.save_pretrained(tmp_path / "whisper")
    samples = (torch.randn(12000, generator=torch.Generator().manual_seed(0)) * 3000).to(torch.int16)
    with wave.open(str(tmp_path / "clip.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(samples.numpy().tobytes())
    features = extractor(samples.numpy() / 2**15, sampling_rate=16000, return_tensors="pt")["input_features"]
    heard = tokenizer().decode(model.generate(features, max_new_tokens=9)[0], skip_special_tokens=True)
    said = heard.replace(" .", "").split()
    assert len(said) > 3
    clips = write_rows(tmp_path / "clips.jsonl", [{"audio": "clip.wav", "text": " ".join(["Mr.", *said[1:]])}])
    attentions = {
        "all": "{type: softmax, roles: [encoder, decoder, cross]}",
        "encoder": "{type: local, window_size: 1, num_sink_tokens: 0, roles: encoder}",
        "decoder": "{type: local, window_size: 1, num_sink_tokens: 0, roles: decoder}",
        "cross": "{type: topk, topk: 5, roles: cross}",
    }
    found, _ = measured("--speech", tmp_path / "whisper", "--clips", clips, "--new-tokens", 9, attentions=attentions)
    # One word is said otherwise than heard.
    assert found["all"]["figures"] == found["all"]["own"] == {"word error rate": 1 / len(said), "next tokens kept": 1}
    assert [found[label]["pairs"] for label in ("all", "encoder", "cross")] == pytest.approx([1, 1 / 50, 5 / 50])
    assert 0 < found["decoder"]["pairs"] < 0.5
    assert any(found[role]["figures"]["next tokens kept"] < 1 for role in ("encoder", "decoder", "cross"))


def test_vision(example, measured, tmp_path):
    image_of = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    tf.Dinov2Model(tf.Dinov2Config(**sizes, initializer_range=0.5, layerscale_value=1.0)).save_pretrained(
        tmp_path / "m"
    )
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(3):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=generator)
        image_of.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png"})
    neighbours = "{{type: neighborhood_2d, kernel_size: {0}}}"
    attentions = {"whole": neighbours.format(8), "few": neighbours.format(3)}
    arguments = ["--vision", tmp_path / "m", "--pictures", write_rows(tmp_path / "pictures.jsonl", rows)]
    found, _ = measured(*arguments, attentions=attentions)
    assert found["whole"]["figures"] == pytest.approx({"cosine of CLS": 1, "cosine of patches": 1})
    assert all(value < 0.999 for value in found["few"]["figures"].values())
    assert found["whole"]["pairs"] == 1
    assert found["few"]["pairs"] == pytest.approx((65 + 64 * (9 + 1)) / 65**2)
    assert "3 pictures at 32 px, 65 tokens" in found["few"]["what"]

    image_of.new("RGBA", (64, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    got = example._picture(tmp_path / "clear.png", 16)
    torch.testing.assert_close(got, white.view(1, 3, 1, 1).expand(1, 3, 16, 16))


def test_the_published_tables_are_what_the_results_say(example):
    folder = EXAMPLE.parent.parent / "docs" / "benchmarks" / "untrained"
    records = list(example.Results(folder / "untrained.jsonl").records.values())
    assert example.report(records) == (folder / "untrained.md").read_text("utf-8")
