"""Sound of rows: found and opened before a model is loaded, decoded as batches ask for it, one channel at one rate."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_plugins.config.extras import need
from attn_plugins.data.media import located, opened

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus")
"""Of files that make a folder one of sound."""
SHORTEST = 0.05
"""Seconds: less is no word, and less than the first layers of a model can read."""


def read_sound(data: "Dataset", role: str, folder: Path | None) -> "Dataset":
    """Rows whose column ``role`` holds files of sound, or their bytes, that nothing has decoded yet."""
    return located(data, role, folder, need("datasets", "train").Audio(decode=False))


def check_sound(data: "Dataset", role: str, what: str) -> None:
    """Raise a ValueError where a row has no sound, or a file that is not there or does not open.

    That is the head of a file; what breaks off further on shows as it is decoded, in :func:`waveform`.
    """
    feature = data.features[role]
    if not isinstance(feature, need("datasets", "train").Audio):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(f"{what} holds {kind}; allowed: sound, or the paths of its files")
    need("soundfile", "audio")
    wrong = []
    for number, row in enumerate(data.select_columns(role), 1):
        if reason := _unreadable(row[role]):
            wrong.append(f"row {number} of {len(data)}{_named(row[role])} {reason}")
    if wrong:
        more = f"; and {len(wrong) - 1} more rows have no sound that opens" if len(wrong) > 1 else ""
        raise ValueError(f"{what}: {wrong[0]}{more}")


def seconds(value: dict[str, Any]) -> float:
    """How long the sound of a row lasts, by the head of its file."""
    return need("soundfile", "audio").info(opened(value)).duration


def waveform(value: dict[str, Any], rate: int) -> "np.ndarray":
    """The sound of a row (T,), float32: the mean of its channels, resampled by a polyphase filter.

    Args:
        value: a row's ``{"path": ..., "bytes": ...}``.
        rate: samples in a second.

    Raises:
        ValueError: its file breaks off.
    """
    import numpy as np

    soundfile = need("soundfile", "audio")
    try:
        samples_TC, its = soundfile.read(opened(value), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"the sound{_named(value)} cannot be decoded: {error}") from error
    if not len(samples_TC):
        raise ValueError(f"the sound{_named(value)} cannot be decoded: it breaks off before its first sample")
    mono_T = samples_TC.mean(1)
    if its != rate:
        common = math.gcd(its, rate)
        mono_T = need("scipy.signal", "audio").resample_poly(mono_T, rate // common, its // common)
    return mono_T.astype(np.float32)


def sound_folder(path: Path, files: Sequence[Path], read: Callable[[Path], "Dataset"]) -> "dict[str, Dataset] | None":
    """Splits of a folder of sound with a table metadata.csv, .jsonl or .parquet, or of folders of them, one a split.

    Each row of a table names its file in the column "file_name", which becomes "audio". The same as ``datasets`` reads
    it, which needs torchcodec for that.

    Args:
        files: all that are below ``path``.
        read: rows of a table.

    Returns:
        None where it is no such folder.
    """
    tables = [file for file in files if file.stem == "metadata" and file.suffix in (".csv", ".jsonl", ".parquet")]
    if not tables or not any(file.suffix.lower() in SUFFIXES for file in files):
        return None
    splits: dict[str, Dataset] = {}
    for table in tables:
        rows, folder = read(table), table.parent
        if "file_name" not in rows.column_names:
            raise ValueError(f"{table} has no column 'file_name'; it has: {', '.join(rows.column_names)}")

        def under(batch: dict[str, list[Any]], folder: Path = folder) -> dict[str, list[Any]]:
            return {"audio": [name and str((folder / name).resolve()) for name in batch["file_name"]]}

        rows = rows.map(under, batched=True, remove_columns="file_name", desc="finding files")
        split = "train" if folder == path else folder.relative_to(path).parts[0]
        splits[split] = rows
    return splits


def _unreadable(value: dict[str, Any] | None) -> str | None:
    soundfile = need("soundfile", "audio")
    if value is None or (value["bytes"] is None and value["path"] is None):
        return "is null"
    if value["bytes"] is None and not os.path.isfile(value["path"]):
        return "is no file"
    try:
        found = soundfile.info(opened(value)).duration
    except soundfile.SoundFileError as error:
        return f"does not open: {getattr(error, 'error_string', error)}"
    return None if found >= SHORTEST else f"lasts {found:.3g} seconds; allowed: at least {SHORTEST}"


def _named(value: dict[str, Any] | None) -> str:
    return f", {value['path']}," if value and value["path"] else ""
