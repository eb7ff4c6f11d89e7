"""What fine-tuning does to the recall of a swapped decoder, by what is trained of it.

    python examples/transfer/finetune_recall.py                     all attentions, all targets, seeds 0 to 2
    python examples/transfer/finetune_recall.py --seeds 0 heads "every fourth layer"

Share of a pass key and of a copied passage that is right at 1024 tokens, and perplexity of Python's documentation
(held-out topics, blocks of 512 tokens), before and after a few steps of LoRA, or of the new weights alone, on blocks of
512 tokens. The model computes in bfloat16 by autocast, weights that train are float32. Attentions with weights have had
attention transfer first, once, in --work. A line of JSON for each run goes to --out as it is measured; a run that was
stopped goes on where it was.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import attn_plugins as ap
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.versions import versions
from attn_plugins.core.options import build
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.data.text import token_blocks
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import load

WORK = Path("runs/finetune_recall")
OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "transfer" / "finetune_recall.jsonl"

WINDOW: dict[str, Any] = {"type": "local", "window_size": 64, "num_sink_tokens": 4}
LINEAR_WINDOW: dict[str, Any] = {"type": "linear_window", "window_size": 64, "num_sink_tokens": 4}
LINEAR: dict[str, Any] = {"type": "linear", "feature_map": "hedgehog"}
HEADS = {
    "type": "softmax",
    "kv_heads": {
        **{"0": [0, 1], "7": [2], "8": [0], "10": [1], "14": [1], "15": [2], "17": [0, 1]},
        **{"18": [2], "20": [1, 2], "21": [2], "23": [0, 2], "24": [0]},
    },
}
"""16 of the 90 key/value heads of SmolLM2-135M: those in nearly every choice by contribution at recalled tokens."""

ATTENTIONS: dict[str, Any] = {
    "window, 16 heads full": [HEADS, WINDOW],
    "linear_window, 16 heads full": [HEADS, LINEAR_WINDOW],
    "linear, 16 heads full": [HEADS, LINEAR],
}
WITHOUT_WEIGHTS = ("window, 16 heads full",)
"""In which no weights in slots could train alone."""
ROWS_BESIDE: dict[str, Any] = {
    "dense": None,
    "window alone": WINDOW,
    "linear alone": LINEAR,
    "every fourth layer": {**WINDOW, "layers": [layer for layer in range(30) if layer % 4 != 3]},
}
"""What the ones above have to be read against; measured with the first seed and one of the targets."""

TARGETS: dict[str, Any] = {
    "v, o": ["v_proj", "o_proj"],
    "q, k, v, o": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": "all-linear",
    "new weights": None,
}
"""Of LoRA; None trains the weights in slots alone."""
BESIDE = "q, k, v, o"


class Bench:
    """The model, where taught weights are kept, and sizes."""

    def __init__(
        self,
        work: Path,
        *,
        model: str = "smollm2-135m-demo",
        steps: int = 16,
        learning_rate: float = 2e-3,
        block_size: int = 512,
        distance: int = 1024,
        rows: int = 4,
        blocks: int = 6,
        transfer_steps: int = 25,
        data: dict[str, Any] | None = None,
    ):
        self.work, self.model, self.data = work, model, data or {"source": "python-docs"}
        self.steps, self.learning_rate, self.block_size = steps, learning_rate, block_size
        self.transfer_steps = transfer_steps
        self.evaluation = [
            {"task": "perplexity", "length": block_size, "max_tokens": blocks * block_size},
            {"task": "recall", "distances": [distance], "rows": rows},
        ]
        self.before: dict[str, dict[str, float]] = {}

    def settings(self, attention: str, targets: str, seed: int) -> dict[str, Any]:
        """All that a run's result depends on."""
        own = {name: getattr(self, name) for name in ("model", "steps", "learning_rate", "block_size", "evaluation")}
        chosen = {"rules": {**ATTENTIONS, **ROWS_BESIDE}[attention], "targets": TARGETS[targets], "seed": seed}
        return {**own, **chosen, "data": self.data, "transfer_steps": self.transfer_steps}

    def start(self, attention: str) -> str:
        """Folder of the swapped model, its new weights taught what the model's own attention does; made once."""
        rules = {**ATTENTIONS, **ROWS_BESIDE}[attention]
        folder = self.work / f"start-{hash_of({'model': self.model, 'rules': rules, 'steps': self.transfer_steps})}"
        if not (folder / "ended").exists():
            loaded = load(self.model, attention=rules, dtype="float32")
            if any(row.new_params for row in ap.describe_attention(loaded.model)):
                train, _ = load_data(build(DataConfig, self.data))
                blocks = torch.tensor(token_blocks(train, loaded.tokenizer, self.block_size)["input_ids"][:])
                order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
                batches = [{"input_ids": blocks[number][None]} for number in order[: self.transfer_steps]]
                ap.transfer_attention(loaded.model, batches, self.transfer_steps, body_dtype="bfloat16", progress=False)
            loaded.model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            (folder / "ended").touch()
        return str(folder)


