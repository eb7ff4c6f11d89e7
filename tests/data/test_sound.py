"""Sound: resampled to what a model hears, of one channel; what does not open is said by its row; folders."""

import io
import json

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from sounding import RATE, recordings, tone

from attn_plugins.data.columns import named_by_role
from attn_plugins.data.sound import seconds, waveform
from attn_plugins.data.sources import DataConfig, load_data


def row(samples, rate, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", **options)
    return {"path": None, "bytes": file.getvalue()}


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, RATE])
def test_a_tone_stays_that_tone_at_another_rate(rate):
    value = row(tone(440, 0.5, rate), rate, subtype="FLOAT")
    heard, expected = waveform(value, RATE), tone(440, 0.5)
    assert heard.dtype == np.float32
    assert abs(len(heard) - len(expected)) <= 1
    size = min(len(heard), len(expected))
    inside = slice(200, size - 200)  # a filter rings at the ends
    np.testing.assert_allclose(heard[:size][inside], expected[:size][inside], atol=2e-3)
    assert seconds(value) == pytest.approx(0.5, abs=1e-3)


def test_what_a_lower_rate_cannot_hold_is_not_folded_into_it():
    heard = waveform(row(tone(11000, 0.5, 44100), 44100, subtype="FLOAT"), RATE)
    assert np.abs(heard[500:-500]).max() < 0.01


def test_channels_are_averaged():
    both = np.stack([tone(440), np.zeros_like(tone(440))], 1)
    np.testing.assert_allclose(waveform(row(both, RATE, subtype="FLOAT"), RATE), tone(440) / 2, atol=1e-6)


def test_what_breaks_off_is_said():
    with pytest.raises(ValueError, match="the sound cannot be decoded"):
        waveform({"path": None, "bytes": b"RIFF"}, RATE)
    with pytest.raises(ValueError, match="it breaks off before its first sample"):
        waveform({"path": None, "bytes": row(tone(440), RATE)["bytes"][:44]}, RATE)


def test_rows_whose_sound_does_not_open_are_named(tmp_path):
    recordings(tmp_path, 3)
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "short.wav", tone(440, 0.01), RATE)

    def said(*paths):
        data = Dataset.from_dict({"clip": list(paths)})
        named_by_role(data, {"audio": "clip"}, "t", tmp_path)

    said("0.wav", str(tmp_path / "1.wav"))
    for path, message in {
        "none.wav": r"t: column 'clip' \(audio_column\): row 2 of 2, .*none.wav, is no file$",
        "text.wav": r"row 2 of 2, .*text.wav, does not open: ",
        "short.wav": r"row 2 of 2, .*short.wav, lasts 0.01 seconds; allowed: at least 0.05",
    }.items():
        with pytest.raises(ValueError, match=message):
            said("0.wav", path)
    with pytest.raises(ValueError, match="row 1 of 3 is null; and 1 more rows have no sound that opens"):
        said(None, "0.wav", "none.wav")
    with pytest.raises(ValueError, match="holds int64; allowed: sound, or the paths of its files"):
        said(1, 2)


@pytest.mark.parametrize("split", ["", "validation"])
def test_a_folder_of_sound_with_a_table(tmp_path, monkeypatch, split):
    for place in {"", split}:
        (tmp_path / "all" / place).mkdir(parents=True, exist_ok=True)
        recordings(tmp_path / "all" / place, 4, "file_name", "metadata.jsonl")
    monkeypatch.chdir(tmp_path)
    train, held_out = load_data(DataConfig(source="all", eval_fraction=0.25), ("audio", "text"))
    assert (len(train), len(held_out)) == ((4, 4) if split else (3, 1))
    place = tmp_path / "all" / split
    assert {value["path"] for value in held_out["audio"]} <= {str(place / f"{number}.wav") for number in range(4)}
    assert held_out["text"][0]
    (tmp_path / "all" / "metadata.jsonl").write_text(json.dumps({"audio": "0.wav"}) + "\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl has no column 'file_name'; it has: audio"):
        load_data(DataConfig(source=str(tmp_path / "all")), ("audio", "text"))
