"""Slots of models that accelerate's FSDP2 gives to several processes: buffers that they save, weights that are new."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_utils import is_fsdp_enabled, is_local_dist_rank_0

from attn_plugins.core.attention import Attention
from attn_plugins.hf.split import SplitAttention


def size_of(weights: Iterable[nn.Parameter]) -> int:
    """How many numbers weights hold, also those of which a process has a part: DeepSpeed leaves no shape to these."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)


def take_off_meta(model: nn.Module) -> None:
    """Give new weights a place in processes that will have all weights from the first one (cpu_ram_efficient_loading).

    transformers leaves there what a checkpoint lacks on the meta device, where all tensors have the same address. And
    by that accelerate tells which weight is which in an optimizer, so that one would be trained for all.
    """
    if not is_fsdp_enabled() or is_local_dist_rank_0():
        return
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def load_full_state_dict(
    original: Any, accelerator: Any, model: nn.Module, full_sd: dict[str, Any], **options: Any
) -> Any:
    """In place of accelerate's function, which takes every entry of a state dict for a parameter that is sharded.

    Buffers that slots save are left out of what it sees, and sent whole: each process has all of them.
    """
    held = list(_saved_buffers(model))
    if not held:
        return original(accelerator, model, full_sd, **options)
    keys = [key for key, _, _ in held]
    for _, module, name in held:
        module._non_persistent_buffers_set.add(name)
    try:
        loaded = original(accelerator, model, {k: v for k, v in full_sd.items() if k not in keys}, **options)
    finally:
        for _, module, name in held:
            module._non_persistent_buffers_set.discard(name)
    for key, module, name in held:
        like = module.get_buffer(name)
        if accelerator.is_main_process:
            whole = full_sd[key].detach().to(accelerator.device, like.dtype).contiguous()
        else:
            whole = torch.empty(like.shape, dtype=like.dtype, device=accelerator.device)
        dist.broadcast(whole, src=0)
        module._buffers[name] = whole
    return loaded


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(key in the state dict, module, name) of each buffer that a slot of the model saves."""
    # Modules put around layers (activation checkpointing, torch.compile) stand in paths, and in no state dict.
    keys = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
    for slot in model.modules():
        if isinstance(slot, Attention) and not isinstance(slot, SplitAttention):
            for module in slot.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if name not in module._non_persistent_buffers_set and buffer is not None:
                        yield keys[id(buffer)], module, name
