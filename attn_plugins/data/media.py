"""Columns of pictures and sound: what rows hold of them is a file's path, or its bytes, until they are read."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def located(data: "Dataset", role: str, folder: Path | None, feature: Any) -> "Dataset":
    """Rows whose column ``role`` holds ``{"path": ..., "bytes": ...}``, one of which may be None.

    Args:
        folder: where relative paths start; None for the current one.
        feature: ``datasets.Audio(decode=False)`` or ``datasets.Image(decode=False)``.

    Returns:
        the rows as they were where the column holds neither paths nor such a feature, nor the bytes of files.
    """
    kind = data.features[role]
    if getattr(kind, "dtype", None) in ("string", "large_string", "string_view"):

        def under(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return {role: [path and str(Path(folder or "", path).expanduser()) for path in batch[role]]}

        data = data.map(under, batched=True, desc="finding files")
    elif not isinstance(kind, type(feature)) and set(kind if isinstance(kind, dict) else ()) != {"path", "bytes"}:
        return data
    return data.cast_column(role, feature)


def opened(value: dict[str, Any]) -> Any:
    """What a file of a row is read from: a path, or its bytes as a binary file."""
    return value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])
