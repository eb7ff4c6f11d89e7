"""What the length of the texts that new weights were taught on does at other lengths, in linear_window attention.

    python examples/transfer/lengths.py                     SmolLM2-135M, taught at 512 and at 1536 tokens, seed 0

Perplexity of long documents in rows of 512, 1,024 and 1,536 tokens, of the model's own attention, of a window of 64
with 4 sinks alone, and of linear_window with the same window and sinks: untrained, and after 25 steps of attention
transfer on one text a step. The text in a column is the same for all rows; columns have other texts. --texts is a
folder with train.jsonl and validation.jsonl, a long "text" a row. A line of JSON for each goes to --out as it is
measured; a run that was stopped goes on where it was.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import transformers as tf

import attn_plugins as ap
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.versions import versions
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.tasks import get_task, run_task
from attn_plugins.training.models import load
from attn_plugins.transfer.run import batches_of

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "transfer" / "lengths.jsonl"
TEXTS = Path(os.environ.get("ATTN_PLUGINS_CACHE", "~/.cache/attn-plugins")).expanduser() / "data" / "long-documents"
LOCAL = {"type": "local", "window_size": 64, "num_sink_tokens": 4}
LINEAR_WINDOW = {"type": "linear_window", "window_size": 64, "num_sink_tokens": 4}

CASES: dict[str, tuple[Any, int | None]] = {
    "dense": (None, None),
    "window 64 + 4 sinks": (LOCAL, None),
    "linear_window, untrained": (LINEAR_WINDOW, None),
    "linear_window, taught at 512": (LINEAR_WINDOW, 512),
    "linear_window, taught at 1536": (LINEAR_WINDOW, 1536),
}
"""Label -> rules, and the length that they were taught at."""


def measure(
    seed: int = 0,
    label: str = "dense",
    *,
    model: str = "smollm2-135m-demo",
    texts: str = str(TEXTS),
    lengths: tuple[int, ...] = (512, 1024, 1536),
    rows: int = 4,
    steps: int = 25,
) -> dict[str, Any]:
    """Length -> perplexity of so many rows of it."""
    rules, taught_at = CASES[label]
    train, held_out = load_data(DataConfig(source=texts))
    loaded = load(model, attention=rules, dtype="float32", seed=seed)
    if taught_at is not None:
        batches = batches_of(loaded.model, loaded.tokenizer, train, taught_at, 1, steps, seed)
        ap.transfer_attention(loaded.model, batches, steps, body_dtype="bfloat16", seed=seed, progress=False)
    found = {}
    for length in lengths:
        task = get_task("perplexity")
        measured = task(task.Config(length=length, max_tokens=rows * length))
        batches = measured.prepare(held_out, loaded.tokenizer, loaded.model)
        found[str(length)] = run_task(measured, loaded.model, batches)["perplexity"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--model", default="smollm2-135m-demo")
    parser.add_argument("--texts", default=str(TEXTS), help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--rows", type=int, default=4, help="rows of each length (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of new weights and the order of the text")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tf.utils.logging.disable_progress_bar()
    results = Results(args.out)
    for label in args.labels or CASES:
        settings = {"case": label, "rules": CASES[label], "model": args.model, "rows": args.rows, "seed": args.seed}
        record = {"key": hash_of(settings), "status": "ok", "settings": settings, "versions": versions()}
        if results.done(record["key"]):
            continue
        results.add(record | {"result": measure(args.seed, label, model=args.model, texts=args.texts, rows=args.rows)})
        print(label, json.dumps(results.records[record["key"]]["result"]), flush=True)


if __name__ == "__main__":
    main()
