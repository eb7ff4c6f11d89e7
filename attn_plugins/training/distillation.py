"""Distillation from the model itself: what it says with its own attention, it is to say with another.

Teacher and student are one model, called twice: with slots bypassed, adapters off and dropout off, and as it is.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from attn_plugins.hf.observe import Observed, own_attention

Distilled = Literal["kl", "hidden"]

ELEMENTS = 2**24
"""Logits that are in float32 at a time."""


def distillation_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    loss: Distilled = "kl",
    temperature: float = 1.0,
    call: Callable[..., Any] | None = None,
) -> tuple[torch.Tensor, Any]:
    """How far a swapped model is from itself with its own attention, over all tokens that are not padding.

    Args:
        model: swapped; also under PEFT, whose adapters the teacher lacks. Its pretrained weights must not train: they
            are the teacher's too.
        inputs: of one call.
        loss: kl: KL(teacher || student) of the logits at ``temperature``, times its square, mean over tokens (Hinton
            et al. 2015, arXiv 1503.02531). hidden: squared error of the last hidden states over their squared norm,
            mean over tokens.
        temperature: what logits are divided by.
        call: the model as training wraps it (DDP, FSDP), where it is wrapped.

    Returns:
        (loss, the student's output).

    Raises:
        ValueError: the model has no logits, or no hidden states, or nothing in it is swapped.
    """
    forward: Callable[..., Any] = model if call is None else call
    inputs = _to_call(model, inputs, loss)
    padding = _Padding()
    with _last_hidden(model) if loss == "hidden" else contextlib.nullcontext() as last:
        with as_pretrained(model, see=padding.note):
            teacher = _told(forward(**inputs), last)
        if not padding.seen:
            raise ValueError(f"no attention module of this {type(model).__name__} is swapped: it is its own teacher")
        output = forward(**inputs)
        student = _told(output, last)
    real = padding.real(student)
    if real is not None:
        student, teacher = student[real], teacher[real]
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    if loss == "kl":
        return _kl(student, teacher, temperature), output
    teacher = teacher.float()
    norms = teacher.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((student.float() - teacher).square().sum(-1) / norms).mean(), output


@contextlib.contextmanager
def as_pretrained(model: Any, see: Callable[[Observed], None] | None = None) -> Iterator[None]:
    """While it lasts the model is what was pretrained: its own attention, no adapters, no dropout; no gradients.

    Args:
        see: as in :func:`attn_plugins.hf.observe.own_attention`.
    """
    training = [module for module in model.modules() if module.training]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapters = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    model.eval()
    try:
        with torch.no_grad(), adapters, own_attention(model, see):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, requires_grad in trained:  # PEFT has all adapters train again, those that were frozen too
            parameter.requires_grad_(requires_grad)


class _Padding:
    """Which tokens of a call are none, as its attention modules have it: their lengths need not be those of inputs."""

    def __init__(self) -> None:
        self.seen = False
        self.noted: dict[int, torch.Tensor | None] = {}

    def note(self, seen: Observed) -> None:
        self.seen = True
        if not seen.mask.cross:
            self.noted[seen.query_BHQD.shape[2]] = seen.real_BQ

    def real(self, states: torch.Tensor) -> torch.Tensor | None:
        """(B, N), False for padding, for states (B, N, features); None where none is padding."""
        real_BQ = self.noted.get(states.shape[1]) if states.dim() == 3 else None
        return None if real_BQ is None else real_BQ.expand(states.shape[:2])


def _kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL of rows of logits, mean over rows; pieces of them in float32, computed again in the backward."""
    rows = max(1, ELEMENTS // student.shape[-1])
    total = student.new_zeros((), dtype=torch.float32)
    for own, target in zip(student.split(rows), teacher.split(rows), strict=True):
        total = total + checkpoint(_kl_sum, own, target, temperature, use_reentrant=False, preserve_rng_state=False)
    return total / len(student)


def _kl_sum(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    own, target = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    return kl_div(own, target, log_target=True, reduction="sum") * temperature**2


def _to_call(model: Any, inputs: Mapping[str, Any], loss: Distilled) -> dict[str, Any]:
    """The inputs without what asks for the model's own loss, for a cache, or for logits that are not needed."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = dict(inputs)
    if not getattr(inner.config, "is_encoder_decoder", False):  # there labels are what the decoder reads
        given.pop("labels", None)
    known = inspect.signature(inner.forward).parameters
    unneeded = {"use_cache": False} | ({"logits_to_keep": 1} if loss == "hidden" else {})
    return given | {name: value for name, value in unneeded.items() if name in known}


@contextlib.contextmanager
def _last_hidden(model: Any) -> Iterator[list[torch.Tensor]]:
    """The last hidden states of each call of a model, whatever its head makes of them."""
    found: list[torch.Tensor] = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = inner.base_model.register_forward_hook(lambda module, args, output: found.append(output[0]))
    try:
        yield found
    finally:
        hook.remove()


def _told(output: Any, last: list[torch.Tensor] | None) -> torch.Tensor:
    """What a call is measured by: (B, .., features)."""
    if last is not None:
        if not last or last[-1].dim() < 3:
            raise ValueError("loss='hidden' needs a model with last hidden states (B, N, features)")
        return last.pop()
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"loss='kl' needs logits, and a {type(output).__name__} has none; allowed here: 'hidden'")
    return logits
