"""Folders of tiny pictures, and of tiny models of them, for tests of tasks on pictures."""

import random

import torch
import transformers as tf
from conftest import write_rows
from PIL import Image

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def pictures(folder, rows=48):
    """A table beside its pictures, whose colour is their label, and the caption tells it."""
    chance, table = random.Random(0), []
    (folder / "files").mkdir(parents=True)
    for number in range(rows):
        colour = chance.choice(list(COLOURS))
        shade = tuple(value + chance.randint(-30, 30) for value in COLOURS[colour])
        Image.new("RGB", (chance.randint(8, 20), 12), shade).save(folder / "files" / f"{number}.png")
        table.append({"image": f"files/{number}.png", "label": colour, "text": f"the cat is {colour} ."})
    return write_rows(folder / "train.jsonl", table)


def vit(folder, cls=tf.ViTModel, **changes):
    """A folder of a tiny ViT with its image processor."""
    torch.manual_seed(0)
    cls(tf.ViTConfig(**{**SIZES, "intermediate_size": 48, "initializer_range": 0.1, **changes})).save_pretrained(folder)
    tf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)
