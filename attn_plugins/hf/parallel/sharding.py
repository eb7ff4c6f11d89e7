"""Slots of models that several processes share: heads split by tensor parallelism, buffers under accelerate's FSDP2."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.hf.split import SplitAttention


def refuse_split_heads(model: nn.Module, path: str, module: nn.Module, slot: Attention) -> None:
    """Refuse an attention that needs all heads of a module where each process has some of them.

    Raises:
        ValueError: names the module, its attention and what can be done.
    """
    unnamed = (getattr(model, "_tp_size", None) or 1) > 1  # as transformers 5.17 makes the mesh
    if slot.needs_all_heads and any(_split(weight, unnamed) for weight in module.parameters()):
        why = "tells its heads apart" if not slot.heads_alike else "has weights a head, of which each has all"
        raise ValueError(
            f"{path} is under tensor parallelism, which gives each process some of its heads, and attention "
            f"{slot.name!r} {why}; choose an attention that has no weights and takes every head alike, such as "
            "'local', or load without tp_plan (FSDP shards weights too)"
        )


def _split(weight: Any, unnamed: bool) -> bool:
    """Whether a weight is a DTensor of which the processes of a mesh for tensor parallelism have a part each.

    Args:
        unnamed: whether a mesh whose dimensions have no names is one.
    """
    if (mesh := getattr(weight, "device_mesh", None)) is None:
        return False
    names = mesh.mesh_dim_names or ("tp" if unnamed else "",) * len(weight.placements)
    return any(name == "tp" and where.is_shard() for name, where in zip(names, weight.placements, strict=True))


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
    for path, slot in model.named_modules():
        if isinstance(slot, Attention) and not isinstance(slot, SplitAttention):
            for inner, module in slot.named_modules(prefix=path):
                for name, buffer in module.named_buffers(recurse=False):
                    if name not in module._non_persistent_buffers_set and buffer is not None:
                        yield f"{inner}.{name}", module, name
