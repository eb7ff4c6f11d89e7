"""The contract of one backend: an existing kernel that computes the same function as an attention's own forms.

The forms that every attention brings are :data:`FORMS`; a backend is one more way, on devices and for calls that it
says. Which of them ``auto`` takes is decided by :mod:`attn_plugins.core.checked`: those that were seen to be right on
this kind of device, the fastest first.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from attn_plugins.core.checked import checked_backends
from attn_plugins.core.class_registry import C, Registry

FORMS = ("auto", "reference", "torch", "batched")
"""Names of what an attention brings itself: the dense form, the form for CPUs, the form for other devices."""


class Backend(abc.ABC):
    """One backend, in a file of ``attn_plugins/backends``. It holds nothing: one instance serves all attentions.

    What it serves it tells by what attentions are (the patterns that they have, the recurrence that they are), never
    by their names, so that it serves those of third parties too.
    """

    name: ClassVar[str]
    """Set by :func:`register_backend`."""
    what: ClassVar[str]
    """In a line, for the documentation: whose kernels, for which attentions."""
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    """Types of device that it runs on."""
    traceable: ClassVar[bool] = False
    """Whether torch.compile takes it into its graph; ``auto`` takes no other there."""

    own: ClassVar[bool] = False
    """Whether it is part of this package, whose tests hold it to the reference: ``auto`` takes it first, wherever it is
    built and serves a call, without a record of a check."""

    def serves(self, kind: type) -> bool:
        """Whether there are calls of attentions of a class that it honours. It is asked once for each."""
        return True

    def build(self, **options: Any) -> list[str]:
        """Make what is missing, where this package can; what is to be said of it.

        Raises:
            ValueError: it cannot.
        """
        raise ValueError(f"backend {self.name!r} is nothing that is built here")

    def product(self) -> tuple[Callable[[], Any], float] | None:
        """A product of matrices as its kernels compute it, by one thread, and how many operations that is.

        What it takes bounds what they can reach on a machine. None where it brings none of its own, or is missing.
        """
        return None

    @abc.abstractmethod
    def missing(self) -> str | None:
        """What has to be installed for it and is not, with the command that does; None where all is there."""

    @abc.abstractmethod
    def refuses(
        self,
        attention: Any,
        q_BHQD: torch.Tensor,
        k_BGKD: torch.Tensor,
        v_BGKV: torch.Tensor,
        **options: Any,
    ) -> str | None:
        """Why it cannot honour this call, or None. It decides by shapes, dtypes and options.

        What it has to know of a mask's values it asks for through ``mask.cached``, once a forward pass.

        Args:
            attention: an :class:`attn_plugins.core.attention.Attention`.
            options: those that ``attention.attend`` would get: mask, scale, dropout, ...
        """

    @abc.abstractmethod
    def attend(
        self,
        attention: Any,
        q_BHQD: torch.Tensor,
        k_BGKD: torch.Tensor,
        v_BGKV: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """out_BHQV, equal to ``attention.reference`` in outputs and gradients, of a call that it does not refuse."""

    def steps(self, cls: type) -> bool:
        """Whether :meth:`attend_from` may serve attentions of a class. Asked once a class."""
        return False

    def attend_from(
        self,
        attention: Any,
        q_BH1D: torch.Tensor,
        k_BG1D: torch.Tensor,
        v_BG1V: torch.Tensor,
        *,
        state: Any,
        **options: Any,
    ) -> torch.Tensor | None:
        """As ``attention.attend_from``, for one new token; None, with nothing changed, leaves the call to that."""
        return None


def _lacks(cls: Any) -> list[str]:
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise ValueError(f"{cls!r} is not a subclass of {Backend.__module__}.{Backend.__qualname__}")
    missing = [what for what in ("what", "__doc__") if not getattr(cls, what, None)]
    return missing + sorted(getattr(cls, "__abstractmethods__", ()))


BACKENDS: Registry[Backend] = Registry("backend", "attn_plugins.backends", _lacks, "attn_plugins.backends")
_instances: dict[str, Backend] = {}


def register_backend(name: str) -> Callable[[C], C]:
    """Class decorator that puts a :class:`Backend` into the registry under ``name``; ValueError where it is taken."""
    if name in FORMS:
        raise ValueError(f"backend {name!r} is a form that every attention has; choose another name")
    register = BACKENDS.register(name)

    def registered(cls: C) -> C:
        cls = register(cls)
        forget()
        return cls

    return registered


def forget() -> None:
    """Have backends asked anew what they serve: one has come, or stands in the place of an earlier one."""
    for asked in (_ours, _own, _stepping):
        asked.cache_clear()


def list_backends() -> list[str]:
    """Names of all backends, sorted, beside :data:`FORMS`."""
    return BACKENDS.names()


def get_backend(name: str) -> Backend:
    """The backend registered under ``name``; ValueError where there is none."""
    cls = BACKENDS.get(name)
    if type(_instances.get(name)) is not cls:
        _instances[name] = cls()
    return _instances[name]


def why_not(backend: Backend, attention: Any, *tensors: torch.Tensor, **options: Any) -> str | None:
    """Why a backend cannot serve a call, its device and what is installed included; None where it can."""
    device = tensors[0].device.type
    if device not in backend.devices:
        return f"it runs on {', '.join(backend.devices)}, not on {device}"
    return backend.missing() or backend.refuses(attention, *tensors, **options)


def forced(name: str, attention: Any, *tensors: torch.Tensor, **options: Any) -> Backend:
    """The backend that a user asked for.

    Raises:
        ValueError: it cannot serve the call; the message says why.
    """
    backend = get_backend(name)
    reason = why_not(backend, attention, *tensors, **options)
    if reason is not None:
        raise ValueError(
            f"backend {name!r} cannot serve this call of attention {attention.name!r}: {reason}; "
            "allowed: 'auto', which takes what can"
        )
    return backend


def fastest(attention: Any, *tensors: torch.Tensor, **options: Any) -> Backend | None:
    """What ``auto`` takes on a device; None for the attention's own form there."""
    device = tensors[0].device
    for name in _tried_first(type(attention), device.type, device.index or 0):
        backend = _instances[name]
        if torch.compiler.is_compiling() and not backend.traceable:
            continue
        if why_not(backend, attention, *tensors, **options) is None:
            return backend
    return None


