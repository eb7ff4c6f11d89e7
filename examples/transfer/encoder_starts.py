"""Where each attention starts in pretrained encoders: what is left of their features when they are swapped, untrained.

    python examples/transfer/encoder_starts.py --text MODEL --vision MODEL --pictures FOLDER      every attention
    python examples/transfer/encoder_starts.py --text MODEL "no sinks={type: local, num_sink_tokens: 0}" ...

Of text: cosine of the mean of the last hidden states with the model's own, over Python's documentation (held-out
topics, cut at --length tokens). Of pictures: the squared error of the class token's features, and of the others',
relative to squares of the model's own, so that 1 is as bad as zeros. A line of JSON for each goes to --out as it is
measured; a run that was stopped goes on where it was.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch.nn.functional import cosine_similarity

import attn_plugins as ap
from attn_plugins.benchmark.pages.starts_table import at_start
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.extras import need
from attn_plugins.config.versions import versions
from attn_plugins.config.yaml import parse_yaml
from attn_plugins.data.text import python_docs

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "transfer" / "encoder_starts.jsonl"


class Text:
    """A pretrained encoder of text, and texts of up to ``length`` tokens."""

    def __init__(self, model: str, *, length: int = 512, rows: int = 8):
        self.settings = {"model": Path(model).name, "kind": "text", "length": length, "rows": rows}
        tokenizer = tf.AutoTokenizer.from_pretrained(model)
        self.model: Any = tf.AutoModel.from_pretrained(model).eval()
        texts = sorted(python_docs()["validation"]["text"], key=len, reverse=True)[:rows]
        self.batch = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        self.own = self._features()

    @torch.no_grad()
    def _features(self) -> torch.Tensor:
        real = self.batch["attention_mask"].unsqueeze(-1).float()
        return (self.model(**self.batch).last_hidden_state * real).sum(1) / real.sum(1)

    def figures(self) -> dict[str, float]:
        cosines = cosine_similarity(self._features(), self.own)
        return {"cosine": float(cosines.mean()), "lowest cosine": float(cosines.min())}


class Vision:
    """A pretrained vision transformer, and pictures as large as it was trained on."""

    def __init__(self, model: str, pictures: Path, *, rows: int = 4):
        self.model: Any = tf.AutoModel.from_pretrained(model).eval()
        side = self.model.config.image_size
        self.settings = {"model": Path(model).name, "kind": "vision", "side": side, "rows": rows}
        files = sorted(pictures.glob("**/*.png")) + sorted(pictures.glob("**/*.jpg"))
        if len(files) < rows:
            raise ValueError(f"{pictures} has {len(files)} pictures (.png, .jpg); needed: {rows}")
        self.images = [_pixels(path, side) for path in files[:: len(files) // rows][:rows]]
        self.own = self._features()

    @torch.no_grad()
    def _features(self) -> torch.Tensor:
        return torch.cat([self.model(pixel_values=image).last_hidden_state for image in self.images])

    def figures(self) -> dict[str, float]:
        wrong, whole = (self._features() - self.own).square().sum(-1), self.own.square().sum(-1)
        errors = wrong / whole
        return {"error of CLS": float(errors[:, 0].mean()), "error of the others": float(errors[:, 1:].mean())}


def _pixels(path: Path, side: int) -> torch.Tensor:
    """(1, 3, side, side): on white, the shorter side resized, the middle cut out, normalised as ImageNet is."""
    image_of = need("PIL.Image", "compare")
    image = image_of.open(path).convert("RGBA")
    image = image_of.alpha_composite(image_of.new("RGBA", image.size, "white"), image).convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    image = image.crop((left, top, left + edge, top + edge)).resize((side, side), image_of.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return ((pixels / 255 - mean) / deviation).unsqueeze(0)


def measure(seed: int, subject: Text | Vision, rules: Any) -> dict[str, float]:
    """Figures of the model under these rules, untrained; a ValueError where they do not serve it."""
    torch.manual_seed(seed)
    ap.swap_attention(subject.model, rules)
    try:
        return subject.figures()
    finally:
        ap.restore_attention(subject.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rules", nargs="*", help="LABEL=RULES, or rules alone; default: every bidirectional attention")
    parser.add_argument("--text", metavar="MODEL", help="an encoder of text")
    parser.add_argument("--vision", metavar="MODEL", help="a vision transformer with a class token")
    parser.add_argument("--pictures", type=Path, help="folder of pictures")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text (default %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="texts, and pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights that are drawn")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.vision and not args.pictures:
        parser.error("--vision needs --pictures")
    wanted: dict[str, Any] = at_start("bidirectional")
    if args.rules:
        split = [rules.rpartition("=")[::2] for rules in args.rules]
        wanted = {label or rules: parse_yaml(rules) for label, rules in split}
    tf.utils.logging.disable_progress_bar()
    subjects: list[Text | Vision] = [Text(args.text, length=args.length, rows=args.rows)] if args.text else []
    subjects += [Vision(args.vision, args.pictures, rows=args.rows)] if args.vision else []
    results = Results(args.out)
    for subject in subjects:
        for label, rules in wanted.items():
            settings = {"attention": label, "rules": rules, **subject.settings, "seed": args.seed}
            record = {"key": hash_of(settings), "status": "ok", "settings": settings, "versions": versions()}
            if results.done(record["key"]):
                continue
            try:
                record["result"] = measure(args.seed, subject, rules)
            except ValueError as error:
                record |= {"status": "refused", "error": str(error)}
            results.add(record)
            print(subject.settings["kind"], label, json.dumps(record.get("result", record.get("error"))), flush=True)


if __name__ == "__main__":
    main()
