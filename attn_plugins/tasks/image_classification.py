from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import ConcatDataset

from attn_plugins.data.pictures import pixels, rgb
from attn_plugins.data.text import check_classes, label_names, label_numbers
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task
from attn_plugins.tasks.accuracy import accuracy_of, count_right, shares_right
from attn_plugins.tasks.batches import Batches
from attn_plugins.tasks.picture_size import sized


@register_task("image-classification")
class ImageClassification(TrainableTask):
    """Share of pictures whose class the model names right, and the mean cross-entropy.

    Pictures are what the model's image processor makes of them, without augmentation unless ``mirrored`` asks for it.
    ``majority`` is what a model gets that always answers the most frequent class: accuracy says nothing without it.
    """

    metric, better, model, columns = "accuracy", "higher", "image-classification", ("image", "label")
    pipeline_tag, row = "image-classification", "picture"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 16
        """Pictures measured at once."""
        image_size: int | None = None
        """Height and width that pictures get, in pixels, above or below those that the model was trained on, whose
        positions are then interpolated; null for what its processor says. It is saved with the model."""
        mirrored: bool = False
        """Train on every picture's mirror image, too: twice the rows, also of Trainer's own evaluation."""
        max_rows: int | None = None
        """Measure only the first so many rows; null for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.image_size is None or self.image_size >= 1, "image_size", "at least 1, or null")
            self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")

    def labels(self, data):
        check_classes(data)
        return label_names(data)

    def examples(self, data, processing, model):
        sized(processing, model, self.config.image_size, save=True)
        number = label_numbers(data, model.config.label2id)
        rows = data.rename_columns({"image": "pixel_values", "label": "labels"})

        def read(mirror: bool) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
            def batch(part: dict[str, list[Any]]) -> dict[str, Any]:
                pictures = [_mirrored(rgb(value), mirror) for value in part["pixel_values"]]
                labels = [number[label] for label in part["labels"]]
                return {"pixel_values": pixels(processing, pictures), "labels": labels}

            return batch

        plain = rows.with_transform(read(False))
        return ConcatDataset([plain, rows.with_transform(read(True))]) if self.config.mirrored else plain

    def collator(self, processing, model):
        _, positions = sized(processing, model, self.config.image_size, save=True)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            pictures = torch.stack([row["pixel_values"] for row in rows]).to(model.dtype)
            return {"pixel_values": pictures, "labels": torch.tensor([row["labels"] for row in rows]), **positions}

        return collate

    def training_metrics(self, processing):
        return accuracy_of

    def prepare(self, data, processing, model):
        if self.config.max_rows is not None:
            data = data.select(range(min(len(data), self.config.max_rows)))
        processing, positions = sized(processing, model, self.config.image_size)
        number = label_numbers(data, model.config.label2id)

        def batch(part: dict[str, list[Any]]) -> dict[str, Any]:
            labels = torch.tensor([number[label] for label in part["label"]])
            pictures = pixels(processing, [rgb(value) for value in part["image"]]).to(model.dtype)
            return {"pixel_values": pictures, "labels": labels, **positions}

        return Batches(data, self.config.batch_size, batch)

    def score(self, model, batch):
        labels = batch.pop("labels")
        return count_right(model(**batch).logits.float(), labels)

    def finish(self, sums):
        return shares_right(sums)


def _mirrored(picture: Any, mirror: bool) -> Any:
    from PIL import ImageOps

    return ImageOps.mirror(picture) if mirror else picture
