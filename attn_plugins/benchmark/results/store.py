"""Results on disk: one line of JSON a cell, found again by a hash of all that the result depends on."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.results.schema import SCHEMA, SHAPE
from attn_plugins.config.extras import need
from attn_plugins.config.versions import spelled, versions

CHECK = "check"


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
        self.reread()

    def reread(self) -> None:
        """Take in what other processes have added since."""
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
            self._refuse_newer(record)
            if record.get(CHECK, _check(record)) != _check(record):
                raise ValueError(
                    f"{self.path}, line {number} has been changed since it was written; take it out, or move the file "
                    "away"
                )
            self.records[record["key"]] = record
        last = _record(rest)  # whole but for its newline, as an editor may leave it
        if last is not None:
            self._refuse_newer(last)
            self.records[last["key"]] = last

    def _refuse_newer(self, record: dict[str, Any]) -> None:
        if record.get("schema", 0) > SCHEMA:
            raise ValueError(
                f"{self.path} holds a record of schema {record['schema']}; allowed: up to {SCHEMA}, which this version "
                "of attn_plugins knows"
            )

    def lock(self) -> Any:
        """A lock on the file for the length of a run, to be used in a ``with``; what it holds by now is read again.

        Taken a second time by the same object, it is the same lock.

        Raises:
            ValueError: another run has it, or nothing can be written there.
        """
        filelock = need("filelock", "compare")
        self._running = self._running or filelock.FileLock(self._beside("running"), timeout=0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._running.acquire()
            self.path.open("ab").close()
        except filelock.Timeout:
            raise ValueError(
                f"another run is measuring into {self.path}; wait until it ends, or name another output_dir"
            ) from None
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from None
        self.reread()
        return lock

    def add(self, record: dict[str, Any]) -> None:
        """Append a record of this version's schema. Other processes may too: each waits until the other's is there."""
        record = {"schema": SCHEMA, **record}
        record = json.loads(json.dumps(record))  # as it will be read: its check is of names that are text
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

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        """Put these records in the place of all that the file holds, whole or not at all.

        Raises:
            ValueError: a run is measuring into the file, or nothing can be written there.
        """
        kept = {record["key"]: record for record in records}
        lines = (json.dumps({**record, CHECK: _check(record)}, ensure_ascii=False) for record in kept.values())
        with self.lock():
            partial = self._beside("partial")
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            partial.replace(self.path)
        self.records = kept

    def _beside(self, what: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{what}")

    def current(self, key: str) -> dict[str, Any] | None:
        """A cell's record, if it did not fail and was made with the versions that are at work now; else None."""
        record = self.records.get(key, {})
        return record if record.get("status") == "ok" and record.get("versions") == versions() else None

    def done(self, key: str) -> bool:
        """Whether a cell has a result that counts. One that failed, or is of other versions, is to be run again."""
        return self.current(key) is not None

    def failed(self, key: str) -> bool:
        """Whether a cell failed with the versions that are at work now."""
        record = self.records.get(key, {})
        return record.get("status") == "error" and record.get("versions") == versions()

    def stale(self, keys: Iterable[str]) -> list[str]:
        """Of the cells ``keys``, those that have a result of other versions."""
        return [
            key
            for key in keys
            if key in self.records and self.records[key]["status"] == "ok" and self.current(key) is None
        ]

    def resume_summary(self, keys: Iterable[str], *, retry: bool = True) -> list[str]:
        """What a run has to say before it starts: how many of its cells are there, how many failed, or are stale."""
        keys = list(keys)
        done, stale = sum(map(self.done, keys)), self.stale(keys)
        lines = []
        if done:
            lines.append(f"{done} of {len(keys)} cells are in {self.path} already (--fresh measures them again)")
        failed = sum(map(self.failed, keys))
        if failed:
            again = "they are run again" if retry else "they are left so (--no-retry)"
            lines.append(f"{failed} of {len(keys)} cells in {self.path} failed; {again}")
        if stale:
            made = "; ".join(dict.fromkeys(spelled(self.records[key].get("versions", {})) for key in stale))
            lines.append(
                f"{len(stale)} of {len(keys)} cells in {self.path} are stale and are measured again: they are of "
                f"{made}; now it is {spelled(versions())}"
            )
        return lines

    def measured_with(self, keys: Iterable[str]) -> list[str]:
        """A line for each set of versions that the results of these cells were measured with."""
        made = sorted({spelled(self.records[key].get("versions", {})) for key in keys if key in self.records})
        return [f"- Measured with {one}" for one in made]

    def provenance(self, keys: Iterable[str]) -> list[str]:
        """Lines for a report: what the results of its cells were measured with, and which are not of these versions."""
        keys = [key for key in keys if key in self.records]
        lines, stale = self.measured_with(keys), self.stale(keys)
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
