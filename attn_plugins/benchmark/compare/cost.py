"""What a whole model costs with an attention: its cache, a token that it writes, a step of training, and on paper."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from attn_plugins.benchmark.cost import timing
from attn_plugins.benchmark.cost.decode import decoding, filled_cache
from attn_plugins.benchmark.cost.energy import joules
from attn_plugins.benchmark.cost.roofline import DEVICES, KERNELS, flash, least_seconds, takes
from attn_plugins.benchmark.cost.timing import Workload
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.rules import Rule
from attn_plugins.hf import adapters
from attn_plugins.hf.caches.cache_layers import cache_bytes
from attn_plugins.hf.discovery import heads as head_sizes
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.names import slot_of
from attn_plugins.hf.split import Heads, parts_of

What = Literal["cache", "decode", "step", "paper"]

LABELLED = ("causal-lm", "masked-lm", "causal-tokens")
"""Kinds of models that are trained on a label a token."""

CHUNK = 2048
"""Tokens that a state takes in at a time while a cache is filled."""


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Which costs of whole models at which lengths."""

    lengths: list[int]
    """Tokens of a row of a training step, and tokens in the cache before those that are timed."""
    what: list[What] = field(default_factory=lambda: list(get_args(What)))
    """cache: bytes of a row's. decode: a token, with its context in the cache. step: forward, backward and AdamW of all
    weights. paper: launches of the attention layers of a step in their batched form, and the least time of a GPU for
    these layers, in bfloat16."""
    batch_size: int = 1
    """Rows of a step, and rows that generate together."""
    rounds: int = 3
    """Rounds of timing; each runs the attention and the baseline once."""
    tokens: int = 8
    """Tokens that are generated in a round."""
    gpu: str = "h100"
    """Whose published rates the least time is by: a100, h100, h200, b200."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least 1")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths={self.lengths}; allowed: at least one, each at least 2")
        if not self.what:
            raise ValueError(f"what is empty; allowed: any of {', '.join(get_args(What))}")
        if self.gpu not in DEVICES:
            raise ValueError(f"gpu={self.gpu!r}; allowed: {', '.join(DEVICES)}")

    def settings(self, what: What, baseline: Any, kind: str) -> dict[str, Any]:
        """What the result of one of them depends on, lengths and models aside.

        Args:
            baseline: rules of the attention that times are compared with.
            kind: of model.
        """
        asked: dict[What, tuple[str, ...]] = {
            "cache": (),
            "decode": ("batch_size", "rounds", "tokens"),
            "step": ("batch_size", "rounds"),
            "paper": ("batch_size", "gpu"),
        }
        found = {"batch_size": 1, "what": what} | {name: getattr(self, name) for name in asked[what]}
        timed = {"baseline": baseline} if what in ("decode", "step") else {}
        return found | timed | ({"kind": kind} if what == "step" else {})


def bytes_of_cache(model: Any, tokens: int) -> int:
    """Of one row after so many tokens: what the layers and states of a stock cache hold then."""
    return cache_bytes(filled_cache(model, tokens, 1, CHUNK))


def decode(own: Any, base: Any, length: int, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Time of a token after ``length`` others beside the baseline's, and its joules where the device tells."""
    tokens, rows = settings["tokens"], settings["batch_size"]
    contenders = {
        name: decoding(model, filled_cache(model, length, rows, CHUNK), tokens, rows)
        for name, model in (("baseline", base), ("own", own))
    }
    found = _compared(contenders, settings["rounds"], device)
    per_round = ("seconds", "baseline_seconds", "joules", "baseline_joules")
    return {name: value / tokens if name in per_round else value for name, value in found.items()}


def step(own: Any, base: Any, input_ids: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Time and peak memory of a whole training step, and its energy, beside the baseline's."""
    if settings["kind"] not in LABELLED:
        raise ValueError(f"a step is timed of {', '.join(LABELLED)} models, and this is for {settings['kind']} models")
    contenders = {name: training_step(model, input_ids) for name, model in (("baseline", base), ("own", own))}
    device = input_ids.device
    found = _compared(contenders, settings["rounds"], device)
    if device.type in timing.MEMORY:
        found["peak_bytes"] = timing.peak_bytes([Workload(run=contenders["own"], count=1)], device)
    return found


def training_step(model: Any, input_ids: torch.Tensor) -> Callable[[], None]:
    """Forward, loss, backward and AdamW of all weights, which a learning rate of 0 leaves as they are."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    no_cache = timing.no_cache(model)

    def run() -> None:
        model(input_ids=input_ids, labels=input_ids, **no_cache).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _compared(contenders: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, Any]:
    work = {name: [Workload(run=run, count=1)] for name, run in contenders.items()}
    seconds = timing.interleaved(work, rounds, device)
    found: dict[str, Any] = timing.compared(seconds["own"], seconds["baseline"])
    energy = {"joules": joules(contenders["own"], device), "baseline_joules": joules(contenders["baseline"], device)}
    return found | {name: value for name, value in energy.items() if value is not None}


def on_paper(model: Any, length: int, gpu: str, batch_size: int = 1) -> dict[str, Any]:
    """Launches of the causal attention layers of a forward and a backward pass, and the least time that they take.

    Layers and heads with the model's own attention count as causal flash attention.

    Raises:
        ValueError: no layer of the model is causal.
    """
    alike: Counter[tuple[Any, HeadShape]] = Counter()
    for target in discovery.targets(model):
        if target.role != "decoder":
            continue
        module: Any = model.get_submodule(target.path)
        shape = head_sizes.head_shape(adapters.adapted(module), getattr(module, "config", model.config))
        for part in parts_of(slot_of(module)):
            heads = dataclasses.replace(shape, layer=0)
            if part.kv_heads is not None:
                group = heads.num_heads // heads.num_key_value_heads
                heads = Heads(part.kv_heads, group).shape(heads) or heads
            slot = part.attention
            rule = None if slot is None else Rule(type=slot.name, config=slot.config)
            alike[rule, heads] += 1
    if not alike:
        raise ValueError(f"{type(model).__name__} has no causal self-attention, which this is counted for")
    launches, seconds = 0, 0.0
    for (rule, heads), number in alike.items():
        if rule is None:
            started, takes_s = KERNELS, takes(flash(heads, length, batch_size, [gpu]), gpu)
        else:
            started, takes_s = least_seconds(rule, heads, length, batch_size, gpu)
        launches += number * started
        seconds += number * takes_s
    return {"launches": launches, "least_seconds": seconds, "gpu": gpu}
