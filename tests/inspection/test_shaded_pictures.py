"""Pictures of weights over images and sound: patches and frames lie where they are, and the command draws them."""

import json

import pictured
import pytest
import soundfile
import sounding
import torch
import transformers as tf
from conftest import tokenizer
from PIL import Image
from typer.testing import CliRunner

import attn_plugins as ap
from attn_plugins import cli
from attn_plugins.inspection import media, overlays, sounds
from attn_plugins.inspection.alignment import alignment_of
from attn_plugins.training.models import load

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}


def call(*arguments, status=0):
    ran = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})
    assert ran.exit_code == status, ran.output + str(ran.exception)
    return ran


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Wider than it is high; the right half is red."""
    path = tmp_path_factory.mktemp("picture") / "red.png"
    image = Image.new("RGB", (32, 16), "white")
    image.paste((200, 30, 30), (16, 0, 32, 16))
    image.save(path)
    return str(path)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """0.4 seconds of 1000 Hz."""
    path = tmp_path_factory.mktemp("sound") / "tone.wav"
    soundfile.write(path, sounding.tone(1000, 0.4), sounding.RATE)
    return str(path)


def processor(height, width):
    return tf.ViTImageProcessorPil(size={"height": height, "width": width})


@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        (lambda: tf.Dinov2Model(tf.Dinov2Config(**SIZES)), 1),
        (lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)), 4),
    ],
    ids=["dinov2", "registers"],
)
def test_patches_lie_where_they_were_cut(make, prefix, picture):
    """A neighbourhood in an image of 3 x 6 patches is around its patch, with [CLS] and registers left out."""
    torch.manual_seed(0)
    model = ap.swap_attention(make().eval(), "neighborhood_2d", kernel_size=3, num_prefix_tokens=prefix)
    subject, image = media.of_image(model, processor(12, 24), picture, generate=0)
    assert image.grid == (3, 6)
    assert image.prefix_tokens == prefix
    assert image.image_HWC.shape == (12, 24, 3)
    torch.testing.assert_close(image.image_HWC[6, 20], torch.tensor([200, 30, 30]) / 255, atol=0.01, rtol=0)
    query = image.tokens.index(" 1,4")
    assert query == prefix + 10
    (layer,) = ap.inspect_attention(model, subject.inputs, queries=query, layers=1).layers
    share_K = alignment_of([layer])[0]
    seen = image.patches(share_K) > 0
    want = torch.zeros(3, 6, dtype=torch.bool)
    want[0:3, 3:6] = True
    assert torch.equal(seen, want)
    figure = overlays.overlay(["layer 1"], {"swapped": share_K[None]}, image, query, "title")
    panel = next(axis for axis in figure.axes if axis.get_title().startswith("layer 1, swapped"))
    drawn = torch.tensor(panel.images[1].get_array())
    torch.testing.assert_close(drawn, image.patches(share_K) * len(share_K))
    assert panel.images[1].get_extent() == [0, 24, 12, 0]
    assert f"{float(share_K[:prefix].sum()):.0%} on first tokens" in panel.get_title()
    frames = [patch.get_bbox().bounds for patch in panel.patches]
    assert frames == [(16.0, 4.0, 4.0, 4.0)]
    with pytest.raises(ValueError, match=rf"17 keys; allowed: {prefix} first tokens and 3 x 6 patches"):
        image.patches(torch.ones(17))


def test_each_written_token_has_a_panel_with_its_weights():
    image = overlays.Seen(image_HWC=torch.rand(8, 8, 3), grid=(2, 2), prefix_tokens=1)
    sides = {name: torch.rand(8, 5) for name in ("dense", "window")}
    figure = overlays.caption(sides, image, [f"w{n}" for n in range(8)], "title")
    panels = [axis for axis in figure.axes if len(axis.images) == 2]
    quoted = [f"\N{LEFT DOUBLE QUOTATION MARK}w{n}\N{RIGHT DOUBLE QUOTATION MARK}" for n in range(8)]
    assert [axis.get_title() for axis in panels] == [*quoted[:6], *[""] * 6, *quoted[6:], *[""] * 2]
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["window"] * 2
    for panel, name, token in ((panels[13], "dense", 7), (panels[15], "window", 7), (panels[6], "window", 0)):
        drawn = torch.tensor(panel.images[1].get_array())
        torch.testing.assert_close(drawn, sides[name][token, 1:].view(2, 2) * 5)


def test_frames_have_their_times_and_a_tone_its_pitch():
    sound = sounds.Heard(samples_T=torch.from_numpy(sounding.tone(1000, 0.5)), rate=sounding.RATE, seconds=2.0)
    assert sound.times(4) == [0.25, 0.75, 1.25, 1.75]
    assert sound.tokens(4) == [" 0.25s", " 0.75s", " 1.25s", " 1.75s"]
    spectrum = sound.spectrogram()
    loudest = spectrum.mean(1).argmax() / (len(spectrum) - 1) * sounding.RATE / 2
    assert abs(loudest - 1000) < 50
    side = torch.full((3, 8), 0.1)
    side[1, 1] = 0.3
    figure = sounds.over_time({"swapped": side}, sound, ["a", "b", "c"], "title")
    above, below = figure.axes[:2]
    assert above.get_title() == "swapped\n60% after the end"
    drawn = torch.tensor(above.images[0].get_array())
    assert int(drawn.flip(0).mean(1).argmax()) == int(spectrum.mean(1).argmax()), "low pitches are at the bottom"
    assert below.images[0].get_array().shape == (3, 2), "frames of the silence after the sound are left out"
    assert below.images[0].get_array()[1, 1] == pytest.approx(0.3 * 8)
    assert below.images[0].get_extent() == [0, 0.5, 2.5, -0.5]
    assert [tick.get_text() for tick in below.get_yticklabels()] == ["a", "b", "c"]


def test_what_writes_in_several_languages_is_read_with_the_one_that_it_found(tmp_path, recording):
    made = load(sounding.whisper(tmp_path), kind="any", processing="speech-to-text")
    for name, value in {"lang_to_id": {"<|en|>": 5, "<|fr|>": 6}, "no_timestamps_token_id": 19}.items():
        setattr(made.model.generation_config, name, value)
    subject, _ = media.of_audio(made.model.eval(), made.processing, recording, generate=5)
    start, language, without_times, *written = subject.inputs["decoder_input_ids"][0].tolist()
    assert (start, without_times, len(written)) == (1, 19, 4)
    assert language in (5, 6)
    assert len(subject.written) == 7


@pytest.mark.parametrize("kind", ["picture", "sound"])
def test_what_is_written_is_read_again_as_it_was_written(kind, tmp_path, picture, recording):
    """The decoder is given what it began with too, which Whisper's generate leaves out: it finds the same tokens."""
    made = load(
        (pictured.captioner if kind == "picture" else sounding.whisper)(tmp_path),
        kind="any",
        processing="image-to-text",
    )
    model = made.model.eval()
    read, path = (media.of_image, picture) if kind == "picture" else (media.of_audio, recording)
    subject, _ = read(model, made.processing, path, generate=5)
    given = subject.inputs["decoder_input_ids"][0]
    assert int(given[0]) == 1
    assert len(subject.written) == len(given) == len(subject.tokens["decoder"])
    with torch.no_grad():
        logits = model(**subject.inputs).logits[0]
    if kind == "sound":
        logits[:, [0, 1, 3]] = -torch.inf
        logits[0, 2] = -torch.inf
    assert [made.tokenizer.decode([one]) for one in logits.argmax(-1)] == subject.written


