"""Generation with a long context behind it: time of a token and size of the cache, against the dense model.

What is timed is one token through a whole model that has its context in a cache. An attention is timed at a context, at
the shortest of the contexts, and the dense model beside it, all in the same rounds, so that a machine that slows down
slows all of them; what counts is the ratios within a round: to the dense model, and to the own time at the shortest.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attn_plugins.benchmark.cost import timing
from attn_plugins.benchmark.cost.kernels import DTYPES, check_place
from attn_plugins.benchmark.cost.timing import Workload
from attn_plugins.benchmark.results.cells import described, run_cells
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.output import check_folder
from attn_plugins.core.decode_state import State
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.rules import parse_rules
from attn_plugins.hf.caches.cache_layers import cache_bytes
from attn_plugins.hf.caches.state_layer import StateLayer
from attn_plugins.hf.names import slot_of
from attn_plugins.hf.split import states_in
from attn_plugins.hf.swap import describe_attention, swap_attention
from attn_plugins.training.models import load, read_attention, skeleton

FORMAT = 1
"""Workload of every cell's key: raise it when a measurement changes its meaning."""

VOCABULARY = 1024

DENSE = ""
"""Stands for the model's own attention where others have their label."""

HYBRID = {"layers": ["every:4", "every:4+1", "every:4+2"]}
WINDOW = {"type": "local", "window_size": 512, "num_sink_tokens": 4}


def _usual() -> dict[str, Any]:
    return {
        "dense": None,
        "local, 512 + 4 sinks": WINDOW,
        "linear, elu": {"type": "linear", "feature_map": "elu"},
        "linear, hedgehog": {"type": "linear", "feature_map": "hedgehog"},
        "linear_window": "linear_window",
        "block_topk": "block_topk",
        "local, every 4th dense": [{**WINDOW, **HYBRID}],
    }


@dataclass(frozen=True, kw_only=True)
class SmallLlama:
    """A Llama with random weights: what a token costs does not depend on them."""

    num_layers: int = 4
    hidden_size: int = 512
    num_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 2
    """Key/value heads; num_heads is a multiple of it."""
    head_dim: int = 64

    def __post_init__(self) -> None:
        for shape in dataclasses.fields(self):
            _at_least_one(self, shape.name)
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads={self.num_heads}; allowed: a multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}; allowed: even numbers, for rotary positions")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Which attentions with which contexts, in which model."""

    output_dir: str = "runs/bench/decode"
    """Where results.jsonl, report.md and the plots go."""
    model: SmallLlama | str = field(default_factory=SmallLlama)
    """The shape of a small Llama with random weights, or a folder, a name on the hub, or "smollm2-135m-demo"."""
    attentions: dict[str, Any] = field(default_factory=_usual)
    """Label -> rules, a YAML file of rules, or null for the model's own attention."""
    contexts: list[int] = field(default_factory=lambda: [1024, 4096, 16384, 65536, 131072])
    """Tokens in the cache when the timed ones come."""
    batch_size: int = 1
    """Rows that generate together."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "cpu"
    """cpu, cuda, or another that torch knows."""
    rounds: int = 10
    """Rounds of timing; each runs every contender once."""
    tokens: int = 8
    """Tokens that a contender generates in a round; all of them lengthen the context."""
    together: int = 8
    """Attentions that share rounds with one run of the dense model, and are in memory at the same time."""
    chunk: int = 2048
    """Tokens that a state takes in at a time while the context is put into the cache."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds", "tokens", "together", "chunk"):
            _at_least_one(self, name)
        if not self.contexts or min(self.contexts) < 1:
            raise ValueError(f"contexts={self.contexts}; allowed: at least one, each at least 1")
        if not self.attentions:
            raise ValueError("attentions is empty; at least one is needed")
        check_place(self.dtype, self.device)
        rules = {}
        for label, value in self.attentions.items():
            try:
                read = read_attention(value)
                # Every option spelled out, so that a default that changes some day changes the cell's key.
                rules[label] = read if read is None else [rule.to_dict() for rule in parse_rules(read)]
            except ValueError as error:
                raise ValueError(f"attentions.{label}: {error}") from None
        object.__setattr__(self, "attentions", rules)

    @property
    def first(self) -> int:
        """The shortest context, which the others' times are compared with."""
        return min(self.contexts)


def _at_least_one(config: Any, name: str) -> None:
    if getattr(config, name) < 1:
        raise ValueError(f"{name}={getattr(config, name)}; allowed: at least 1")


