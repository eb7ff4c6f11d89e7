"""What a model is inspected on, from files of images and sound, and the pictures that are drawn over these."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attn_plugins.data.pictures import image_processor, pixels, rgb
from attn_plugins.data.sound import waveform
from attn_plugins.hf.swap import unwrap
from attn_plugins.inspection.alignment import alignment, alignment_of
from attn_plugins.inspection.inspect import LayerWeights
from attn_plugins.inspection.overlays import ACROSS, Seen, caption, overlay, seen
from attn_plugins.inspection.sounds import Heard, over_time
from attn_plugins.inspection.subject import Subject, written_by


def of_image(model: nn.Module, processing: Any, path: str, *, generate: int) -> tuple[Subject, Seen]:
    """An image, and where it is written of, up to ``generate`` tokens of that.

    Raises:
        ValueError: it does not open, or the model does not read images alone.
    """
    inner: Any = unwrap(model)
    if inner.main_input_name != "pixel_values" or getattr(processing, "image_token", None) is not None:
        raise ValueError(
            f"{type(inner).__name__} does not read an image alone; allowed: encoders of images, and encoder-decoders "
            "that write of them"
        )
    pixel_values = pixels(processing, [rgb({"path": path, "bytes": None})]).to(inner.device, inner.dtype)
    image = seen(inner, image_processor(processing), pixel_values)
    return _read(inner, processing, {"pixel_values": pixel_values}, generate, image.tokens), image


def of_audio(model: nn.Module, processing: Any, path: str, *, generate: int) -> tuple[Subject, Heard]:
    """A recording, and where it is written down, up to ``generate`` tokens of that.

    Raises:
        ValueError: it does not open, or the model does not read sound.
    """
    inner: Any = unwrap(model)
    extractor = getattr(processing, "feature_extractor", processing)
    name = inner.main_input_name
    if name not in ("input_features", "input_values") or not hasattr(extractor, "sampling_rate"):
        raise ValueError(f"{type(inner).__name__} reads {name}, which is no sound; allowed: models of speech")
    rate = extractor.sampling_rate
    samples = waveform({"path": path, "bytes": None}, rate)
    features = extractor(samples, sampling_rate=rate, return_tensors="pt")[name].to(inner.device, inner.dtype)
    if name == "input_values" and features.ndim > 2:
        raise ValueError(
            f"{type(inner).__name__} cuts a spectrogram into patches, which have no time of their own; allowed: models "
            "that hear frame by frame, as Whisper and wav2vec 2.0"
        )
    read = getattr(extractor, "n_samples", len(samples))
    if len(samples) > read:
        raise ValueError(f"{path!r} lasts {len(samples) / rate:.1f} s; the model hears {read / rate:g} s at once")
    sound = Heard(samples_T=torch.from_numpy(samples), rate=rate, seconds=read / rate)
    return _read(inner, processing, {name: features}, generate, sound.tokens(_frames(inner, features))), sound


def pictures(
    layers: Sequence[LayerWeights], subject: Subject, medium: Seen | Heard | None, title: str, *, most: int
) -> dict[str, Any]:
    """Figures by the names of their files: what is written, and what an encoder of a medium looks at.

    Args:
        medium: what was read, None for a text.
        most: queries of an image that get a figure.
    """
    found: dict[str, Any] = {}
    means = f"{title}, mean over layers and heads"
    cross = [one for one in layers if one.role == "cross"]
    encoder = [
        one for one in layers if one.role == "encoder" and one.weights_BhqK.shape[-1] == len(subject.keys_of("encoder"))
    ]
    if cross:
        written = [subject.written[query] for query in cross[0].queries]
        if isinstance(medium, Seen):
            found["caption.png"] = caption(_sides(cross), medium, written, means)
        elif isinstance(medium, Heard):
            found["heard.png"] = over_time(_sides(cross), medium, written, means)
        else:
            found["alignment.png"] = alignment(cross, subject.written, subject.keys_of("cross"), title)
    if encoder and isinstance(medium, Seen):
        some = spread(encoder, ACROSS)
        columns = [f"layer {one.layer}" for one in some]
        for query in some[0].queries[:most]:
            place = some[0].queries.index(query)
            sides = [_sides([one]) for one in some]
            maps = {name: torch.stack([side[name][place] for side in sides]) for name in sides[0]}
            found[f"overlay_{query}.png"] = overlay(columns, maps, medium, query, f"{title}, mean over heads")
    if encoder and isinstance(medium, Heard):
        times = [subject.tokens["encoder"][query] for query in encoder[0].queries]
        found["sound.png"] = over_time(_sides(encoder), medium, times, means)
    return found


def spread(layers: Sequence[LayerWeights], most: int) -> list[LayerWeights]:
    """As many of them, evenly, from the first to the last."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(place * (len(layers) - 1) / (most - 1))] for place in range(most)]


def _sides(layers: Sequence[LayerWeights]) -> dict[str, torch.Tensor]:
    return {"swapped": alignment_of(layers), "the model's own": alignment_of(layers, own=True)}


def _read(model: Any, processing: Any, inputs: dict[str, Any], generate: int, tokens: list[str]) -> Subject:
    if getattr(model.config, "is_encoder_decoder", False):
        tokenizer = getattr(processing, "tokenizer", processing)
        return written_by(model, tokenizer, inputs, generate, encoder=tokens)
    if generate:
        raise ValueError(f"generate={generate}, and {type(model).__name__} writes nothing; allowed: 0")
    return Subject(inputs=inputs, tokens={"encoder": tokens})


def _frames(model: Any, features: torch.Tensor) -> int:
    """How many tokens the encoder makes of them."""
    encoder = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model.base_model
    with torch.no_grad():
        return encoder(features).last_hidden_state.shape[1]
