"""Write a swapped model as one of transformers' own, where its config can say the same; the rest is refused.

What a config of transformers can say of what was swapped are windows, see ``families.py``. The model of that config
takes the weights as they are, and its outputs are compared with the swapped model's before anything is kept.
"""

import contextlib
import copy
import dataclasses
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attn_plugins.core.attention import Attention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.export.card import native_card
from attn_plugins.export.families import FAMILIES, Windows, config_with, told, windows_in
from attn_plugins.hf.discovery.modules import targets
from attn_plugins.hf.names import slot_of
from attn_plugins.hf.split import parts_of
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.ops.softmax.patterns.band import Band
from attn_plugins.training.models import ANY, Loaded, load, read_adapter, resolve

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest difference of the outputs of both models, as a share of the largest output; rounding differs between kernels.

In numbers of 16 bits it catches what is plainly another model, not a window that is a little wider."""


def export_native(model: Any, out: str | Path, *, merge: bool = False) -> Path:
    """Write a model whose swapped attention is windows so that transformers loads it without this package.

    Windows are those of ``local`` without sinks and dilation, or of any attention that comes to the same. Modules with
    the model's own attention, and those with ``softmax``, stay as they are. The folder holds the weights, a config that
    says the windows (of a twin family, where the model's own has none: Llama becomes Mistral or Ministral), the
    generation config and a README.md; of a model that was named, its tokenizer too.

    Args:
        model: a model, or what names one: a folder, a name on the hub. A model in memory stays as it is.
        out: the folder to write, which may not hold anything yet.
        merge: of a folder with an adapter of PEFT, merge it into its base model first.

    Returns:
        ``out``.

    Raises:
        ValueError: transformers has no equal of what was swapped, or outputs differ; nothing is written then.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} is there already; allowed: a folder that is to be made, or an empty one")
    loaded = _load(str(model), merge) if isinstance(model, str | Path) else None
    swapped = _refuse_others(getattr(model, "_orig_mod", model) if loaded is None else loaded.model)
    windows = windows_of(swapped)
    native = native_model(swapped, windows)
    _compare(swapped, native, windows)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        native.save_pretrained(partial)
        if loaded is not None:
            loaded.processing.save_pretrained(partial)
        card = native_card(swapped, native, told(windows), None if loaded is None else resolve(str(model)))
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _load(source: str, merge: bool) -> Loaded:
    folder = resolve(source)
    adapter = read_adapter(folder) is not None
    if adapter and not merge:
        raise ValueError(f"{source!r} is an adapter of PEFT; allowed: one that is merged into its base model: --merge")
    if (Path(folder) / "modules.json").exists():
        raise ValueError(
            f"{source!r} is a SentenceTransformer, of which only the model inside would be written; export that"
        )
    loaded = load(source, kind=ANY)
    if not adapter:
        return loaded
    merged: Any = loaded.model
    return dataclasses.replace(loaded, model=merged.merge_and_unload())


def _refuse_others(model: Any) -> PreTrainedModel:
    """The model, if its weights can be those of a model of transformers.

    Raises:
        ValueError: it is none of transformers' own, or its weights are not all that it computes with.
    """
    name = type(model).__name__
    if getattr(model, "peft_config", None):
        raise ValueError(f"{name} has an adapter of PEFT; merge it first: model = model.merge_and_unload()")
    if not isinstance(model, PreTrainedModel) or getattr(transformers, name, None) is not type(model):
        raise ValueError(f"{name} is no class of transformers, which others could load; allowed: one of its own")
    config = model.config
    if config.is_encoder_decoder or model.main_input_name != "input_ids" or config.get_text_config() is not config:
        raise ValueError(f"{name} is not one model of text alone, which is all that export knows")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"the weights of this {name} are quantized; load it without, and export that")
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(f"weights of this {name} are not in memory; load it without a device_map that offloads them")
    return model