@dataclass(frozen=True, kw_only=True)
class DecodeCell:
    """One attention with one context."""

    label: str
    rules: list[dict[str, Any]] | None
    context: int
    settings: dict[str, Any]
    """All that the result depends on; the label is not in it."""

    @property
    def key(self) -> str:
        """Hash of all that the result depends on."""
        return hash_of({"format": FORMAT, "measure": "decode", **self.settings})

    @property
    def labels(self) -> dict[str, Any]:
        return {"measure": "decode", "label": self.label}

    def __str__(self) -> str:
        return f"{self.label} · {self.context}"


def decode_cells(config: DecodeConfig) -> Iterator[list[DecodeCell]]:
    """The cells in groups that share rounds, all with the same context."""
    model = config.model if isinstance(config.model, str) else dataclasses.asdict(config.model)
    how = {name: getattr(config, name) for name in ("batch_size", "dtype", "device", "rounds", "tokens", "chunk")}
    for context in sorted(set(config.contexts)):
        found = [
            DecodeCell(
                label=label,
                rules=rules,
                context=context,
                settings={"model": model, "rules": rules, "context": context, "first": config.first, **how},
            )
            for label, rules in config.attentions.items()
        ]
        for start in range(0, len(found), config.together):
            yield found[start : start + config.together]


def prepare_decode(config: DecodeConfig) -> Results:
    """What an earlier run of the same benchmark has left, once it is clear that this one can start.

    Raises:
        ValueError: there is no such model, output_dir cannot be written, or results.jsonl is not one.
    """
    if isinstance(config.model, str):
        skeleton(config.model)
    return Results(check_folder(config.output_dir) / "results.jsonl")


def run_decode(
    config: DecodeConfig, results: Results, *, fresh: bool = False, say: Callable[[str], None] = print
) -> None:
    """Measure all cells that have no result of these versions yet, and add theirs to ``results``, group by group.

    An attention that fails is recorded with its error, and the others go on.

    Args:
        fresh: measure all cells, whatever has been written before.
        say: gets a line of progress at a time.

    Raises:
        ValueError: another run is measuring into the same file.
    """

    def note(cell: DecodeCell, result: dict[str, Any]) -> str:
        return _note(cell, config.first, result)

    run_cells(decode_cells(config), results, lambda group: _measure(config, group), note, fresh=fresh, say=say)


def _measure(config: DecodeConfig, group: list[DecodeCell]) -> Iterator[tuple[DecodeCell, dict[str, Any]]]:
    """The outcomes of cells that share rounds, timed all together, beside the dense model."""
    here, first = group[0].context, config.first
    contexts = sorted({here, first})
    ready: dict[tuple[int, str], list[Workload]] = {}
    bytes_of: dict[tuple[int, str], int] = {}
    errors: dict[str, str] = {}
    for label, rules in [(DENSE, None), *((cell.label, cell.rules) for cell in group if cell.rules is not None)]:
        try:
            model = build_model(config, rules)
            runs = {}
            for context in contexts:
                cache = filled_cache(model, context, config.batch_size, config.chunk)
                bytes_of[context, label] = cache_bytes(cache)
                runs[context, label] = [Workload(run=decoding(model, cache, config.tokens, config.batch_size), count=1)]
                runs[context, label][0].run()
            ready |= runs
        except Exception as error:  # what one attention cannot do must not end the others' measurement
            errors[label] = described(error)
            if label == DENSE:
                break
    # Two runs of one model don't follow each other where there are others: each finds the processor's caches cold.
    ready = {place: ready[place] for place in sorted(ready, key=lambda place: place[0])}
    seconds = timing.interleaved(ready, config.rounds, torch.device(config.device)) if ready else {}
    for cell in group:
        label = DENSE if cell.rules is None else cell.label
        if DENSE in errors or label in errors:
            text = f"the dense model: {errors[DENSE]}" if DENSE in errors and label != DENSE else errors[label]
            yield cell, {"status": "error", "error": text}
            continue
        own, dense, before = (here, label), (here, DENSE), (first, label)
        result = timing.compared(seconds[own], seconds[dense])
        times = {"seconds": result.pop("seconds") / config.tokens}
        times["baseline_seconds"] = result.pop("baseline_seconds") / config.tokens
        growth = timing.compared(seconds[before], seconds[own])  # of the shortest context, beside this one
        grown = {
            "first_seconds": growth["seconds"] / config.tokens,
            "growth": growth["times_as_fast"],
            "growth_lowest": growth["lowest"],
            "growth_highest": growth["highest"],
        }
        sizes = {"bytes": bytes_of[own], "baseline_bytes": bytes_of[dense], "first_bytes": bytes_of[before]}
        yield cell, {"status": "ok", "result": {**times, **result, **grown, **sizes}}


