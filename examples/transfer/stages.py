"""What each stage brings: attention transfer, distillation and LoRA on a pretrained decoder, one after the other.

    python examples/transfer/stages.py                              all stages, seed 0
    python examples/transfer/stages.py --seed 1 linear local        the stages of these attentions

Perplexity of Python's documentation (held-out topics, 12 blocks of 512 tokens) and what the model recalls of the
beginning of a row, after each stage; all of it in float32. A stage starts from what the one before left in --work. A
line of JSON for each goes to --out as it is measured; a run that was stopped goes on where it was.
"""

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file

import attn_plugins as ap
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.versions import versions
from attn_plugins.core.options import build
from attn_plugins.data.sources import DataConfig, load_data
from attn_plugins.data.text import token_blocks
from attn_plugins.tasks import get_task, run_task
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import prepare_finetune
from attn_plugins.training.models import AS_SAVED, load

WORK = Path("runs/transfer_stages")
OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "transfer" / "stages.jsonl"

LINEAR = {"type": "linear", "feature_map": "hedgehog"}
CHOSEN = [1, 2, 9, 10, 11, 13, 16]
"""Layers whose own attention brings the logits nearest to the model's, where all others are linear: score "kl"."""
EVERY_FOURTH = list(range(3, 30, 4))


def all_but(layers: list[int]) -> dict[str, Any]:
    return {**LINEAR, "layers": [layer for layer in range(30) if layer not in layers]}


ATTENTIONS: dict[str, Any] = {
    "linear": LINEAR,
    "linear in 23, 7 chosen": all_but(CHOSEN),
    "linear in 23, every fourth": all_but(EVERY_FOURTH),
    "linear_window": {"type": "linear_window", "window_size": 64, "num_sink_tokens": 4},
    "local": {"type": "local", "window_size": 64, "num_sink_tokens": 4},
}

