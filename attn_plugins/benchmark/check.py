"""Which backends are right on the user's own machine, and the fastest: ``attn-plugins check``.

A backend that has never run on a kind of device is left alone by ``auto`` there. A check runs each against the dense
reference form, in outputs and gradients, times those that passed, and remembers both in the cache folder, by device,
driver and versions (:mod:`attn_plugins.core.checked`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attn_plugins.benchmark.backend_contract import contract, time_of
from attn_plugins.core import checked
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.backend import get_backend, list_backends
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention, list_attentions

LENGTHS = (2048, 8192)
"""Tokens at which a backend is timed, one row of 8 heads, forward and backward; ``auto`` goes by the longer."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""In which a backend is compared with the reference form, those of training first."""
HEADS = HeadShape(
    num_heads=8, num_key_value_heads=8, head_dim=64, value_dim=64, grid_size=(32, 64), hidden_size=512, layer=0
)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a backend stands with an attention on a device."""

    backend: str
    passed: bool | None
    """Whether it equals the reference form there; None where that was not checked."""
    seconds: float | None
    """Of a pass forward and backward at the longer length, where it was timed."""
    note: str
    """What it is, why it cannot serve, what differed, or what to install."""


def candidates(attention: str) -> list[tuple[str, str | None]]:
    """Forms and backends that could serve an attention with its default options, and why one cannot, or None."""
    cls = get_attention(attention)
    module = cls(cls.Config(), HEADS)
    length = 2048
    q, k, v = (
        torch.empty(1, HEADS.num_heads, length, HEADS.head_dim, dtype=torch.bfloat16, device="meta") for _ in "qkv"
    )
    mask = AttentionMask(1, length, length, causal=cls.causal, device="meta")
    found: list[tuple[str, str | None]] = [("batched", None)]
    for name in list_backends():
        backend = get_backend(name)
        found.append((name, backend.refuses(module, q, k, v, mask=mask, scale=0.125, dropout=0.0) or backend.missing()))
    return found


def standings(attention: str, device: str) -> list[Standing]:
    """Where every form and backend stands with an attention on a device, the fastest that passed first."""
    known: dict[str, dict[str, Any]] = {}
    for one in _results(device):
        if one["attention"] == attention:
            known[one["backend"]] = one
    rows = []
    if device == "cpu":
        rows.append(Standing(backend="torch", passed=None, seconds=None, note="the attention's own form for CPUs"))
    for name, refused in candidates(attention):
        one = known.get(name, {})
        note = one.get("note") or refused or _what(name, device)
        rows.append(Standing(backend=name, passed=one.get("passed"), seconds=one.get("seconds"), note=note))
    return sorted(rows, key=lambda row: (not row.passed, row.seconds if row.seconds is not None else float("inf")))


def _what(backend: str, device: str) -> str:
    if backend == "batched":
        return "the attention's own form for devices that are not a CPU"
    devices = get_backend(backend).devices
    elsewhere = "" if torch.device(device).type in devices else f" (on {', '.join(devices)})"
    return get_backend(backend).what + elsewhere


def taken(attention: str, device: str) -> str:
    """In a sentence, what ``auto`` takes for an attention on a type of device."""
    if device == "cpu":
        return "auto takes torch, the form for CPUs"
    if not _results(device):
        return f"auto takes batched: nothing was checked on this device; say attn-plugins check --device {device}"
    first = [row.backend for row in standings(attention, device) if row.passed]
    order = first[: first.index("batched") + 1] if "batched" in first else [*first, "batched"]
    return f"auto takes the first of {', '.join(order)} that can honour a call"


def _results(device: str) -> list[dict[str, Any]]:
    try:
        record = checked.record_for(checked.place(device))
    except (RuntimeError, AssertionError):  # there is no such device here
        return []
    return record["results"] if record else []


def check(
    device: str, attentions: Sequence[str] | None = None, *, say: Callable[[str], None] = print
) -> tuple[Path, list[dict[str, Any]]]:
    """Check every backend that could serve each attention on a device, and remember the results.

    Args:
        device: such as cuda.
        attentions: names; None is all.
        say: gets a line for each.

    Returns:
        The file that remembers, and the results. An attention that is not named keeps its earlier results.

    Raises:
        ValueError: there is no such device here, or it is the CPU, where ``auto`` takes the form for CPUs.
    """
    try:
        on_cpu = torch.empty(0, device=device).device.type == "cpu"
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if on_cpu:
        raise ValueError(
            f"device={device!r}; allowed: another device: on a CPU auto takes the form that is made for it"
        )
    names = list(attentions or list_attentions())
    kept = [one for one in _results(device) if one["attention"] not in names]
    results = []
    for result in _checked(device, names):
        results.append(result)
        took = "" if result["seconds"] is None else f", {1000 * result['seconds']:.2f} ms at {LENGTHS[-1]} tokens"
        say(f"{result['attention']} by {result['backend']}: {result['note'] or 'passed'}{took}")
    return checked.add_record(checked.place(device), [*kept, *results]), results


def _checked(device: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        for backend, refused in candidates(name):
            if refused is not None:
                continue
            result: dict[str, Any] = {"attention": name, "backend": backend, "passed": False, "seconds": None}
            try:
                failures = contract(name, {}, backend, device, DTYPES)
            except ValueError as error:  # it serves none of the calls, on this device
                failures = [str(error)]
            result["note"] = "; ".join(failures)
            if not failures:
                result["passed"] = True
                try:
                    times = [time_of(name, {}, backend, device, length)[0] for length in LENGTHS]
                    result |= {"seconds": times[-1], "times": dict(zip(map(str, LENGTHS), times, strict=True))}
                except Exception as error:  # out of memory, a kernel that does not compile at this length
                    result |= {"passed": False, "note": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            yield result