def _note(cell: DecodeCell, first: int, result: dict[str, Any]) -> str:
    ratio = f"{result['times_as_fast']:.2f}x ({result['lowest']:.2f} to {result['highest']:.2f})"
    text = f"{result['seconds'] * 1000:.2f} ms a token, {ratio}"
    if cell.context != first:
        text += f", {result['growth']:.2f} times its time at {first}"
    return f"{text}, {result['bytes']:,} bytes"


def build_model(config: DecodeConfig, rules: list[dict[str, Any]] | None) -> Any:
    """The model of a benchmark with an attention, ready to generate."""
    model: Any
    if isinstance(config.model, str):
        model = load(config.model, attention=rules, dtype=config.dtype).model  # type: ignore[arg-type]
    else:
        shape = config.model
        made = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.hidden_size,
            intermediate_size=8 * shape.hidden_size // 3,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=2 * max(config.contexts),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(made)
            if rules is not None:
                swap_attention(model, rules)
    return model.to(config.device, DTYPES[config.dtype]).eval()


@torch.no_grad()
def filled_cache(model: Any, tokens: int, batch_size: int, chunk: int) -> DynamicCache:
    """A stock cache with a context in it: one token that went through the model, and random keys and values after it.

    Neither time nor size depends on what is in a cache, and a dense prefill of 131072 tokens would take longer than all
    the rest. Ordinary layers are given keys and values as they keep them. Layers with a state are given them through
    their own attention, piece by piece, as a prefill does, so that the state is what it is after so many tokens.

    Raises:
        ValueError: a layer of the cache is of a kind that is not known.
    """
    cache = DynamicCache(config=model.config)
    _step(model, cache, batch_size)
    modules = [model.get_submodule(row.path) for row in describe_attention(model)]
    slots = {module.layer_idx: slot_of(module) for module in modules if getattr(module, "layer_idx", None) is not None}
    generator = torch.Generator().manual_seed(0)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if isinstance(layer, StateLayer):
            for slot, state in states_in(slots[index], layer.state):
                if slot is None:
                    state.append(*_random_like([state.tensors["k"], state.tensors["v"]], tokens - 1, generator))
                else:
                    _feed(slot, state, model, tokens - 1, batch_size, chunk, generator)
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layer.update(*_random_like([layer.keys, layer.values], tokens - 1, generator))
        else:
            raise ValueError(
                f"layer {index} of the cache is a {type(layer).__name__}; allowed: states of attentions, "
                "DynamicLayer, DynamicSlidingWindowLayer"
            )
    return cache


def _feed(
    slot: Any, state: State, model: Any, tokens: int, batch_size: int, chunk: int, generator: torch.Generator
) -> None:
    """Have a state take in random tokens through its attention, a chunk at a time."""
    heads = slot.heads
    sizes = {"q": (heads.num_heads, heads.head_dim), "k": (heads.num_key_value_heads, heads.head_dim)}
    sizes["v"] = (heads.num_key_value_heads, heads.value_dim)
    for start in range(0, tokens, chunk):
        number = min(chunk, tokens - start)
        q, k, v = (
            torch.randn(batch_size, number, count, size, generator=generator).to(model.device, model.dtype)
            for count, size in sizes.values()
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = AttentionMask(batch_size, number, state.seen + number, causal=True, device=model.device)
        slot(q, k, v, mask=mask, scale=heads.head_dim**-0.5, state=state)


def _random_like(tensors: list[torch.Tensor], tokens: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Keys or values (B, G, tokens, D) of the sizes that a cache holds already."""
    shapes = [(*x.shape[:2], tokens, x.shape[3]) for x in tensors]
    return [
        torch.randn(size, generator=generator).to(x.device, x.dtype) for size, x in zip(shapes, tensors, strict=True)
    ]


def decoding(model: Any, cache: DynamicCache, tokens: int, batch_size: int) -> Callable[[], None]:
    """A run that generates so many tokens more, each of which the cache keeps."""

    def run() -> None:
        for _ in range(tokens):
            _step(model, cache, batch_size)

    return run


@torch.no_grad()
def _step(model: Any, cache: DynamicCache, batch_size: int) -> None:
    """One more token, as generate() without padding has it."""
    model(input_ids=torch.ones(batch_size, 1, dtype=torch.long, device=model.device), past_key_values=cache)
