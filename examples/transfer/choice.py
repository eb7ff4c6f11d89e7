"""Which heads keep full attention decides what a swapped model recalls: choices, and three plain ones beside them.

    python examples/transfer/choice.py                 SmolLM2-135M, windows of 64 and 256 with 4 sinks, seed 0
    python examples/transfer/choice.py --seed 1 2      more seeds: other rows to choose by, other rows to measure on

Choices are made by two rows of some documents and measured on rows of others, 1,536 tokens each: perplexity of text,
and accuracy and negative log-likelihood of a pass key, a passage and names that stood at the beginning. Beside them
stand the model's own attention, windows and sinks alone, and every fourth layer with full attention. The body
computes in bfloat16. --texts is a folder with train.jsonl and validation.jsonl, a long "text" a row. A line of JSON for
each goes to --out as it is measured; a run that was stopped goes on where it was.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch.nn.functional import cross_entropy

import attn_plugins as ap
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.versions import versions
from attn_plugins.data.recall import recall_rows
from attn_plugins.training.models import resolve

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "transfer" / "choice.jsonl"
TEXTS = Path(os.environ.get("ATTN_PLUGINS_CACHE", "~/.cache/attn-plugins")).expanduser() / "data" / "long-documents"
ROWS = (("passkey", "copy"), ("names",))
"""Parts of each kind of row."""


class Subject:
    """A pretrained decoder with a bfloat16 body, texts to choose by, and documents to measure on.

    Args:
        model: a folder, a name on the hub, or "smollm2-135m-demo".
        texts: a folder, see the top of this file.
        length: tokens of a row that is measured.
        rows: as many with a pass key and a passage, and as many with names.
    """

    def __init__(self, model: str = "smollm2-135m-demo", texts: Path = TEXTS, *, length: int = 1536, rows: int = 5):
        self.settings = {"model": model, "length": length, "rows": rows, "chosen at": length}
        folder = resolve(model)
        self.tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        self.model: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.model.requires_grad_(False)
        self.texts, held_out = (self._read(texts / f"{split}.jsonl") for split in ("train", "validation"))
        self.held_out = self.tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"]

    def _read(self, file: Path) -> list[str]:
        texts = [json.loads(line)["text"] for line in file.read_text("utf8").splitlines()]
        return [text for text in texts if len(text) > 12_000][:12]

    def window(self, size: int) -> dict[str, Any]:
        return {"type": "local", "window_size": size, "num_sink_tokens": 4}

    def choose(self, seed: int, size: int, **options: Any) -> Any:
        """Rules that keep heads or layers, chosen by rows of other documents, as long as those that are measured."""
        options |= {"seed": seed, "length": self.settings["length"]}
        return ap.choose_attention(self.model, self.tokenizer, self.texts, self.window(size), **options)

    @torch.no_grad()
    def figures(self, rules: Any, seed: int) -> dict[str, float]:
        """Perplexity, accuracies and losses of the model under these rules; it is left with its own attention."""
        sizes = {"length": self.settings["length"], "count": self.settings["rows"], "seed": 100 + seed}
        rows = [row for parts in ROWS for row in recall_rows(self.held_out, self.tokenizer, parts=parts, **sizes)]
        found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        try:
            if rules is not None:
                ap.swap_attention(self.model, rules)
            for row in rows:
                ids = row.input_ids_N
                logits = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
                for part in {name.split(" ")[0] for name in row.answers}:
                    for start, stop in row.spans(part):
                        predicted = logits[start - 1 : stop - 1]
                        losses = cross_entropy(predicted, ids[start:stop], reduction="none")
                        found.setdefault(part, []).append((losses, predicted.argmax(-1) == ids[start:stop]))
        finally:
            ap.restore_attention(self.model)
        figures = {"perplexity": math.exp(torch.cat([losses for losses, _ in found["text"]]).mean())}
        for part in [part for parts in ROWS for part in parts]:
            figures[part] = float(torch.cat([right for _, right in found[part]]).float().mean())
            figures[f"{part} loss"] = float(torch.cat([losses for losses, _ in found[part]]).mean())
        return figures


def every_fourth(subject: Subject, size: int) -> Any:
    return [{"type": "softmax", "layers": "every:4+3"}, subject.window(size)]


HEADS, FEW_HEADS, LAYERS = 21 / 90, 12 / 90, 7 / 30
"""Budgets: as many of SmolLM2-135M's key/value heads, or layers."""


def cases() -> dict[str, Callable[[Subject, int], Any]]:
    """Label -> the rules of a subject and a seed."""

    def chosen(size: int, **options: Any) -> Callable[[Subject, int], Any]:
        return lambda subject, seed: subject.choose(seed, size, **options)

    made: dict[str, Callable[[Subject, int], Any]] = {"dense": lambda subject, seed: None}
    for size in (64, 256):
        made |= {
            f"window {size}": lambda subject, seed, size=size: subject.window(size),
            f"window {size}, every fourth layer": lambda subject, seed, size=size: every_fourth(subject, size),
            f"window {size}, heads": chosen(size, budget=HEADS),
        }
    made["window 64, few heads"] = chosen(64, budget=FEW_HEADS)
    for score in ("contribution", "recall", "kl"):
        made[f"window 64, layers by {score}"] = chosen(64, budget=LAYERS, level="layers", score=score)
    return made


def measure(seed: int = 0, subject: Subject | None = None, label: str | None = None) -> dict[str, dict[str, float]]:
    """Label -> figures, of all cases or one."""
    subject = subject or Subject()
    found = {}
    for name, rules in cases().items():
        if label in (None, name):
            begun = time.process_time()
            chosen = rules(subject, seed)
            spent = time.process_time() - begun
            found[name] = {**subject.figures(chosen, seed), "CPU seconds to choose": round(spent, 1)}
            print(name, json.dumps(found[name]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-demo")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--length", type=int, default=1536, help="tokens of a row (default %(default)s)")
    parser.add_argument("--rows", type=int, default=5, help="rows of each kind (default %(default)s)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of rows, to choose by and to measure on")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tf.utils.logging.disable_progress_bar()
    subject, results = Subject(args.model, args.texts, length=args.length, rows=args.rows), Results(args.out)
    for seed in args.seed:
        for label in cases():
            settings = {"case": label, **subject.settings, "seed": seed}
            record = {"key": hash_of(settings), "status": "ok", "settings": settings, "versions": versions()}
            if not results.done(record["key"]):
                results.add(record | {"result": measure(seed, subject, label)[label]})


if __name__ == "__main__":
    main()
