"""What attention transfer brings to a decoder and to a sentence encoder, how long it takes, and what length does to it.

    python examples/transfer/attention_transfer.py                        both, seed 0
    python examples/transfer/attention_transfer.py --seed 1 decoder       one of them

Decoder: linear attention (hedgehog) in all layers of SmolLM2-135M after 50 steps on Python's documentation, one text of
512 tokens a step: error of outputs on held-out text, the mean and the worst layer, at 512 and at 1024 tokens; CPU time
of a step over that of a plain forward pass, both with a bfloat16 body. Encoder: the same attention, bidirectional, in
MiniLM (a folder, $ATTN_PLUGINS_CACHE/models/minilm), 100 steps of 4 passages of 128 tokens of long documents: cosine of
sentence embeddings to the model's own. A line of JSON for each goes to --out; a run that was stopped goes on where it
was.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import attn_plugins as ap
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.versions import versions
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.hf.observe import own_attention
from attn_plugins.training.models import load
from attn_plugins.transfer.body import slots_of
from attn_plugins.transfer.errors import measure_errors
from attn_plugins.transfer.run import batches_of

CACHE = Path(os.environ.get("ATTN_PLUGINS_CACHE", "~/.cache/attn-plugins")).expanduser()
OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "transfer" / "attention_transfer.jsonl"
HEDGEHOG = {"type": "linear", "feature_map": "hedgehog"}
Batches = list[dict[str, torch.Tensor]]


def decoder(
    seed: int = 0, *, model: str = "smollm2-135m-demo", steps: int = 50, length: int = 512, held_out: int = 8
) -> dict[str, Any]:
    """Errors before and after, and CPU time of a step in forward passes."""
    train, validation = load_data(DataConfig(source="python-docs"))
    loaded = load(model, attention=HEDGEHOG, dtype="float32", seed=seed)
    swapped: Any = loaded.model
    batches = batches_of(swapped, loaded.tokenizer, train, length, 1, steps, seed)
    measured = batches_of(swapped, loaded.tokenizer, validation, length, 1, held_out)
    twice = batches_of(swapped, loaded.tokenizer, validation, 2 * length, 1, max(1, held_out // 2))
    forward = _forward_seconds(swapped, measured[0])
    began = time.process_time()
    ap.transfer_attention(swapped, batches[:1], 1, held_out=measured[:1], body_dtype="bfloat16", progress=False)
    around = time.process_time() - began  # a step and two measurements
    loaded = load(model, attention=HEDGEHOG, dtype="float32", seed=seed)
    swapped, began = loaded.model, time.process_time()
    taken = {"held_out": measured[:1], "body_dtype": "bfloat16", "seed": seed, "progress": False}
    report = ap.transfer_attention(swapped, batches, steps, **taken)
    step = (time.process_time() - began - around) / (steps - 1)
    slots = slots_of(swapped)
    untrained = load(model, attention=HEDGEHOG, dtype="float32", seed=seed).model
    before = _means(measure_errors(untrained, slots_of(untrained), measured, dtype=torch.bfloat16))
    after = _means(measure_errors(swapped, slots, measured, dtype=torch.bfloat16))
    longer = _means(measure_errors(swapped, slots, twice, dtype=torch.bfloat16))
    return {
        "error before": _mean(before),
        "error": _mean(after),
        "error of the worst layer": max(after),
        "error at twice the length": _mean(longer),
        "step over forward": step / forward,
        "CPU seconds of a forward": forward,
        "CPU seconds of a step": step,
        "loss": report.losses[-1]["loss"],
    }


def encoder(
    seed: int = 0,
    *,
    model: str = str(CACHE / "models" / "minilm"),
    data: str = str(CACHE / "data" / "long-documents"),
    steps: int = 100,
    length: int = 128,
    batch_size: int = 4,
    held_out: int = 12,
) -> dict[str, Any]:
    """Mean cosine of sentence embeddings to those of the model's own attention, before and after."""
    train, validation = load_data(DataConfig(source=data))
    loaded = load(model, attention=HEDGEHOG, kind="any", dtype="float32", seed=seed)
    swapped: Any = loaded.model
    batches = batches_of(swapped, loaded.tokenizer, train, length, batch_size, steps, seed)
    measured = batches_of(swapped, loaded.tokenizer, validation, length, batch_size, held_out, seed)
    before, began = _cosine(swapped, measured), time.process_time()
    report = ap.transfer_attention(swapped, batches, steps, held_out=measured, seed=seed, progress=False)
    return {
        "cosine before": before,
        "cosine": _cosine(swapped, measured),
        "error before": report.before,
        "error": report.after,
        "CPU seconds": time.process_time() - began,
    }


def _forward_seconds(model: Any, batch: dict[str, torch.Tensor], times: int = 3) -> float:
    """CPU time of a forward pass of the model with its own attention, its head too, in bfloat16 by autocast."""
    taken = []
    with own_attention(model), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(times + 1):  # the first is not counted
            began = time.process_time()
            model(**batch, use_cache=False)
            taken.append(time.process_time() - began)
    return min(taken[1:])


def _cosine(model: Any, batches: Batches) -> float:
    with own_attention(model):
        own = _embeddings(model, batches)
    return float((own * _embeddings(model, batches)).sum(-1).mean())


@torch.no_grad()
def _embeddings(model: Any, batches: Batches) -> torch.Tensor:
    means = torch.cat([model(**batch).last_hidden_state.mean(1) for batch in batches])
    return torch.nn.functional.normalize(means, dim=-1)


def _means(errors: dict[str, list[float] | None]) -> list[float]:
    return [_mean(of_heads) for of_heads in errors.values() if of_heads is not None]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


PARTS = {"decoder": decoder, "encoder": encoder}


def measure(seed: int = 0, parts: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Figures of the decoder and of the encoder."""
    return {part: PARTS[part](seed) for part in parts or PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: both")
    parser.add_argument("--seed", type=int, default=0, help="of new weights and the order of the text")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tf.utils.logging.disable_progress_bar()
    results = Results(args.out)
    for part in args.parts or PARTS:
        settings = {"part": part, "seed": args.seed}
        record = {"key": hash_of(settings), "status": "ok", "settings": settings}
        if results.done(record["key"]):
            continue
        print(f"{part}, seed {args.seed}", flush=True)
        record |= {"result": PARTS[part](args.seed), "versions": versions()}
        results.add(record)
        print("  ", json.dumps(record["result"]), flush=True)


if __name__ == "__main__":
    main()
