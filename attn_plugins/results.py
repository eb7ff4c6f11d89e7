"""Results that are kept: one line of JSON a cell, found again by a hash of all that the result depends on."""

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def hash_of(tree: dict[str, Any]) -> str:
    """A cell's key: the same for the same settings, in any order."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """results.jsonl: one line a cell, appended and on disk as the cell ends. The last line of a cell counts."""

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole, newline, rest = raw.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number} is not a result; repair it, or move the file away"
                ) from None
        if rest:  # a run was killed while it wrote: the cell did not end, and the next line must not join this one
            with self.path.open("r+b") as file:
                file.truncate(len(whole) + len(newline))

    def add(self, record: dict[str, Any]) -> None:
        self.records[record["key"]] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def done(self, key: str) -> bool:
        """Whether a cell has a result; one that failed is run again."""
        return self.records.get(key, {}).get("status") == "ok"


def versions() -> dict[str, str]:
    """What a result depends on beside its config."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
    }


def device_name() -> str:
    """The accelerator's name, or the processor's kind and how many of its cores are there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
