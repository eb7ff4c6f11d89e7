"""Whole training steps of a model of SmolLM2-135M's sizes, random weights and tokens: dense, and under attentions."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attn_plugins.benchmark.cost.timing import seconds_of
from attn_plugins.benchmark.results.cells import described
from attn_plugins.core.backend import list_backends
from attn_plugins.hf.swap import swap_attention

RULES: tuple[dict[str, Any] | None, ...] = (
    None,
    {"type": "local", "window_size": 256, "num_sink_tokens": 4},
    {"type": "linear"},
    {"type": "gated_delta"},
    {"type": "block_topk"},
)
"""What is trained: None is the dense model, with torch's own attention."""
LENGTHS = (8192, 32768)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of the model; the defaults are those of SmolLM2-135M."""

    layers: int = 30
    hidden_size: int = 576
    heads: int = 9
    key_value_heads: int = 3
    intermediate_size: int = 1536
    vocabulary: int = 49152


@dataclass(frozen=True)
class Step:
    """What is trained, by which form or backend, on how many tokens."""

    rule: dict[str, Any] | None
    backend: str
    length: int

    def __str__(self) -> str:
        return f"{'dense' if self.rule is None else self.rule['type']} by {self.backend}, {self.length}"

    @property
    def labels(self) -> dict[str, Any]:
        return {"rule": self.rule, "backend": self.backend, "length": self.length}


def training_steps(lengths: Sequence[int] = LENGTHS) -> list[Step]:
    """Every rule by its batched form and by every backend, whether it serves it or not, the shorter lengths first."""
    return [
        Step(rule, backend, length)
        for length in sorted(lengths)
        for rule in RULES
        for backend in (["sdpa"] if rule is None else ["batched", *list_backends()])
    ]


def training_record(
    what: Step, device: str, *, shape: ModelShape = ModelShape(), steps: int = 3
) -> Iterator[dict[str, Any]]:
    """Time and peak memory of a step: forward, loss, backward and AdamW, of one row.

    Under autocast in bfloat16, with weights in float32. Where memory does not suffice, the layers are checkpointed.

    Args:
        steps: that are timed, after one that is not; their median counts.
    """
    record: dict[str, Any] = {"part": "training", **what.labels}
    started = time.perf_counter()
    for checkpointed in (False, True):
        record["checkpointed"] = checkpointed
        try:
            record |= _measured(what, device, shape, steps, checkpointed=checkpointed)
            record.pop("error", None)
            break
        except ValueError as error:
            record["refused"] = str(error)
            break
        except torch.OutOfMemoryError as error:
            record["error"] = described(error)[:300]
        except Exception as error:  # kernels of others fail with whatever they like
            record["error"] = described(error)[:500]
            break
        finally:
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
    yield {**record, "took": round(time.perf_counter() - started, 2)}


def _measured(what: Step, device: str, shape: ModelShape, steps: int, *, checkpointed: bool) -> dict[str, Any]:
    place = torch.device(device)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=max(what.length, 8192),
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]), place:
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        if what.rule is not None:
            swap_attention(model, [{**what.rule, "backend": what.backend}])
        tokens = torch.randint(shape.vocabulary, (1, what.length))
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=place.type == "cuda")
    losses: list[torch.Tensor] = []

    def step() -> None:
        with torch.autocast(place.type, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    first = seconds_of(step, place)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(seconds_of(step, place) for _ in range(steps))
    peak = torch.cuda.max_memory_allocated() if place.type == "cuda" else None
    found = {"seconds": seconds, "first_seconds": round(first, 3), "bytes": peak}
    return {**found, "losses": [round(loss.item(), 4) for loss in losses]}