def test_the_command_draws_over_a_picture(picture, tmp_path):
    attention = "{type: neighborhood_2d, kernel_size: 3, roles: [encoder]}"
    folder = pictured.captioner(tmp_path / "captioner")
    roles = ["--role", "encoder", "--role", "cross", "--layer", 0]
    ran = call("-m", folder, "-a", attention, "--image", picture, "--generate", 3, *roles, "-o", tmp_path / "out")
    assert "caption.png" in ran.output
    told = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert told["tokens"]["encoder"][:3] == [" [CLS]", " 0,0", " 0,1"]
    assert len(told["tokens"]["encoder"]) == 17
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        *("caption.png", "overlay_0.png", "overview_encoder.png", "overview_cross.png")
    }
    call("-m", folder, "--image", picture, "--query", "1,2", "--role", "encoder", "-o", tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").glob("*.png")} == {"overlay_7.png", "overview_encoder.png"}


def test_the_command_draws_under_a_spectrogram(recording, tmp_path):
    folder = sounding.whisper(tmp_path / "whisper")
    call(
        "-m",
        folder,
        "-a",
        "{type: local, window_size: 8}",
        "--audio",
        recording,
        "--generate",
        8,
        "--role",
        "encoder",
        "--role",
        "cross",
        "-o",
        tmp_path / "out",
    )
    assert {"heard.png", "sound.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    told = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert told["tokens"]["encoder"][:2] == [" 0.01s", " 0.03s"]
    ctc = sounding.ctc(tmp_path / "ctc")
    call("-m", ctc, "--audio", recording, "--layer", 0, "-o", tmp_path / "letters")
    assert {path.name for path in (tmp_path / "letters").glob("*.png")} == {"sound.png", "overview_encoder.png"}


def test_what_cannot_be_read_is_one_line(picture, recording, tmp_path):
    out = ["-o", tmp_path / "out"]
    vit, whisper = pictured.vit(tmp_path / "vit"), sounding.whisper(tmp_path / "whisper")

    def wrong(*arguments):
        ran = call(*arguments, *out, status=2)
        assert not (tmp_path / "out").exists()
        return ran.stderr

    assert "got image, audio to inspect" in wrong("-m", vit, "--image", picture, "--audio", recording)
    assert "image='no.png' is no file" in wrong("-m", vit, "--image", "no.png")
    assert "cannot be decoded" in wrong("-m", vit, "--image", recording)
    assert "cannot be decoded" in wrong("-m", whisper, "--audio", picture)
    assert "reads pixel_values, which is no sound" in wrong("-m", vit, "--audio", recording)
    assert "does not read an image alone" in wrong("-m", whisper, "--image", picture)
    assert "generate=3, and ViTModel writes nothing" in wrong("-m", vit, "--image", picture, "--generate", 3)
    long = tmp_path / "long.wav"
    soundfile.write(long, sounding.tone(300, 1.5), sounding.RATE)
    assert "lasts 1.5 s; the model hears 1 s at once" in wrong("-m", whisper, "--audio", long)
    soundfile.write(tmp_path / "short.wav", sounding.tone(300, 0.002), sounding.RATE)
    spectrogram = tmp_path / "spectrogram"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    patches = {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    tf.ASTModel(tf.ASTConfig(**sizes, **patches)).save_pretrained(spectrogram)
    tf.ASTFeatureExtractor(num_mel_bins=16, max_length=32).save_pretrained(spectrogram)
    assert "ASTModel cuts a spectrogram into patches" in wrong("-m", spectrogram, "--audio", recording)
    swin = tmp_path / "swin"
    parts = {"embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2, "image_size": 16, "patch_size": 4}
    tf.SwinModel(tf.SwinConfig(**parts)).save_pretrained(swin)
    processor(16, 16).save_pretrained(swin)
    assert "attends within 4 parts of the input" in wrong("-m", swin, "--image", picture, "--query", 0)
    decoder = tmp_path / "decoder"
    tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(decoder)
    tokenizer().save_pretrained(decoder)
    assert "does not read an image alone" in wrong("-m", decoder, "--image", picture)