def attend_from(
    attention: Any, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, *others: Any, **options: Any
) -> torch.Tensor:
    """Go on from a state: one token by a backend that has a step for it, all else as the attention itself does.

    "auto" and the name of a backend take its step where it has one and serves the call. It is asked once a layer and
    token, so that what costs time is asked once a class.
    """
    if not torch.compiler.is_compiling() and k_BGKD.shape[2] == 1:
        backend = _stepping(attention.__class__, attention.backend, q_BHQD.device.type)
        if backend is not None and backend.missing() is None:
            out_BH1V = backend.attend_from(attention, q_BHQD, k_BGKD, *others, **options)
            if out_BH1V is not None:
                return out_BH1V
    return attention.attend_from(q_BHQD, k_BGKD, *others, **options)


@functools.cache
def _stepping(cls: type, asked: str, device: str) -> Backend | None:
    """The backend that steps for attentions of a class, where ``asked`` was asked for."""
    names = _ours(device) if asked == "auto" else () if asked in FORMS else (asked,)
    backends = (get_backend(name) for name in names)
    return next((one for one in backends if device in one.devices and one.steps(cls)), None)


@torch.compiler.assume_constant_result  # it reads files, which a graph cannot
def _tried_first(kind: Any, device: str, index: int) -> tuple[str, ...]:
    """Names of the backends that are faster than an attention's own form and serve its class, the fastest first.

    Each is made."""
    own = _own(kind, device)
    if device == "cpu":
        return own
    checked = checked_backends(kind.name, device, index)
    names = checked[: checked.index("batched")] if "batched" in checked else checked
    return (*own, *(name for name in names if get_backend(name).serves(kind)))


@functools.cache
def _own(kind: type, device: str) -> tuple[str, ...]:
    """Names of this package's own backends for a type of device, that serve a class; each is made."""
    return tuple(name for name in _ours(device) if get_backend(name).serves(kind))


@functools.cache
def _ours(device: str) -> tuple[str, ...]:
    """Names of this package's own backends for a type of device; each is made."""
    return tuple(name for name in list_backends() if get_backend(name).own and device in get_backend(name).devices)


def usual(attention: Any, device: torch.device) -> str:
    """Name of what ``auto`` tries first for an attention on a device."""
    for name in _tried_first(type(attention), device.type, device.index or 0):
        if not _instances[name].own or _instances[name].missing() is None:
            return name
    return "torch" if device.type == "cpu" else "batched"
