"""Results that are kept: one line of JSON a cell, found again by a hash of all that the result depends on."""

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from attn_plugins.extras import need
from attn_plugins.registry import ENTRY_POINT_GROUP

PACKAGE = Path(__file__).parent

OWN = ("attn_plugins", "commit")

CHECK = "check"

SHAPE = {"key": str, "status": str, "result": dict, "error": str, "settings": dict, "versions": dict}
"""Fields of a record that others rely on, with their types; the first two are in every record."""


def hash_of(tree: dict[str, Any]) -> str:
    """A cell's key: the same for the same settings, in any order."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """results.jsonl: one line a cell, appended and on disk as the cell ends. The last line of a cell counts.

    Opening reads and nothing else, also beside a process that writes. What a killed run left of a line is passed over,
    and is cut off by the next ``add``.

    Raises:
        ValueError: a line is not a result, or the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self._running: Any = None
        self._read()

    def _read(self) -> None:
        try:
            lines, rest = _split(self.path.read_bytes())
        except FileNotFoundError:
            return
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error.strerror}") from None
        for number, line in enumerate(lines.splitlines(), 1):
            record = _record(line)
            if record is None:
                raise ValueError(f"{self.path}, line {number} is not a result; repair it, or move the file away")
            if record.get(CHECK, _check(record)) != _check(record):
                raise ValueError(
                    f"{self.path}, line {number} has been changed since it was written; take it out, or move the file "
                    "away"
                )
            self.records[record["key"]] = record
        last = _record(rest)  # whole but for its newline, as an editor may leave it
        if last is not None:
            self.records[last["key"]] = last

    def alone(self) -> Any:
        """A lock on the file for the length of a run, to be used in a ``with``; what it holds by now is read again.

        Taken a second time by the same object, it is the same lock.

        Raises:
            ValueError: another run has it, or nothing can be written there.
        """
        filelock = need("filelock", "compare")
        self._running = self._running or filelock.FileLock(self._beside("running"), timeout=0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            held = self._running.acquire()
            self.path.open("ab").close()
        except filelock.Timeout:
            raise ValueError(
                f"another run is measuring into {self.path}; wait until it ends, or name another output_dir"
            ) from None
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from None
        self._read()
        return held

    def add(self, record: dict[str, Any]) -> None:
        """Append a record. Other processes may do the same at the same time: each waits until the other's is there."""
        self.records[record["key"]] = record
        line = json.dumps({**record, CHECK: _check(record)}, ensure_ascii=False).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with need("filelock", "compare").FileLock(self._beside("lock")), self.path.open("a+b") as file:
            file.seek(0)
            lines, rest = _split(file.read())
            if _record(rest) is not None:
                line = b"\n" + line
            elif rest:  # a run was killed while it wrote: the next line must not join this one
                file.truncate(len(lines))
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _beside(self, what: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{what}")

    def current(self, key: str) -> dict[str, Any] | None:
        """A cell's record, if it did not fail and was made with the versions that are at work now; else None."""
        record = self.records.get(key, {})
        return record if record.get("status") == "ok" and record.get("versions") == versions() else None

    def done(self, key: str) -> bool:
        """Whether a cell has a result that counts. One that failed, or is of other versions, is to be run again."""
        return self.current(key) is not None

    def stale(self, keys: Iterable[str]) -> list[str]:
        """Of the cells ``keys``, those that have a result of other versions."""
        return [
            key
            for key in keys
            if key in self.records and self.records[key]["status"] == "ok" and self.current(key) is None
        ]

    def told(self, keys: Iterable[str]) -> list[str]:
        """What a run has to say before it starts: how many of its cells are there, and how many are stale."""
        keys = list(keys)
        held, stale = sum(map(self.done, keys)), self.stale(keys)
        said = []
        if held:
            said.append(f"{held} of {len(keys)} cells are in {self.path} already (--fresh measures them again)")
        if stale:
            made = "; ".join(dict.fromkeys(spelled(self.records[key].get("versions", {})) for key in stale))
            said.append(
                f"{len(stale)} of {len(keys)} cells in {self.path} are stale and are measured again: they are of "
                f"{made}; now it is {spelled(versions())}"
            )
        return said

    def made_with(self, keys: Iterable[str]) -> list[str]:
        """Lines for a report: what the results of its cells were measured with, and which are not of these versions."""
        keys = [key for key in keys if key in self.records]
        made = sorted({spelled(self.records[key].get("versions", {})) for key in keys})
        lines = [f"- Measured with {one}" for one in made]
        stale = self.stale(keys)
        if stale:
            lines.append(
                f"- Stale: {len(stale)} of {len(keys)} cells were not measured with {spelled(versions())}, which wrote "
                "this; run it again to measure them anew"
            )
        return lines


def _check(record: dict[str, Any]) -> str:
    """Tells a record that was damaged from what was written: reports rely on every field of it."""
    return hash_of({name: value for name, value in record.items() if name != CHECK})


def _split(raw: bytes) -> tuple[bytes, bytes]:
    """The whole lines of a file, and what comes after the last newline."""
    whole, newline, rest = raw.rpartition(b"\n")
    return whole + newline, rest


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line, or None where it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not {"key", "status"} <= set(record):
        return None
    return record if all(isinstance(record[name], kind) for name, kind in SHAPE.items() if name in record) else None


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
