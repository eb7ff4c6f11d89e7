"""Pictures of rows: found and opened before a model is loaded, decoded as batches ask for them, always RGB."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_plugins.config.extras import need
from attn_plugins.data.media import located, opened

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

BATCH = 256
"""Rows whose pictures are looked at together."""


def read_pictures(data: "Dataset", role: str, folder: Path | None) -> "Dataset":
    """Rows whose column ``role`` holds files of pictures, or their bytes, that nothing has decoded yet."""
    return located(data, role, folder, need("datasets", "train").Image(decode=False))


def check_pictures(data: "Dataset", role: str, what: str) -> None:
    """Raise a ValueError where a row has no picture, or one that is not there or does not open.

    Of most formats that is the head of the file, of PNG all of it. What breaks off further on shows as it is decoded,
    in :func:`rgb`.
    """
    need("PIL", "vision")
    feature = data.features[role]
    if not isinstance(feature, need("datasets", "train").Image):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(f"{what} holds {kind}; allowed: pictures, or the paths of their files")
    wrong: list[str] = []
    number = 0
    for batch in data.select_columns(role).iter(BATCH):
        for value in batch[role]:
            number += 1
            if reason := _unreadable(value):
                wrong.append(f"row {number} of {len(data)}{_named(value)} {reason}")
    if wrong:
        more = f"; and {len(wrong) - 1} more rows have no picture that opens" if len(wrong) > 1 else ""
        raise ValueError(f"{what}: {wrong[0]}{more}")


def rgb(value: dict[str, Any]) -> Any:
    """The picture of a row, upright, as a PIL image of three channels; what is transparent in it is white.

    Args:
        value: a row's ``{"path": ..., "bytes": ...}``.

    Raises:
        ValueError: its file breaks off.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(opened(value)) as file:
            picture = ImageOps.exif_transpose(file)
            if not picture.has_transparency_data:
                return picture.convert("RGB")
            clear = picture.convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture{_named(value)} cannot be decoded: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def grey_levels(value: dict[str, Any], size: int, levels: int) -> "torch.Tensor":
    """The picture of a row as whole numbers below ``levels``, dark to light, (size * size,), line by line.

    Raises:
        ValueError: its file breaks off.
    """
    import torch
    from PIL import Image

    picture = rgb(value).convert("L")
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BOX)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).long() * levels // 256


def pixels(processing: Any, pictures: list[Any]) -> "torch.Tensor":
    """``pixel_values`` (B, channels, height, width) of PIL images, as an image processor or its processor makes them.

    Raises:
        ValueError: it does not make them of one size.
    """
    return image_processor(processing)(images=pictures, return_tensors="pt")["pixel_values"]


def image_processor(processing: Any) -> Any:
    """What makes inputs of pictures, of a processor that takes texts too."""
    return getattr(processing, "image_processor", processing)


def set_size(processing: Any, image_size: int) -> None:
    """Have a processor make pictures of ``image_size`` x ``image_size`` pixels, and say so where it is saved.

    Where it cuts the middle out of what it has resized, the share that it cuts off stays what it was.
    """
    processor = image_processor(processing)
    told = processor.to_dict()
    crop, size = told.get("crop_size") if told.get("do_center_crop") else None, told["size"]
    if crop:
        share = image_size / max(side for side in crop.values() if side)
        told["crop_size"] = {"height": image_size, "width": image_size}
        told["size"] = {name: round(side * share) for name, side in size.items() if side}
    elif size.get("height"):
        told["size"] = {"height": image_size, "width": image_size}
    else:
        told["size"] = {name: image_size for name, side in size.items() if side}
    changed = type(processor).from_dict(told)
    processor.size = changed.size
    if crop:
        processor.crop_size = changed.crop_size


def _unreadable(value: dict[str, Any] | None) -> str | None:
    from PIL import Image

    if value is None or (value["bytes"] is None and value["path"] is None):
        return "is null"
    if value["bytes"] is None and not os.path.isfile(value["path"]):
        return "is no file"
    try:
        with Image.open(opened(value)) as file:
            file.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"does not open as a picture: {type(error).__name__}" if not str(error) else f"does not open: {error}"
    return None


def _named(value: dict[str, Any] | None) -> str:
    return f", {value['path']}," if value and value["path"] else ""
