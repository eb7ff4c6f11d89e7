"""Tensor parallelism: each process has some of a module's heads, and of the attention in its slot what belongs to them.

transformers shards a module's weights by a plan. Weights of a slot that go by head (``Attention.head_weights``) become
DTensors too, sharded along their heads: transformers reads each process's part of a checkpoint, and saves them whole.
Each process has all of a slot's other weights, and their gradients are summed. Where a plan gathers queries and keys,
each process has all heads and the slot stays as it is.
"""

import contextlib
import fnmatch
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

from attn_plugins.core.attention import Attention
from attn_plugins.hf.names import slot_of
from attn_plugins.hf.split import SplitAttention

MESH = "_attn_plugins_tp_mesh"
"""Attribute of an attention that serves some of the heads of its module: the processes that share them."""

HELD = "_attn_plugins_held"
"""Attribute of one during a call: its weights as they are, in whose places their local parts are."""

ALL = "_attn_plugins_all_heads"
"""Attribute of one: sizes of all the heads that it was built for."""


def apply(original: Any, model: nn.Module, mesh: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
    """In place of transformers' apply_tensor_parallelism: slots are shared as the heads of their modules are.

    Raises:
        ValueError: an attention cannot be shared.
    """
    model = original(model, mesh, *args, **kwargs)
    for path, module in model.named_modules():
        if (slot := slot_of(module)) is not None:
            share(model, path, module, slot, mesh)
    return model


def share(model: Any, path: str, module: nn.Module, slot: Attention, mesh: DeviceMesh | None = None) -> None:
    """Leave to an attention the heads that this process has of its module; nothing where it has all.

    Args:
        mesh: the processes that share them; by default those of the model.

    Raises:
        ValueError: the attention cannot be shared, or not by so many; names what can be done.
    """
    if (getattr(model, "_tp_size", None) or 1) == 1:
        if slot.needs_all_heads and any(_sharded(weight) for weight in module.parameters()):
            raise _refusal(path, slot, "has to know which these are, as only transformers' own tp_plan tells")
        return
    if hasattr(slot, MESH) or not _split(model, path, module):
        return
    if mesh is None:
        mesh = model._device_mesh["tp"] if model._device_mesh.ndim > 1 else model._device_mesh
    assert mesh is not None
    _check(path, slot, mesh.size())
    local = slot.heads and slot.heads.share(mesh.get_local_rank(), mesh.size())
    for shared in (slot, *(slot.parts if isinstance(slot, SplitAttention) else ())):
        setattr(shared, MESH, mesh)
        setattr(shared, ALL, shared.heads)
    if isinstance(slot, SplitAttention):
        slot.share(mesh.get_local_rank(), mesh.size())
    if not any(x.is_meta for x in _tensors(slot)):
        _send(slot, mesh)
    for name, owner, key, weight in _weights(slot):
        if _by_head(slot, name):
            part = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
            owner._parameters[key] = nn.Parameter(part, requires_grad=weight.requires_grad)
    slot.heads = local
    if _weights(slot) or slot.wants_hidden:
        slot.register_forward_pre_hook(_enter, with_kwargs=True)
        slot.register_forward_hook(_leave, always_call=True)


def _check(path: str, slot: Attention, processes: int) -> None:
    """Refuse what cannot be shared by so many processes."""
    if slot.heads is not None:
        heads, groups = slot.heads.num_heads, slot.heads.num_key_value_heads
        if heads % processes or groups % processes:
            allowed = [str(n) for n in range(1, groups + 1) if groups % n == 0 and heads % n == 0]
            raise ValueError(
                f"{path} has {heads} query heads and {groups} key/value heads, which {processes} processes cannot "
                f"share under tensor parallelism; allowed numbers of processes: {', '.join(allowed)}"
            )
        if (heads // processes) % slot.heads_multiple_of:
            raise ValueError(
                f"attention {slot.name!r} needs a number of query heads that is a multiple of "
                f"{slot.heads_multiple_of} in each process, got {heads} of {path} shared by {processes} processes"
            )
    if isinstance(slot, SplitAttention):
        part: Any
        for part in slot.parts:
            if part.needs_all_heads or part.heads_multiple_of > 1:
                why = f"gives {part.name!r} heads by number (kv_heads, heads), of which it needs all in one process"
                raise _refusal(path, slot, why)
    elif slot.needs_all_heads and slot.head_weights is None:
        why = "has weights" if slot.heads_alike else "tells its heads apart"
        raise _refusal(path, slot, f"{why} and does not declare which weights go by head (head_weights)")


def _refusal(path: str, slot: Attention, why: str) -> ValueError:
    return ValueError(
        f"{path} is under tensor parallelism, which gives each process some of its heads, and attention "
        f"{slot.name!r} {why}; choose another attention, or load without tp_plan (FSDP shards weights too)"
    )


def _split(model: Any, path: str, module: nn.Module) -> bool:
    """Whether each process has some of a module's heads: a layer in it takes its part of what attention returns."""
    plan = model._tp_plan or {}
    names = (replace_layer_number_by_wildcard(name) for name, _ in module.named_modules(prefix=path))
    styles = (ALL_PARALLEL_STYLES.get(plan[name]) for name in names if name in plan)
    return any(getattr(style, "input_layouts", None) == Shard(-1) for style in styles)


def _sharded(weight: Any) -> bool:
    """Whether a weight is a DTensor of which the processes of a mesh for tensor parallelism have a part each."""
    if (mesh := getattr(weight, "device_mesh", None)) is None:
        return False
    names = mesh.mesh_dim_names or ("",) * len(weight.placements)
    return any(name == "tp" and where.is_shard() for name, where in zip(names, weight.placements, strict=True))


def _weights(slot: Attention) -> list[tuple[str, nn.Module, str, Any]]:
    """(name, module that has it, its name there, weight) of each of a slot's weights."""
    return [
        (f"{prefix}.{key}".lstrip("."), owner, key, weight)
        for prefix, owner in slot.named_modules()
        for key, weight in owner._parameters.items()
        if weight is not None
    ]


def _by_head(slot: Attention, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in slot.head_weights or ())


def _tensors(slot: Attention) -> list[torch.Tensor]:
    return [*slot.parameters(), *slot.buffers()]


def _send(slot: Attention, mesh: DeviceMesh) -> None:
    """Make a slot's tensors those of the first process, as draws may differ."""
    group = mesh.get_group()
    for tensor in _tensors(slot):
        dist.broadcast(tensor.detach(), src=dist.get_global_rank(group, 0), group=group)


def _enter(slot: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook: the attention computes with its heads' part of each weight."""
    mesh, held = getattr(slot, MESH), _weights(slot)
    for _, owner, key, weight in held:
        local: Any = weight.to_local() if isinstance(weight, DTensor) else _summed(weight, mesh)
        owner._parameters[key] = local
    setattr(slot, HELD, held)
    if kwargs.get("hidden") is not None:
        kwargs = {**kwargs, "hidden": _summed(kwargs["hidden"], mesh)}
    return args, kwargs


def _leave(slot: Attention, args: tuple[Any, ...], output: Any) -> None:
    for _, owner, key, weight in vars(slot).pop(HELD, ()):
        owner._parameters[key] = weight


def _summed(whole: Any, mesh: DeviceMesh) -> Any:
    """A tensor of which each process has all, whose gradient is the sum of what processes compute with it."""
    if not torch.is_grad_enabled() or not whole.requires_grad:
        return whole
    return DTensor.from_local(whole, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


@contextlib.contextmanager
def whole(slot: Attention) -> Iterator[None]:
    """For as long, an attention has weights of all heads of its module; of what they are then it keeps its part."""
    mesh, local = getattr(slot, MESH, None), slot.heads
    if mesh is None:
        yield
        return
    held = [one for one in _weights(slot) if isinstance(one[3], DTensor)]
    for _, owner, key, weight in held:
        empty = torch.empty(weight.shape, dtype=weight.dtype, device=weight.to_local().device)
        owner._parameters[key] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    slot.heads = getattr(slot, ALL)
    try:
        yield
        _send(slot, mesh)
        with torch.no_grad():
            for _, owner, key, weight in held:
                made: Any = owner._parameters[key]
                weight.to_local().copy_(DtensorShardOperation(weight).shard_tensor(made))
    finally:
        slot.heads = local
        for _, owner, key, weight in held:
            owner._parameters[key] = weight
