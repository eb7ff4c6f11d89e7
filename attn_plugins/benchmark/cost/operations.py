"""What a device is asked to do: operations that are launched, bytes that they touch, arithmetic of products, syncs.

Counted on CPU tensors, or on fake ones, which have shapes and no values: the form for other devices is asked for the
same there as on a GPU. The inside of the package's own operators is looked at, not the operators.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

TORCH = str(Path(torch.__file__).parent)
PACKAGE = Path(__file__).parent.parent

STARTS_NOTHING = {
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "_local_scalar_dense"),
}
"""Beside what returns a view by its schema. A value that is read is counted as a sync."""

READS_A_VALUE = {"_local_scalar_dense", "equal", "is_nonzero", "_linalg_check_errors"}
SIZE_BY_VALUES = {"nonzero", "masked_select", "bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor}

GATHERS = {"index", "gather", "index_select", "embedding", "_unsafe_index"}
"""They read of their first tensor no more than they write."""


@dataclass(frozen=True)
class Launch:
    """One operation that was started."""

    name: str
    flops: int
    """Of a product: two for each multiplication with its addition; 0 for everything else."""
    bytes: int
    """Of what it reads and writes, each tensor once."""
    dtype: torch.dtype | None
    """Of what a product multiplies."""


@dataclass
class Operations:
    """What was asked of a device, in order."""

    launches: list[Launch] = field(default_factory=list)
    syncs: Counter[str] = field(default_factory=Counter)
    """"operation at file:line" -> how often the host waited there for the device, or would on one with its own
    memory."""

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def names(self) -> Counter[str]:
        """How often each operation was launched."""
        return Counter(launch.name for launch in self.launches)


@contextmanager
def counted() -> Iterator[Operations]:
    """Count what is asked for inside, backward passes included. Views and allocations start nothing."""
    found = Operations()
    with _Transfers(found), _Dispatched(found):
        yield found


class _Dispatched(TorchDispatchMode):
    def __init__(self, found: Operations):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space not in ("aten", "prims") and func._schema.name in OPDEFS:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if _waits(func, name, args, kwargs):
            self.found.syncs[f"{name} at {_where()}"] += 1
        out = func(*args, **kwargs)
        if not (func.is_view or name in STARTS_NOTHING or space == "prim"):
            self.found.launches.append(_launch(func, name, args, kwargs, out))
        return out


class _Transfers(TorchFunctionMode):
    """What copies between host and device, which on CPU tensors is no operation."""

    def __init__(self, found: Operations):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TO_HOST or func in FROM_HOST:
            self.found.syncs[f"{func.__name__} at {_where()}"] += 1
        return func(*args, **(kwargs or {}))


def _waits(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    if name in READS_A_VALUE or name in SIZE_BY_VALUES:
        return True
    if name in BY_INDEX:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    by_tensor = name == "repeat_interleave" and "Tensor" in func._overloadname
    return by_tensor and kwargs.get("output_size") is None


def _launch(func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> Launch:
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    read, written = [_bytes(x) for x in given], sum(map(_bytes, made))
    if name in GATHERS and read:
        read[0] = min(read[0], written)
    flops = 0
    if "scaled_dot_product" in name:
        flops = _attention_flops(func, args, kwargs)
    elif func.overloadpacket in flop_registry:
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    elif name == "linalg_solve_triangular":
        flops = given[1].numel() * given[0].shape[-1]
    return Launch(name, flops, sum(read) + written, given[0].dtype if flops else None)


def _attention_flops(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Of a fused attention: two products forward, five backward, over half of the pairs where it is causal."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    q, k, v = (given[name] for name in ("query", "key", "value"))
    products = 5 * max(q.shape[-1], v.shape[-1]) if "backward" in func._schema.name else q.shape[-1] + v.shape[-1]
    return 2 * q[..., 0].numel() * k.shape[-2] * products // (2 if given.get("is_causal") else 1)


def _bytes(x: torch.Tensor) -> int:
    """Of its elements in memory: what was expanded is there once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * x.element_size()


def _where() -> str:
    """The last line of code that is neither torch's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not frame.filename.startswith((TORCH, "<")):
            file = Path(frame.filename)
            return f"{file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file.name}:{frame.lineno}"
    return "torch"
