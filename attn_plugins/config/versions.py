"""Versions that a result depends on: of this package, its plug-ins, torch, transformers, and the device."""

import contextlib
import functools
import hashlib
import os
import platform
import subprocess
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from attn_plugins.core.catalogue import ENTRY_POINT_GROUP

PACKAGE = Path(__file__).parents[1]


OWN = ("attn_plugins", "commit")


def versions() -> dict[str, str]:
    """What a result depends on beside its config; ``commit`` is there where the package is in a git checkout."""
    return {
        **_own(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
    }


def hardware() -> dict[str, Any]:
    """What this machine is made of. No result goes stale by it: what counts of it stands in ``versions``."""
    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count()}
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.accelerator.is_available():
        found |= {"accelerator": device_name(), "accelerators": torch.accelerator.device_count()}
    if torch.cuda.is_available():
        found["accelerator_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "model name" in told:  # which a virtual machine may shorten: family and model tell the generation
            return "{model name} (family {cpu family}, model {model})".format_map(defaultdict(lambda: "?", told))
    return platform.processor() or platform.machine()


def spelled(made: dict[str, Any]) -> str:
    """Versions in words."""
    others = [f"{name} {value}" for name, value in made.items() if name not in OWN]
    return ", ".join([spelled_own(made), *others])


def spelled_own(made: dict[str, Any]) -> str:
    """This package's version and commit in words; they are missing in results from before they were recorded."""
    if "attn_plugins" not in made:
        return "attn_plugins version not recorded"
    return f"attn_plugins {made['attn_plugins']}" + (f" at commit {made['commit']}" if "commit" in made else "")


@functools.cache
def _own() -> dict[str, str]:
    """Versions of this package and its plug-ins when first asked for: files that change later are not what runs."""
    try:
        made = {"attn_plugins": metadata.version("attn-plugins")}
    except metadata.PackageNotFoundError:  # run from its sources
        made = {"attn_plugins": "not installed"}
    found = commit(PACKAGE)
    if found is not None:
        made["commit"] = found
    brought = {entry.dist for entry in metadata.entry_points(group=ENTRY_POINT_GROUP) if entry.dist is not None}
    return made | {dist.name: dist.version for dist in sorted(brought, key=lambda dist: dist.name)}


def commit(folder: Path) -> str | None:
    """The last commit that changed a folder, and if files in it differ from that, a hash of all of its sources."""
    last = _git(folder, "log", "-1", "--format=%h", "--abbrev=12", "--", ".")
    if not last:  # no git, no checkout, or a checkout of something else, such as one with an environment inside
        return None
    if not _git(folder, "status", "--porcelain", "--", "."):
        return last
    sources = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sources.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return f"{last} with changes {sources.hexdigest()[:8]}"


def _git(folder: Path, *arguments: str) -> str:
    # Of a hook of another repository, which says where that one is; and a look must not write an index.
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def device_name() -> str:
    """The accelerator's name, or the processor's kind and how many of its cores are there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
