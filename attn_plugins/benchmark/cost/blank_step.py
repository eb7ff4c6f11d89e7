"""One step of training on tensors that have shapes and no values: what it holds in memory, and what it starts.

The bytes are those of tensors that are alive; forward, loss, backward and optimizer are the run's own. Attentions
compute by their batched form, and operations on a CPU's tensors stand for a GPU's.
"""

import math
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils

from attn_plugins.benchmark.cost.operations import Operations, counted
from attn_plugins.config.extras import need
from attn_plugins.core.attention import Attention
from attn_plugins.hf.swap import unwrap

PIECE = 1 << 20
"""Elements of a weight that an optimizer which asks for values is given at most."""


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """What a forward and a backward pass ask for, beside weights and the optimizer's states."""

    kept: int
    """Bytes that are kept for the backward pass: what is alive between forward and backward."""
    peak: int
    """The most bytes that are alive at once, gradients of weights included."""
    peak_without_gradients: int
    """The same without these."""
    outputs: int
    """Of the peak, those of tensors as wide as what the model puts out: logits, and what its loss makes of them."""
    operations: Operations


def without_values(model: nn.Module) -> nn.Module:
    """Give a model of the meta device tensors of a CPU that have no values, in place; to be called in a fake mode."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied weights stay tied
                    blank: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if is_weight else blank
                held[name] = made[id(tensor)]
        if isinstance(module, Attention) and module.backend != "reference":
            module.backend = "batched"
    return model


def count_step(
    model: nn.Module, batch: dict[str, Any], *, autocast: torch.dtype | None, checkpointing: dict[str, Any] | None
) -> StepCounts:
    """Run a forward and a backward pass of a model whose weights have no values, in the fake mode that they are of.

    Args:
        model: as :func:`without_values` makes it; it is left without gradients.
        batch: what it is called with, labels included.
        autocast: dtype of mixed precision, as accelerate does it.
        checkpointing: arguments of gradient checkpointing; None is without it.

    Raises:
        ValueError: the model has no gradient checkpointing.
        Exception: something asks for the value of a tensor.
    """
    inner: Any = unwrap(model)
    if checkpointing is not None:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing or None)
        if not all(parameter.requires_grad for parameter in model.parameters()):
            inner.enable_input_require_grads()
    model.train()
    try:
        output = inner.get_output_embeddings()
        given = tree_map(lambda x: torch.empty_like(x) if isinstance(x, torch.Tensor) else x, batch)
        there = [*model.parameters(), *model.buffers(), *(x for x in tree_leaves(given) if isinstance(x, torch.Tensor))]
        held = _Alive(there, getattr(output, "out_features", None))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hooks = [one.register_post_accumulate_grad_hook(held.is_gradient) for one in trained]
        # Positions without values do not tell that a row is one text, and all pairs would be masked.
        one_text = mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)
        with one_text, held, counted() as operations:
            loss = _loss(model, given, autocast)
            kept = held.now
            loss.backward()
        for hook in hooks:
            hook.remove()
    finally:
        model.zero_grad(set_to_none=True)
        if checkpointing is not None:
            inner.gradient_checkpointing_disable()
    return StepCounts(
        kept=kept,
        peak=held.peak,
        peak_without_gradients=held.peak_without_gradients,
        outputs=held.outputs_at_peak,
        operations=operations,
    )


def _loss(model: nn.Module, batch: dict[str, Any], autocast: torch.dtype | None) -> Any:
    """The model's own, whose outputs nobody holds any longer."""
    if autocast is None:
        return model(**batch).loss
    with torch.autocast("cpu", dtype=autocast):
        out = model(**batch)
    return need("accelerate.utils.operations", "train").convert_to_fp32(out).loss


def optimizer_bytes(weights: list[torch.Tensor], mode: FakeTensorMode, cls: Any, options: dict[str, Any]) -> int:
    """Bytes of what an optimizer keeps after a step on weights without values.

    One that asks for values, as those with states of few bits do, makes a step on zeros of their sizes instead; of
    weights with more than :data:`PIECE` elements on some of their rows, by which the rest is reckoned.

    Args:
        mode: what the weights were made in.
    """
    try:
        with mode:
            return _states(weights, cls, options)
    except DataDependentOutputException:
        alike = Counter((tuple(weight.shape), weight.dtype) for weight in weights)
    found = 0.0
    for (shape, dtype), number in alike.items():
        width = math.prod(shape[1:])
        rows = min(shape[0], max(1, PIECE // width)) if shape else 1
        piece = torch.zeros(rows, *shape[1:], dtype=dtype)
        found += number * _states([piece], cls, options) * (shape[0] / rows if shape else 1)
    return round(found)


def _states(weights: list[torch.Tensor], cls: Any, options: dict[str, Any]) -> int:
    stepped = [nn.Parameter(torch.zeros_like(weight)) for weight in weights]
    for one in stepped:
        one.grad = torch.zeros_like(one)
    optimizer = cls(stepped, **options)
    optimizer.step()
    return sum(_stored(x) for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, torch.Tensor))


def _stored(x: torch.Tensor) -> int:
    """Bytes of a tensor; of one that is made of others, theirs."""
    if is_traceable_wrapper_subclass(x):
        return sum(_stored(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.nbytes


class _Alive(TorchDispatchMode):
    """Bytes of the tensors that are made inside and are alive, each storage once."""

    def __init__(self, there: list[torch.Tensor], width: int | None):
        """
        Args:
            there: tensors from before, whose views are no new ones.
            width: last dimension of the model's outputs.
        """
        super().__init__()
        self.width = width
        self.now = self.gradients = self.outputs = 0
        self.peak = self.peak_without_gradients = self.outputs_at_peak = 0
        self.known = WeakIdKeyDictionary({x.untyped_storage(): True for x in there})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x)
        return out

    def _add(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        if storage in self.known:
            return
        size = storage.nbytes()
        wide = size if self.width is not None and x.ndim > 0 and x.shape[-1] == self.width else 0
        self.known[storage] = True
        weakref.finalize(storage, self._free, size, wide)
        self.now += size
        self.outputs += wide
        if self.now > self.peak:
            self.peak, self.outputs_at_peak = self.now, self.outputs
        self.peak_without_gradients = max(self.peak_without_gradients, self.now - self.gradients)

    def _free(self, size: int, wide: int) -> None:
        self.now -= size
        self.outputs -= wide

    def is_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.nbytes