def windows_of(model: PreTrainedModel) -> Windows:
    """What each layer of a model sees, where that is a window or all that came before; [] for what has only its own.

    Raises:
        ValueError: something else is in a slot; tells what, where, and what is allowed.
    """
    windows = windows_in(model.config)
    for target in targets(model):
        for part in parts_of(slot_of(model.get_submodule(target.path))):
            window = None if part.attention is None else _window(part.attention, target.path)
            if window is None:
                continue
            if part.kv_heads is not None:
                raise ValueError(
                    f"a window of {window} at {target.path} is of key/value heads {list(part.kv_heads)} alone; "
                    "transformers knows windows of whole layers"
                )
            if model.config.model_type not in FAMILIES:
                raise ValueError(
                    f"{target.path} has a window of {window}, of which {model.config.model_type} has no equal in "
                    f"transformers that is known here; known: {', '.join(FAMILIES)}"
                )
            if target.role != "decoder":
                raise ValueError(
                    f"{target.path} is not causal, and sees keys on both sides; transformers has an equal of causal "
                    "windows alone"
                )
            if window == 1:
                raise ValueError(
                    f"{target.path} has a window of 1 key: transformers' cache of a sliding window keeps all keys "
                    "then, and what it generates is wrong; allowed: 2 and more"
                )
            windows[target.layer] = min(window, windows[target.layer] or window)
    return windows


def _window(attention: Attention, path: str) -> int | None:
    """Keys that a query sees, its own with them, or None where it sees all.

    Raises:
        ValueError: the attention is neither.
    """
    what = f"{attention.name}({attention.extra_repr()}) at {path}"
    if next(attention.parameters(), None) is not None:
        raise ValueError(f"{what} has weights of its own, for which no config of transformers has a place")
    if attention.limit == {}:
        return None
    if isinstance(attention, PatternAttention) and not attention.wants_rotary:
        patterns = attention.patterns(1, AttentionMask(1, 1, 1, causal=True, device="cpu"))
        band = patterns[0][1] if len(patterns) == 1 else None
        if isinstance(band, Band) and (band.dilation, band.num_first, band.first_see_all) == (1, 0, False):
            return band.window_size
    raise ValueError(
        f"{what} has no equal in transformers; allowed: a window (local with num_sink_tokens: 0, dilation: 1 and "
        "positions: true), softmax, and the model's own attention"
    )


def native_model(model: PreTrainedModel, windows: Windows) -> PreTrainedModel:
    """A model of transformers with these windows and the weights of ``model``, shared where they are of one dtype.

    Raises:
        ValueError: no config says these windows, or its model has other weights.
    """
    config = config_with(model.config, windows)
    cls = _class_for(model, config)
    with torch.device("meta"):
        places = cls._from_config(copy.deepcopy(config)).state_dict()
    weights = model.state_dict()
    if odd := sorted(set(weights) ^ set(places)):
        holder = cls.__name__ if odd[0] in places else type(model).__name__
        raise ValueError(
            f"{cls.__name__} says these windows ({told(windows)}), but is not the same model otherwise: of these two "
            f"only {holder} has {odd[0]}"
        )
    with _quiet():
        native = cls.from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype)
    native.to(model.device)
    if model.can_generate():
        native.generation_config = copy.deepcopy(model.generation_config)
    return native


def _class_for(model: PreTrainedModel, config: PreTrainedConfig) -> Any:
    """The class with the head of ``model`` in the family of a config."""
    if type(config) is type(model.config):
        return type(model)
    ours, theirs = (type(one).__name__.removesuffix("Config") for one in (model.config, config))
    name = type(model).__name__.replace(ours, theirs, 1)
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"{type(model).__name__} would be a {name} with its windows, which transformers has not")
    return cls


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar of a load that reads nothing."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


@torch.no_grad()
def _compare(model: PreTrainedModel, native: PreTrainedModel, windows: Windows) -> None:
    """Hold the outputs of both for a row of random tokens, longer than the windows, against each other.

    Raises:
        ValueError: they differ.
    """
    most = getattr(model.config, "max_position_embeddings", None) or 1024
    length = min(max((window or 0 for window in windows), default=0) + 64, most)
    row = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    takes = inspect.signature(model.forward).parameters
    last = {key: value for key, value in {"logits_to_keep": 16, "use_cache": False}.items() if key in takes}
    outputs = []
    for one in (model, native):
        with _in_eval(one):
            outputs.append(one(row.to(one.device), **last)[0].float())
    apart = ((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()).item()
    if not apart <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"outputs of {type(native).__name__} for {length} tokens differ from those of the swapped "
            f"{type(model).__name__} by {apart:.2g} of the largest, which is more than rounding: another model"
        )


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
