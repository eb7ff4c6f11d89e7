"""Inputs of models that read text together with images, video or sound: tried until every attention module is called.

The number of placeholder tokens that stand for an image in the text is what the model itself complains about.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from corrections import MEDIA
from torch import nn
from transformers import PreTrainedConfig

from attn_plugins.hf.discovery import modules as discovery

BATCH = 2
GRID = 4
"""Rows and columns of patches of an image that is given as patches."""

TOKENS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index", "audio_token"),
    "other": (),
}
"""Medium -> names in a config of the token that stands for it; mm_token_type_ids count them from 1."""

ASKED = r"match.* features:? *(\d+)|value tensor of shape \[(\d+)|tokens from VQVAE \((\d+)"
"""In a model's complaint about the number of placeholder tokens: how many it wants."""


def attending(model: nn.Module) -> list[nn.Module]:
    return [module for _, module in discovery.attention_modules(model)]


def called(model: nn.Module, run: Callable[[], Any]) -> int:
    """How many attention modules of a model are called while ``run`` does."""
    found: set[int] = set()
    hooks = [
        module.register_forward_hook(lambda module, args, made: found.add(id(module))) for module in attending(model)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return len(found)


def with_media(
    model: nn.Module, text: dict[str, Any], source: Any, forward: Callable[..., Any], find: Callable[..., Any]
) -> dict[str, Any] | None:
    """``text`` with an image, a video and sound, each where more attention modules are called with it.

    Returns:
        None where the model takes none of what was tried.
    """
    takes = set(inspect.signature(model.forward).parameters)
    wanted = len(attending(model))
    best, most = None, -1
    with contextlib.suppress(Exception):
        most, best = called(model, lambda: forward(model, text)), text
    guesses = {"image": images, "video": videos, "audio": sounds, "other": lambda *_: ()}
    for medium, guess in guesses.items():
        own = MEDIA.get((model.config.model_type, medium))
        for given in [own(model.config, source)] if own else guess(model.config, takes, source, find):
            if most == wanted:
                return best
            token = find(model.config, *TOKENS[medium])
            whole = fitted(model, {**(best or text), **given}, token, forward)
            reached = -1 if whole is None else called(model, lambda whole=whole: forward(model, whole))
            if reached > most:
                best, most = whole, reached
                break
    return best


def fitted(
    model: nn.Module, given: dict[str, Any], token: int | None, forward: Callable[..., Any]
) -> dict[str, Any] | None:
    """``given`` with as many tokens of a medium as the model asks for, or None where it does not take it at all."""
    counts = [1]
    while counts:
        count = counts.pop(0)
        whole = given if token is None else insert(model, given, token, count)
        try:
            forward(model, whole)
            return whole
        except Exception as error:
            asked = re.search(ASKED, str(error), re.DOTALL)
            if count == 1 and asked and token is not None:
                width = model.get_input_embeddings().weight.shape[1]  # some count features, some their elements
                features = next(int(number) for number in asked.groups() if number)
                counts = [n // BATCH for n in (features, features // width) if n >= BATCH]
    return None


def insert(model: nn.Module, given: dict[str, Any], token: int, count: int) -> dict[str, Any]:
    """Texts with ``count`` more tokens of a medium in the middle, and the types of all tokens where those are asked."""
    ids, mask = given["input_ids"], given.get("attention_mask")
    there = torch.full((len(ids), count), token)
    given = {**given, "input_ids": torch.cat([ids[:, :5], there, ids[:, 5:]], dim=1)}
    if mask is not None:
        given["attention_mask"] = torch.cat([mask[:, :5], torch.ones_like(there), mask[:, 5:]], dim=1)
    return {**given, **token_types(model, given["input_ids"])}


def token_types(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    takes, types = inspect.signature(model.forward).parameters, torch.zeros_like(ids)
    for kind, names in enumerate(TOKENS.values(), start=1):
        for name in names:
            if isinstance(getattr(model.config, name, None), int):
                types[ids == getattr(model.config, name)] = kind
    given = {"mm_token_type_ids": types.int(), "token_type_ids": (types > 0).int()}
    return {name: value for name, value in given.items() if name in takes}


def images(
    config: PreTrainedConfig, takes: set[str], source: Any, find: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    name = next((n for n in ("pixel_values", "image_pixel_values", "flattened_patches") if n in takes), None)
    if name is None:
        return
    size = find(config, "image_size", "img_size", "input_size") or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = find(config, "num_channels", "in_channels", "in_chans") or 3
    patch, temporal = find(config, "patch_size") or 8, find(config, "temporal_patch_size") or 1
    patch = patch if isinstance(patch, int) else patch[-1]
    count = GRID * GRID
    for grid in {"image_grid_thw", "grid_thw"} & takes:
        for shape in (
            (channels * temporal * patch * patch,),
            (channels, patch, patch),
            (2 * channels * patch * patch,),
        ):
            yield {name: source(count * BATCH, *shape), grid: torch.tensor([[1, GRID, GRID]] * BATCH)}
    if "spatial_shapes" in takes:
        yield {
            name: source(BATCH, count, channels * patch * patch),
            "pixel_attention_mask": torch.ones(BATCH, count).long(),
            "spatial_shapes": torch.tensor([[GRID, GRID]] * BATCH),
        }
    if "image_position_ids" in takes:
        places = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="xy"), dim=-1)
        places = places.reshape(1, count, 2).expand(BATCH, -1, -1)
        yield {name: source(BATCH, count, channels * patch * patch), "image_position_ids": places}
    along = {"image_sizes": torch.tensor([[height, width]] * BATCH)} if "image_sizes" in takes else {}
    for shape in ((), (5,), (1,), (3,), (find(config, "num_frames") or 4,)):
        yield {name: source(BATCH, *shape, channels, height, width), **along}
    yield {name: source(BATCH, channels, height, width)}
    yield {name: source(BATCH, channels, 2 * height, 2 * width)}


def videos(
    config: PreTrainedConfig, takes: set[str], source: Any, find: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    if "pixel_values_videos" not in takes:
        return
    size, channels = find(config, "image_size") or 32, find(config, "num_channels", "in_channels") or 3
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    for frames in (find(config, "num_frames") or 4, 8):
        yield {"pixel_values_videos": source(BATCH, frames, channels, height, width)}


def sounds(
    config: PreTrainedConfig, takes: set[str], source: Any, find: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    name = next((n for n in ("input_features", "audio_input_features", "input_values") if n in takes), None)
    if name is None:
        return
    if name == "input_values":
        yield {name: source(BATCH, 6400)}
        yield {name: source(BATCH, 1, 6400)}
        return
    mels = find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim") or 16
    masks = {"input_features_mask", "feature_attention_mask", "audio_attention_mask"} & takes
    for frames in (40, 2 * (find(config, "max_source_positions") or 20), 160, 100):
        ones = torch.ones(BATCH, frames)
        for shape in ((BATCH, mels, frames), (BATCH, frames, mels)):
            for along in ({m: ones.long() for m in masks}, {m: ones.bool() for m in masks}, {}):
                yield {name: source(*shape), **along}
