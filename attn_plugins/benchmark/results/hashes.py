"""What stood behind the names of a model and of data when a cell was measured: hashes of their contents.

They tell one model or data set from another; a hash of every byte of a large model would take longer than many a cell.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attn_plugins.core.options import build
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.training.models import resolve

WEIGHTS = (".safetensors", ".bin", ".gguf")
PIECES, PIECE = 64, 4096
"""Of a file of weights: so many pieces, evenly spread from its beginning to its end, of so many bytes."""
ROWS = 10_000
"""So many rows of a split are read, evenly spread."""


def hashes_of(model: Any, data: dict[str, Any] | None, columns: Sequence[str]) -> dict[str, str]:
    """Hashes by what they are of: model, train, held_out. What cannot be told is left out.

    Args:
        model: a folder, a name on the hub, the built-in model; anything else, such as a config, has no hash.
        data: a ``DataConfig`` as a mapping.
        columns: roles of the columns that are used; none of rows that a task makes itself.
    """
    found = {"model": model_hash(model) if isinstance(model, str) else None}
    if data is not None and columns:
        found |= _data_hashes(json.dumps(data, sort_keys=True), tuple(columns))
    return {name: value for name, value in found.items() if value is not None}


@functools.lru_cache(maxsize=16)
def model_hash(source: str) -> str | None:
    """``commit:`` and the hub's commit, or ``sha256:`` of a folder's config.json, adapter_config.json and weights.

    Of each file of weights its name, its size and PIECES pieces are read, the first with the names and shapes that a
    safetensors file begins with. None where there is no such model.
    """
    try:
        folder = Path(resolve(source))
    except ValueError:
        return None
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(source, "config.json")
        return f"commit:{Path(config).parent.name[:16]}" if isinstance(config, str) else None
    files = [folder / name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    files += sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    return _sha256(part for path in files for part in (path.name.encode(), *_pieces(path)))


def _pieces(path: Path) -> Iterable[bytes]:
    size = path.stat().st_size
    yield str(size).encode()
    with path.open("rb") as file:
        if size <= PIECES * PIECE:
            yield file.read()
            return
        for number in range(PIECES):
            file.seek((size - PIECE) * number // (PIECES - 1))
            yield file.read(PIECE)


@functools.lru_cache(maxsize=16)
def _data_hashes(data: str, columns: tuple[str, ...]) -> dict[str, str]:
    """Of the rows that are trained on and those that are held out; of a stream the latter alone."""
    try:
        train, held_out = load_data(build(DataConfig, json.loads(data)), columns)
        found = {"held_out": rows_hash(held_out)}
        return found if json.loads(data)["streaming"] else {"train": rows_hash(train), **found}
    except Exception:  # a cell that needs them says why it failed; the result of another must not be lost by it
        return {}


def rows_hash(rows: Any) -> str:
    """``sha256:`` of a ``datasets.Dataset``: its number of rows, and ROWS of them; of pictures and sound the files."""
    number = len(rows)
    chosen = rows.select([number * place // ROWS for place in range(ROWS)]) if number > ROWS else rows
    tables = chosen.with_format("arrow").iter(batch_size=500)
    read = (json.dumps(_plain(row), sort_keys=True).encode() for table in tables for row in table.to_pylist())
    return _sha256((str(number).encode(), *sorted(rows.column_names), *read))


def _plain(value: Any) -> Any:
    """A row as JSON holds it; of a file its contents, not where it lies."""
    if isinstance(value, dict) and set(value) == {"path", "bytes"} and (value["bytes"] or value["path"]):
        value = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _sha256(parts: Iterable[bytes | str]) -> str:
    """Of parts of which none can pass for two others."""
    found = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        found.update(len(raw).to_bytes(8, "big") + raw)
    return f"sha256:{found.hexdigest()[:16]}"
