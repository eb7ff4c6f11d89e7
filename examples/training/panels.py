"""Pictures whose captions need a look at each part: four pieces of clothing, named row by row.

    python examples/training/panels.py --fashion-mnist data/fashion-mnist --out data/panels

Four pictures of Fashion-MNIST (28 x 28, a folder of its idx files) make one of 56 x 56; its caption is "bag, coat,
sandal, dress": first the upper row from left to right, then the lower. Writes OUT/train.jsonl and OUT/validation.jsonl,
a line {"image": ..., "caption": ..., "labels": [...]} a picture, and the pictures beside them. Each piece is used
once; those of the held-out pictures are of Fashion-MNIST's test split.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from attn_plugins.data.idx import idx_splits

NAMES = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""The ten classes, a word each."""
SIDE = 28


def panel(pieces: list[Image.Image]) -> Image.Image:
    """Four pictures as one: two rows of two."""
    whole = Image.new("L", (2 * SIDE, 2 * SIDE))
    for number, piece in enumerate(pieces):
        whole.paste(piece, (SIDE * (number % 2), SIDE * (number // 2)))
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion-mnist", type=Path, required=True, help="folder of its idx files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=3000, help="pictures to train on (default %(default)s)")
    parser.add_argument("--validation", type=int, default=300, help="held-out pictures (default %(default)s)")
    args = parser.parse_args()
    splits = idx_splits(args.fashion_mnist)
    wanted = {"train": ("train", args.train), "validation": ("test", args.validation)}
    for name, (split, number) in wanted.items():
        if 4 * number > len(splits[split]):
            parser.error(f"--{name} {number}: four pieces each; {split} has {len(splits[split])}")
    for name, (split, number) in wanted.items():
        pieces, order = splits[split], list(range(len(splits[split])))
        random.Random(0).shuffle(order)
        (args.out / name).mkdir(parents=True, exist_ok=True)
        lines = []
        for row in range(number):
            chosen = pieces.select(order[4 * row : 4 * row + 4])
            image, labels = f"{name}/{row:05d}.png", list(chosen["label"])
            panel(list(chosen["image"])).save(args.out / image)
            caption = ", ".join(NAMES[label] for label in labels)
            lines.append(json.dumps({"image": image, "caption": caption, "labels": labels}) + "\n")
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf8")
    print(f"{args.out}: {args.train} pictures to train on, {args.validation} held out")


if __name__ == "__main__":
    main()
