"""An object that stands for a tensor, and is made one where code touches it as a tensor.

Most models hand their mask on as it is. Some read, slice, concatenate or add to it on the way; what they do then
happens to the tensor that the object stands for.
"""

from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

C = TypeVar("C", bound=type)

BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
OTHERS = ("invert", "neg", "abs", "iter", "bool")
"""Without len: torch takes an index that has one for a sequence of indices."""
ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")


def stands_for_a_tensor(cls: C) -> C:
    """Class decorator: methods, operators and torch's functions reach the tensor that ``as_tensor()`` makes.

    The class has ``as_tensor()`` and ``as_additive(dtype)``, its form to add to scores of that dtype. What the class
    defines itself holds. Methods that would change the tensor in place are left out: they would not change the object.
    """

    def torch_function(_: type, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        dtype = None
        if getattr(func, "__name__", "") in ADDITIONS:
            others = (x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point())
            dtype = next((x.dtype for x in others), None)

        def made(x: Any) -> Any:
            if not isinstance(x, cls):
                return x
            return x.as_tensor() if dtype is None else x.as_additive(dtype)  # type: ignore[attr-defined]

        args, kwargs = tree_map(made, (args, kwargs or {}))
        return func(*args, **kwargs)

    def getattribute(self: Any, name: str) -> Any:
        if not name.startswith("_") and not name.endswith("_") and hasattr(torch.Tensor, name):
            return getattr(self.as_tensor(), name)
        raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")

    def operator(name: str) -> Any:
        def operate(self: Any, *args: Any) -> Any:
            return torch_function(cls, getattr(torch.Tensor, name), (cls,), (self, *args))

        operate.__name__ = name
        return operate

    names = [*BINARY, *COMPARISONS, *OTHERS, *(f"r{name}" for name in BINARY)]
    members = {f"__{name}__": operator(f"__{name}__") for name in names if hasattr(torch.Tensor, f"__{name}__")}
    members |= {"__torch_function__": classmethod(torch_function), "__getattr__": getattribute}
    members["__hash__"] = object.__hash__  # as a tensor's: with __eq__ elementwise, identity is what tells them apart
    for name, member in members.items():
        if name == "__hash__" or name not in vars(cls):
            setattr(cls, name, member)
    return cls


def takes_all(index: Any, shape: torch.Size) -> bool:
    """Whether an index, such as ``[..., :K]``, keeps every element and dimension of a tensor of this shape."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(item is ... or isinstance(item, slice) for item in index) or index.count(...) > 1:
        return False
    missing = len(shape) - (len(index) - index.count(...))
    if missing < 0:
        return False
    at = index.index(...) if ... in index else len(index)
    full = (*index[:at], *[slice(None)] * missing, *index[at + (... in index) :])
    return all(
        item.step in (None, 1) and item.start in (None, 0) and (item.stop is None or item.stop >= size)
        for item, size in zip(full, shape, strict=True)
    )
