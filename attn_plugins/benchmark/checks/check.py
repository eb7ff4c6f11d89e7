"""Which backends are right on the user's own machine, and the fastest: ``attn-plugins check``.

A backend that has never run on a kind of device is left alone by ``auto`` there. A check runs each against the dense
reference form, in outputs and gradients, times those that passed, and remembers both in the cache folder, by device,
driver and versions (:mod:`attn_plugins.core.checked`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attn_plugins.benchmark.checks.apart import each_apart
from attn_plugins.benchmark.checks.backend_contract import contract, heads_of, time_of
from attn_plugins.benchmark.cost.launches import served
from attn_plugins.benchmark.results.cells import described
from attn_plugins.core import checked
from attn_plugins.core.backend import get_backend, list_backends
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention, list_attentions

LENGTHS = (2048, 8192)
"""Tokens at which a backend is timed, one row of 8 heads, forward and backward; ``auto`` goes by the longer."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""In which a backend is compared with the reference form, those of training first."""
HEADS = heads_of(8, 8, 64)
PROCESSES = 1
"""0 checks in this process, where a kernel that crashes ends everything."""
PATIENCE = 600.0
"""Seconds after which a backend is given up for an attention: kernels may compile and tune for minutes."""


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
    length = served(module, LENGTHS[0])
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
    if _known(device).type == "cpu":
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
    elsewhere = "" if _known(device).type in devices else f" (on {', '.join(devices)})"
    return get_backend(backend).what + elsewhere


def taken(attention: str, device: str) -> str:
    """In a sentence, what ``auto`` takes for an attention on a type of device."""
    if _known(device).type == "cpu":
        here = [name for name, refused in candidates(attention) if not refused and name in list_backends()]
        own = "".join(f"{name} where it can honour a call, else " for name in here if get_backend(name).own)
        return f"auto takes {own}torch, the form for CPUs"
    if not _results(device):
        return f"auto takes batched: nothing was checked on this device; say attn-plugins check --device {device}"
    first = [row.backend for row in standings(attention, device) if row.passed]
    order = first[: first.index("batched") + 1] if "batched" in first else [*first, "batched"]
    return f"auto takes the first of {', '.join(order)} that can honour a call"


def _known(device: str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r}; allowed: cuda, cpu, or another that torch knows") from None


def _place(device: str) -> dict[str, Any]:
    known = _known(device)
    return checked.place(known.type, known.index or 0)


def _results(device: str) -> list[dict[str, Any]]:
    record = checked.record_for(_place(device))
    return record["results"] if record else []


def check(
    device: str, attentions: Sequence[str] | None = None, *, say: Callable[[str], None] = print
) -> tuple[Path, list[dict[str, Any]]]:
    """Check every backend that could serve each attention on a device, and remember the results.

    Args:
        device: such as cuda.
        attentions: names; None is all.
        say: gets a line for each.

    Each backend is tried in a process of its own, so that a kernel that crashes ends that alone; every result is
    remembered as it comes.

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
    earlier, results = _results(device), []

    def add(result: dict[str, Any]) -> None:
        results.append(result)
        now = {(one["attention"], one["backend"]): one for one in [*earlier, *results]}
        checked.add_record(_place(device), list(now.values()))
        took = "" if result["seconds"] is None else f", {1000 * result['seconds']:.2f} ms at {LENGTHS[-1]} tokens"
        say(f"{result['attention']} by {result['backend']}: {result['note'] or 'passed'}{took}")

    items = [(name, backend) for name in names for backend, refused in candidates(name) if refused is None]
    work = partial(_checked, device=device)
    each_apart(items, work, processes=PROCESSES, deadline=math.inf, patience=PATIENCE, add=add, failed=_failed)
    kept = [one for one in earlier if one["attention"] not in names]
    return checked.add_record(_place(device), [*kept, *results]), results


def _failed(item: tuple[str, str], why: str) -> dict[str, Any]:
    attention, backend = item
    return {"attention": attention, "backend": backend, "passed": False, "seconds": None, "note": why}


def _checked(item: tuple[str, str], device: str) -> Iterator[dict[str, Any]]:
    """The result of one attention by one backend."""
    attention, backend = item
    try:
        failures = contract(attention, {}, backend, device, DTYPES)
        if failures:
            yield _failed(item, "; ".join(failures))
            return
        times = [time_of(attention, {}, backend, device, length)[0] for length in LENGTHS]
    except Exception as error:  # it serves none of the calls here, or not at a length; out of memory
        yield _failed(item, described(error))
        return
    timed = dict(zip(map(str, LENGTHS), times, strict=True))
    yield {**_failed(item, ""), "passed": True, "seconds": times[-1], "times": timed}