RANK = {"r": 8, "lora_alpha": 16}
LORA: dict[str, dict[str, Any]] = {
    "lora": {**RANK, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "lora in all layers": {**RANK, "target_modules": "all-linear"},
}
"""What a stage does -> LoRA's options."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is done to a model, and to what it is done."""

    attention: str
    does: str
    """untrained, transfer, one of LORA (with the language model's loss), or kl (on new weights alone)."""
    steps: int = 0
    after: "Stage | None" = None

    def __str__(self) -> str:
        before = self.attention if self.after is None or self.after.does == "untrained" else str(self.after)
        return f"{before}, untrained" if self.does == "untrained" else f"{before} + {self.steps} {self.does}"

    def settings(self) -> dict[str, Any]:
        """All that its result depends on, the stages before too."""
        own: dict[str, Any] = {"attention": ATTENTIONS[self.attention], "does": self.does, "steps": self.steps}
        return own | ({} if self.after is None else {"after": self.after.settings()})


def _stages() -> list[Stage]:
    stages = []
    for attention, transfer in (("linear", 50), ("linear in 23, 7 chosen", 100), ("linear in 23, every fourth", 100)):
        start = Stage(attention=attention, does="untrained")
        taught = Stage(attention=attention, does="transfer", steps=transfer, after=start)
        stages += [start, taught, Stage(attention=attention, does="lora", steps=16, after=taught)]
    taught = stages[1]
    stages += [Stage(attention="linear", does=does, steps=64, after=taught) for does in LORA]
    stages += [Stage(attention="linear", does="kl", steps=16, after=taught)]
    longer = Stage(attention="linear", does="transfer", steps=100, after=stages[0])
    stages += [longer, Stage(attention="linear", does="lora", steps=64, after=longer)]
    start = Stage(attention="linear_window", does="untrained")
    taught = Stage(attention="linear_window", does="transfer", steps=25, after=start)
    stages += [start, taught]
    stages += [Stage(attention="linear_window", does=does, steps=16, after=taught) for does in ("lora", "kl")]
    start = Stage(attention="local", does="untrained")
    return [*stages, start, Stage(attention="local", does="lora", steps=16, after=start)]


STAGES = _stages()


class Bench:
    """Where stages leave their models, and what they are measured on."""

    def __init__(
        self,
        work: Path,
        seed: int = 0,
        *,
        model: str = "smollm2-135m-demo",
        length: int = 512,
        blocks: int = 12,
        rows: int = 6,
    ):
        self.work, self.seed, self.model, self.length = work / f"seed{seed}", seed, model, length
        self.settings = {"model": model, "length": length, "blocks": blocks, "rows": rows, "seed": seed}
        self.train, held_out = load_data(DataConfig(source="python-docs"))
        loaded = load(model)
        self.tokenizer, self.base = loaded.tokenizer, load_file(Path(loaded.source) / "model.safetensors")
        options: dict[str, Any] = {"perplexity": {"length": length, "max_tokens": blocks * length}}
        if rows:
            options["recall"] = {"distances": [length], "rows": rows}
        tasks = [get_task(name)(get_task(name).Config(**its)) for name, its in options.items()]
        self.tasks = [(task, task.prepare(held_out, self.tokenizer, loaded.model)) for task in tasks]

    def folder(self, stage: Stage) -> Path:
        return self.work / hash_of(stage.settings())

    def run(self, stage: Stage) -> dict[str, Any]:
        """Figures of a stage; the ones before it are run again where their folders are gone."""
        if stage.after is not None and not (self.folder(stage.after) / "ended").exists():
            self.run(stage.after)
        began, cpu = time.perf_counter(), time.process_time()
        told = getattr(self, f"_{'finetune' if stage.does in (*LORA, 'kl') else stage.does}")(stage)
        told |= {"seconds": round(time.perf_counter() - began, 1), "cpu": round(time.process_time() - cpu, 1)}
        loaded = load(str(self.folder(stage)), dtype="float32")
        for task, batches in self.tasks:
            found = run_task(task, loaded.model, batches, progress=f"{stage}: {task.name}")
            told |= {task.name: found[task.metric]} | {
                part: its[task.metric] for part, its in found.get("by_part", {}).items()
            }
        if stage.does in ("transfer", "kl"):
            told["pretrained weights unchanged"] = self._unchanged(self.folder(stage))
        (self.folder(stage) / "ended").touch()
        return told

    def _untrained(self, stage: Stage) -> dict[str, Any]:
        loaded = load(self.model, attention=ATTENTIONS[stage.attention], dtype="float32", seed=self.seed)
        return self._save(stage, loaded)

    def _transfer(self, stage: Stage) -> dict[str, Any]:
        assert stage.after is not None
        loaded = load(str(self.folder(stage.after)), dtype="float32")
        blocks = torch.tensor(token_blocks(self.train, self.tokenizer, self.length)["input_ids"][:])
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(self.seed))[: stage.steps]
        batches = [{"input_ids": blocks[number][None]} for number in order]
        report = ap.transfer_attention(loaded.model, batches, stage.steps, body_dtype="bfloat16", seed=self.seed)
        told = {"error before": report.before, "error": report.after, "seconds of steps": report.seconds}
        return self._save(stage, loaded) | told

    def _save(self, stage: Stage, loaded: Any) -> dict[str, Any]:
        loaded.model.save_pretrained(self.folder(stage))
        self.tokenizer.save_pretrained(self.folder(stage))
        return {}

    def _finetune(self, stage: Stage) -> dict[str, Any]:
        assert stage.after is not None
        out = self.folder(stage)
        shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
        distils = stage.does == "kl"
        training = {
            "max_steps": stage.steps,
            "per_device_train_batch_size": 1,
            "warmup_steps": 2,
            "save_strategy": "no",
        }
        tree = {
            "model": str(self.folder(stage.after)),
            "attention": AS_SAVED,
            "data": {"source": "python-docs"},
            "output_dir": str(out),
            "block_size": self.length,
            **({"tune": "new", "loss": "kl"} if distils else {"tune": "lora", "lora": LORA[stage.does]}),
            "training": {**training, "learning_rate": 5e-3 if distils else 2e-3, "save_strategy": "no"},
            "evaluation": {"length": self.length, "max_tokens": self.length},
            "recall": False,
            "seed": self.seed,
        }
        metrics = prepare_finetune(build(FinetuneConfig, tree)).run(None)
        return {"train loss": metrics["train"]["loss"], "seconds of steps": metrics["train"]["seconds"]}

    def _unchanged(self, folder: Path) -> bool:
        """Whether all pretrained weights are bit for bit what they were."""
        saved = load_file(folder / "model.safetensors")
        return all(torch.equal(saved[name].to(weight.dtype), weight) for name, weight in self.base.items())


def measure(seed: int = 0, bench: Bench | None = None) -> dict[str, dict[str, Any]]:
    """Figures of all stages, by their names."""
    bench = bench or Bench(WORK, seed)
    return {str(stage): bench.run(stage) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attentions", nargs="*", help=f"of {', '.join(ATTENTIONS)}; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of new weights, LoRA and the order of the text")
    parser.add_argument("--work", type=Path, default=WORK, help="where models are left")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    tf.utils.logging.disable_progress_bar()
    wanted = [stage for stage in STAGES if not args.attentions or stage.attention in args.attentions]
    bench, results = Bench(args.work, args.seed), Results(args.out)
    for number, stage in enumerate(wanted, 1):
        settings = {**bench.settings, **stage.settings()}
        record = {"key": hash_of(settings), "stage": str(stage), "status": "ok", "settings": settings}
        if results.done(record["key"]):
            continue
        print(f"[{number}/{len(wanted)}] {stage}", flush=True)
        record |= {"result": bench.run(stage), "versions": versions()}
        results.add(record)
        print("     ", json.dumps(record["result"]), flush=True)


if __name__ == "__main__":
    main()
