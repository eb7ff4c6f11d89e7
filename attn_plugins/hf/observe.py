"""Have swapped modules attend by the model's own attention for a while, and see what their slots would have made of it.

What trains new weights on the model's own outputs, or scores what a swap changes, needs both from one forward pass.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.names import SLOT, slot_of
from attn_plugins.hf.under_way import thread

Attended = tuple[torch.Tensor, torch.Tensor | None]
"""Outputs (B, Q, H, V) and, where wanted, weights (B, H, Q, K) of an attention function."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One call of a swapped module, which the model's own attention has served. Tensors are detached."""

    module: nn.Module
    query_BHQD: torch.Tensor
    key_BGKD: torch.Tensor
    value_BGKV: torch.Tensor
    own_BQHV: torch.Tensor
    """What the model goes on with."""
    mask: AttentionMask
    scale: float
    options: Mapping[str, Any] = field(repr=False)
    """Further arguments of the slot's forward."""
    weigh: Callable[[], Attended] = field(repr=False)
    """The model's own attention again, with weights."""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        served: Attended,
        weigh: Callable[[], Attended],
        *,
        mask: AttentionMask,
        scale: float,
        **options: Any,
    ) -> "Observed":
        """The call of a module with these queries, keys and values, which its own attention has ``served``."""
        query, key, value, own = (x.detach() for x in (*tokens, served[0]))
        return cls(
            module=module,
            query_BHQD=query,
            key_BGKD=key,
            value_BGKV=value,
            own_BQHV=own,
            mask=mask,
            scale=scale,
            options=options,
            weigh=weigh,
        )

    @property
    def slot(self) -> Attention:
        """The attention in the module's slot, whatever PEFT has put around it."""
        slot = slot_of(self.module)
        assert slot is not None
        return slot

    @property
    def real_BQ(self) -> torch.Tensor | None:
        """False for queries that are padding, (B or 1, Q); None where none is known to be, as in cross-attention."""
        padding_BK, queries = self.mask.padding_BK, self.query_BHQD.shape[2]
        if padding_BK is None or self.mask.cross:
            return None
        return padding_BK[:, self.key_BGKD.shape[2] - queries :]

    def attend(
        self, *, need_weights: bool = False, grad: bool = False, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend by the slot, without dropout: (out_BQHV, weights_BHQK or None).

        Args:
            grad: record what gives gradients to the slot's weights, whatever is set around; else record nothing.
            dtype: compute in this, to which all floating tensors of the call are cast; None leaves them as they are.
        """

        def cast(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return x.detach().to(dtype) if dtype is not None and x.is_floating_point() else x.detach()

        given = map(cast, (self.query_BHQD, self.key_BGKD, self.value_BGKV))
        options = {name: cast(option) for name, option in self.options.items()}
        slot: Any = self.module._modules[SLOT]
        with torch.set_grad_enabled(grad):
            return slot(*given, mask=self.mask, scale=self.scale, need_weights=need_weights, **options)

    def in_dtype(self, dtype: torch.dtype) -> "Observed":
        """The same call with its floating tensors in ``dtype``."""
        tensors = {name: getattr(self, name) for name in ("query_BHQD", "key_BGKD", "value_BGKV", "own_BQHV")}
        changed = {name: _in_dtype(x, dtype) for name, x in tensors.items()}
        return dataclasses.replace(self, **changed, options={k: _in_dtype(x, dtype) for k, x in self.options.items()})

    def attend_to(self, value_BGKV: torch.Tensor) -> torch.Tensor:
        """What the slot makes of other values by the weights of this call: out_BQHV, with a gradient to them.

        It computes in the dtype of the values, its weights too. Linear in the values, but where the slot's attention
        says that it is not (``linear_in_values``).
        """
        slot: Any = self.module._modules[SLOT]
        held = {**dict(slot.named_parameters()), **dict(slot.named_buffers())}
        held = {name: _in_dtype(x, value_BGKV.dtype) for name, x in held.items()}
        options = {"mask": self.mask, "scale": self.scale, "gates_of": self.value_BGKV, **self.options}
        with torch.enable_grad(), torch.autocast(value_BGKV.device.type, enabled=False):
            return torch.func.functional_call(slot, held, (self.query_BHQD, self.key_BGKD, value_BGKV), options)[0]

    def own_weights(self) -> torch.Tensor:
        """Weights of the model's own attention, (B, H, Q, K), through its dense form.

        Raises:
            ValueError: its attention gives none.
        """
        with torch.no_grad():
            _, weights = self.weigh()
        if weights is None:
            raise ValueError(f"{type(self.module).__name__} gives no weights of its own attention")
        return weights


def _in_dtype(x: Any, dtype: torch.dtype) -> Any:
    return x.detach().to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


See = Callable[[Observed], None]


@dataclass(frozen=True)
class Observer:
    """Who sees the calls of some modules."""

    modules: frozenset[nn.Module]
    see: See | None
    bypasses: bool
    """Whether the model goes on with its own attention, else with what slots return."""


@contextlib.contextmanager
def own_attention(model: nn.Module, see: See | None = None) -> Iterator[None]:
    """While it lasts, swapped modules of ``model`` attend by the model's own attention, in this thread.

    The model stays swapped: its slots are passed by, and a new cache keeps all keys and values. Of two of these around
    one call the inner one holds.

    Args:
        model: any module with swapped modules in it.
        see: called with each call of a swapped module, after the model's own attention has served it.

    Raises:
        ValueError: in a call, where a cache holds the state of a slot's attention.
    """
    with _held(model, see, bypasses=True):
        yield


@contextlib.contextmanager
def swapped_attention(model: nn.Module, see: See) -> Iterator[None]:
    """The same, while the model goes on with what its slots return: calls are those of the swapped model.

    ``own_BQHV`` is what its own attention makes of the queries, keys and values that reach a module there.
    """
    with _held(model, see, bypasses=False):
        yield


@contextlib.contextmanager
def _held(model: nn.Module, see: See | None, *, bypasses: bool) -> Iterator[None]:
    notes = thread.notes
    before = notes.observers
    modules = frozenset(module for module in model.modules() if slot_of(module) is not None)
    notes.observers = (*before, Observer(modules, see, bypasses))
    try:
        yield
    finally:
        notes.observers = before


def observer_of(module: nn.Module) -> Observer | None:
    """Who sees the calls of a module at present, None where nobody does."""
    held: tuple[Observer, ...] = thread.notes.observers
    return next((one for one in reversed(held) if module in one.modules), None) if held else None


def refuse_state(module: nn.Module, state: Any) -> None:
    """Raise a ValueError where a cache holds the state of a slot, in place of the keys that are to be attended to."""
    if state is not None:
        raise ValueError(
            f"{type(module).__name__} is to attend by the model's own attention, and the cache holds the state of "
            f"{slot_of(module)!r}; use a new cache, or none"
        )
