"""Which backends were seen to be right on which device, and how fast they were: what ``auto`` goes by.

A record is of one device and the versions that its kernels depend on. The package may bring those of devices that it
was run on; ``attn-plugins check`` writes the user's own, which come first. A backend that no record names for an
attention is left alone by ``auto``.
"""

import functools
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).parent.parent / "backends" / "checked.json"
"""Records that the package brings, a list."""
FIELDS = ("capability", "torch", "triton", "fla-core")
"""What a record that the package brings has to agree with: the kind of device, and major and minor versions."""


def cache_folder() -> Path:
    """Where a user's own records are kept: ``$ATTN_PLUGINS_CACHE``, else ``~/.cache/attn-plugins``."""
    return Path(os.environ.get("ATTN_PLUGINS_CACHE") or Path.home() / ".cache" / "attn-plugins")


def own_file() -> Path:
    """The user's own records, a list in a JSON file."""
    return cache_folder() / "checked.json"


def place(device: str, index: int = 0) -> dict[str, Any]:
    """What a record is of: the device, its driver and the versions of what writes its kernels."""
    found: dict[str, Any] = {"device": device, "name": platform.processor() or device, "capability": None}
    if device == "cuda" and torch.cuda.is_available():
        found["name"] = torch.cuda.get_device_name(index)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(index)))
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda
    for package in ("triton", "fla-core"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def records(file: Path) -> list[dict[str, Any]]:
    """The records of a file; none where there is no such file.

    Raises:
        ValueError: the file is not what was written there.
    """
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf8"))
        if not all(isinstance(one["place"], dict) and isinstance(one["results"], list) for one in found):
            raise TypeError("a record has a place and results")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a record of checks ({error}); delete it and run attn-plugins check") from None
    return found


def record_for(here: dict[str, Any]) -> dict[str, Any] | None:
    """The record that holds for a place: the user's own of just this place, else the package's of its kind."""
    own = [one for one in records(own_file()) if one["place"] == here]
    kind = [one for one in records(SHIPPED) if _same_kind(one["place"], here)]
    return [*kind, *own][-1] if own or kind else None


def _same_kind(known: dict[str, Any], here: dict[str, Any]) -> bool:
    def short(value: Any) -> Any:
        return value if value is None else ".".join(str(value).split("+")[0].split(".")[:2])

    return known["device"] == here["device"] and all(short(known.get(x)) == short(here.get(x)) for x in FIELDS)


def add_record(place_of: dict[str, Any], results: list[dict[str, Any]]) -> Path:
    """Write a record among the user's own, in place of an earlier one of the same place; returns the file."""
    file = own_file()
    kept = [one for one in records(file) if one["place"] != place_of]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps([*kept, {"place": place_of, "results": results}], indent=1), encoding="utf8")
    partial.replace(file)
    _order.cache_clear()
    checked_backends.cache_clear()
    return file


@functools.cache
def _order(device: str, index: int) -> dict[str, tuple[str, ...]]:
    record = record_for(place(device, index))
    order: dict[str, list[tuple[float, str]]] = {}
    for one in record["results"] if record else ():
        if one["passed"] and one.get("seconds") is not None:
            order.setdefault(one["attention"], []).append((one["seconds"], one["backend"]))
    return {attention: tuple(name for _, name in sorted(found)) for attention, found in order.items()}


@functools.cache
def checked_backends(attention: str, device: str, index: int = 0) -> tuple[str, ...]:
    """Backends that passed for an attention on a device, the fastest first; "batched" among them is its own form."""
    return _order(device, index).get(attention, ())
