"""Folders of tiny pictures, and of tiny models of them, for tests of tasks on pictures."""

import random

import torch
import transformers as tf
from conftest import tokenizer, write_rows
from PIL import Image

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
GPT2_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def pictures(folder, rows=48, columns=("label", "text")):
    """A table beside its pictures, whose colour is their label, and the text tells it."""
    chance, table = random.Random(0), []
    (folder / "files").mkdir(parents=True)
    for number in range(rows):
        colour = chance.choice(list(COLOURS))
        shade = tuple(value + chance.randint(-30, 30) for value in COLOURS[colour])
        Image.new("RGB", (chance.randint(8, 20), 12), shade).save(folder / "files" / f"{number}.png")
        told = {"label": colour, "text": f"the cat is {colour} ."}
        table.append({"image": f"files/{number}.png", **{column: told[column] for column in columns}})
    return write_rows(folder / "train.jsonl", table)


def vit(folder, cls=tf.ViTModel, **changes):
    """A folder of a tiny ViT with its image processor."""
    torch.manual_seed(0)
    cls(tf.ViTConfig(**{**SIZES, "intermediate_size": 48, "initializer_range": 0.1, **changes})).save_pretrained(folder)
    tf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def captioner(folder):
    """A folder of a tiny ViT and a tiny GPT-2 that attends to it, with a processor of both."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    text = tf.GPT2Config(vocab_size=20, **sizes, **GPT2_IDS, add_cross_attention=True)
    picture = tf.ViTConfig(**SIZES, intermediate_size=48, initializer_range=0.1)
    model = tf.VisionEncoderDecoderModel(encoder=tf.ViTModel(picture), decoder=tf.GPT2LMHeadModel(text))
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 3
    model.save_pretrained(folder)
    images = tf.ViTImageProcessorPil(size={"height": 16, "width": 16})
    tf.TrOCRProcessor(image_processor=images, tokenizer=tokenizer()).save_pretrained(folder)
    return str(folder)
