from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attn_plugins.data.pictures import grey_levels
from attn_plugins.data.text import check_classes, label_names, label_numbers
from attn_plugins.tasks import TrainableTask, register_task
from attn_plugins.tasks.token_classes import TokenClasses


@register_task("pixels")
class Pixels(TokenClasses, TrainableTask):
    """Classes of pictures that are read pixel by pixel: rows of grey levels as tokens, from the upper left corner on.

    As in the Long Range Arena (Tay et al. 2020, arXiv:2011.04006): what lies above each other in the picture is a whole
    line of tokens apart.
    """

    columns: ClassVar[tuple[str, ...]] = ("image", "label")

    @dataclass(frozen=True, kw_only=True)
    class Config(TokenClasses.Config):
        image_size: int = 28
        """Height and width of pictures, in pixels; others are made so."""
        levels: int = 256
        """Of grey: different tokens, beside the first of a row."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(1 <= self.image_size <= 1024, "image_size", "1 to 1024")
            self.require(2 <= self.levels <= 256, "levels", "2 to 256")

    def labels(self, data):
        check_classes(data)
        return label_names(data)

    def size(self):
        return self.config.image_size**2 + 1, self.config.levels + 1

    def made(self, data, model, held_out):
        number = label_numbers(data, model.config.label2id)
        size, levels = self.config.image_size, self.config.levels
        ids_RN = torch.full((len(data), size**2 + 1), levels)
        for row, value in enumerate(_values(data)):
            ids_RN[row, 1:] = grey_levels(value, size, levels)
        return {"input_ids": ids_RN, "label": torch.tensor([number[label] for label in data["label"]])}


def _values(data: Any) -> Any:
    """The pictures of rows, one after the other."""
    return (value for batch in data.select_columns("image").iter(1000) for value in batch["image"])