def measure(attention: str, targets: str, seed: int = 0, bench: Bench | None = None) -> dict[str, Any]:
    """Figures before and after a fine-tune, and what it cost."""
    bench = bench or Bench(WORK)
    out = bench.work / "run"
    shutil.rmtree(out, ignore_errors=True)
    new = TARGETS[targets] is None
    lora = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS[targets]}
    training = {
        "max_steps": bench.steps,
        "per_device_train_batch_size": 1,
        "learning_rate": bench.learning_rate,
        "warmup_steps": 2,
        "save_strategy": "no",
        "bf16": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    tree = {
        "model": bench.start(attention),
        "data": bench.data,
        "output_dir": str(out),
        "tune": "new" if new else "lora",
        **({} if new else {"lora": lora}),
        "training": training,
        "block_size": bench.block_size,
        "evaluation": bench.evaluation,
        "recall": False,
        "seed": seed,
    }
    run = prepare_finetune(build(FinetuneConfig, tree), quiet=True)
    if attention not in bench.before:
        bench.before[attention] = figures(run)
    cpu, started = time.process_time(), time.perf_counter()
    output = run.trainer.train()
    cost = {"cpu": round(time.process_time() - cpu, 1), "seconds": round(time.perf_counter() - started, 1)}
    return {"before": bench.before[attention], "after": figures(run), "train loss": output.training_loss, **cost}


@torch.no_grad()
def figures(run: Any) -> dict[str, float]:
    """Perplexity and the shares that are recalled, of the model as it is now; not of its attention's branches."""
    model, found = run.trainer.model.eval(), {}
    for measurement in run.measurements:
        sums: dict[str, torch.Tensor] = {}
        for batch in measurement.batches:
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                scored = measurement.task.score(model, {name: x.to(model.device) for name, x in batch.items()})
            sums = {name: sums.get(name, 0) + value.double().cpu() for name, value in scored.items()}
        found[measurement.task.name] = measurement.task.finish(sums)
    recalled = {part: its["accuracy"] for part, its in found["recall"]["by_part"].items()}
    return {"perplexity": found["perplexity"]["perplexity"], **recalled, "recall loss": found["recall"]["loss"]}


def runs(seeds: list[int]) -> list[tuple[str, str, int]]:
    """(attention, targets, seed) of all runs, seed by seed, so that a run that is stopped has whole tables."""
    beside = [(attention, BESIDE, seeds[0]) for attention in ROWS_BESIDE]
    every = [
        (attention, targets, seed)
        for seed in seeds
        for attention in ATTENTIONS
        for targets, trained in TARGETS.items()
        if trained is not None or attention not in WITHOUT_WEIGHTS
    ]
    first = len(every) // len(seeds)
    return [*every[:first], *beside, *every[first:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attentions", nargs="*", help=f"of {', '.join([*ATTENTIONS, *ROWS_BESIDE])}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of LoRA and the order of the text")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--work", type=Path, default=WORK, help="where taught models are kept")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tf.utils.logging.disable_progress_bar()
    bench, results = Bench(args.work, steps=args.steps, learning_rate=args.learning_rate), Results(args.out)
    wanted = [run for run in runs(args.seeds) if not args.attentions or run[0] in args.attentions]
    for number, (attention, targets, seed) in enumerate(wanted, 1):
        settings = bench.settings(attention, targets, seed)
        labels = {"attention": attention, "targets": targets, "seed": seed}
        record: dict[str, Any] = {"key": hash_of(settings), **labels, "settings": settings, "versions": versions()}
        if results.done(record["key"]):
            continue
        results.add({**record, "status": "ok", "result": measure(attention, targets, seed, bench)})
        print(f"[{number}/{len(wanted)}] {labels}", json.dumps(results.records[record["key"]]["result"]), flush=True)


if __name__ == "__main__":
    main()
