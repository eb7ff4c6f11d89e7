"""The frozen model around slots whose weights learn: what of it runs, on what, and how it is left as it was."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils.generic import find_labels

from attn_plugins.core.attention import Attention
from attn_plugins.hf.names import slot_of
from attn_plugins.hf.split import parts_of


def slots_of(model: nn.Module) -> dict[str, Attention]:
    """The attentions in a model's slots, by the path of the module that each serves; a shared module counts once."""
    found = {path: slot_of(module) for path, module in model.named_modules()}
    return {path: slot for path, slot in found.items() if slot is not None}


def heads_that_learn(slot: Attention, number: int) -> list[int]:
    """Which of a module's query heads are served by an attention that has weights."""
    found: list[int] = []
    for part in parts_of(slot):
        if part.attention is None or next(part.attention.parameters(), None) is None:
            continue
        if part.kv_heads is None:
            return list(range(number))
        size = number // sum(len(one.kv_heads or ()) for one in parts_of(slot))
        found += [group * size + head for group in part.kv_heads for head in range(size)]
    return sorted(found)


@contextlib.contextmanager
def learning(model: nn.Module, slots: Mapping[str, Attention]) -> Iterator[None]:
    """While it lasts the weights of these slots train, in float32 at least, and nothing else does.

    The model runs as in evaluation: without dropout, and without checkpoints of activations, which would call a slot
    twice. All is put back at the end, also after an error.
    """
    required = [(weight, weight.requires_grad) for weight in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    held = [x for slot in slots.values() for x in chain(slot.parameters(), slot.buffers())]
    low = [(x, x.dtype) for x in held if x.dtype in (torch.bfloat16, torch.float16)]
    try:
        model.requires_grad_(False).eval()
        for slot in slots.values():
            slot.requires_grad_(True)
        for x, _ in low:
            x.data = x.data.float()
        yield
    finally:
        for slot in slots.values():
            slot.zero_grad()
        for x, dtype in low:
            x.data = x.data.to(dtype)
        for weight, wanted in required:
            weight.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode


def run_body(
    model: Any, slots: Mapping[str, Attention], batch: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Run as much of the model as calls all of its slots, without gradients and without a cache.

    That is the model without its head, where it has all the slots and takes all that the batch holds; labels are left
    out. An encoder-decoder model that is given labels alone gets its decoder's inputs from them.

    Args:
        dtype: of autocast; None for no autocast.
    """
    part, given = what_runs(model, slots, batch)
    place = next((x.device for x in model.parameters() if not x.is_meta), torch.device("cpu"))
    low = model.dtype if model.dtype in (torch.bfloat16, torch.float16) else None
    given = {name: _placed(value, place, low) for name, value in given.items()}
    auto = contextlib.nullcontext() if dtype is None else torch.autocast(place.type, dtype=dtype)
    with torch.no_grad(), auto, torch.compiler.set_stance("force_eager"):
        part(**given)


def what_runs(model: Any, slots: Mapping[str, Attention], batch: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """(The model or its part without a head, keyword arguments for it) for a batch."""
    labels = {"labels", *find_labels(type(model))}
    given = {name: value for name, value in batch.items() if name not in labels}
    decoder = [name for name in given if name.startswith("decoder_") and not name.endswith("mask")]
    if getattr(model.config, "is_encoder_decoder", False) and "labels" in batch and not decoder:
        shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shifted is None:
            return model, {**batch, "use_cache": False}
        given["decoder_input_ids"] = shifted(labels=batch["labels"])
    # What was sharded as a whole is gathered when it is called as a whole.
    base: Any = model if isinstance(model, FSDPModule) else model.base_model
    takes = inspect.signature(base.forward).parameters
    inside = {id(module) for module in base.modules()}
    part = base if set(given) <= set(takes) and all(id(slot) in inside for slot in slots.values()) else model
    for name, value in {"use_cache": False, "logits_to_keep": 1}.items():
        if name in inspect.signature(part.forward).parameters:
            given[name] = value
    return part, given


def _placed(value: Any, place: torch.device, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(place, dtype) if dtype is not None and value.is_floating_point() else value.to(place)
