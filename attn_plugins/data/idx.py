"""Pictures and classes in the format of MNIST and its kin: folders of idx files, compressed or not."""

import gzip
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from attn_plugins.config.extras import need

if TYPE_CHECKING:
    from datasets import Dataset

IMAGES = re.compile(r"(?P<split>.+)-images-idx3-ubyte(?P<suffix>(\.gz)?)")
SPLITS = {"t10k": "test"}
"""What files call a split -> what everybody else does."""


def idx_splits(folder: Path) -> "dict[str, Dataset]":
    """The splits of a folder of idx files, with the columns image and label (a number); empty where it has none.

    A file of images is `SPLIT-images-idx3-ubyte`, or that with `.gz`, and beside it lies `SPLIT-labels-idx1-ubyte`;
    t10k is the split test. Rows hold their pixels uncompressed, with a header that makes a PGM picture of them.

    Raises:
        ValueError: a file is missing, or is not what its name says.
    """
    datasets = need("datasets", "train")
    splits = {}
    for path in sorted(folder.iterdir()):
        if not (found := IMAGES.fullmatch(path.name)):
            continue
        pixels, (rows, height, width) = _read(path, 3)
        classes, (labels,) = _read(folder / f"{found['split']}-labels-idx1-ubyte{found['suffix']}", 1)
        if rows != labels:
            raise ValueError(f"{path} has {rows} images, and its file of labels {labels} labels")
        head, size = f"P5 {width} {height} 255\n".encode(), height * width
        images = [{"bytes": head + pixels[start : start + size], "path": None} for start in range(0, rows * size, size)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"image": images, "label": list(classes)}, features=features)
        splits[SPLITS.get(found["split"], found["split"])] = table
    return splits


def _read(path: Path, dimensions: int) -> tuple[bytes, tuple[int, ...]]:
    """The bytes of an idx file of so many dimensions, and its shape."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise ValueError(f"{path} is no idx file of bytes in {dimensions} dimensions: it starts {content[:4].hex(' ')}")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    total = 1
    for side in shape:
        total *= side
    if len(content) - start != total:
        raise ValueError(f"{path} says that it holds {total} bytes, and holds {len(content) - start}")
    return content[start:], shape
