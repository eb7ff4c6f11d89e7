"""Attentions by themselves, without a model: time and peak memory by length, against torch's own attention.

What is timed is one attention of one layer, mask included, on random queries, keys and values laid out as transformers
lays them out. Contenders take turns with ``scaled_dot_product_attention`` in the same rounds, so that a machine that
slows down slows all of them, and what counts is the ratio within a round. On a CPU that is one thread's; beside it
stands what several threads make of it by the clock.
"""

import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.benchmark.cost import timing
from attn_plugins.benchmark.cost.peers import PEERS, Attend
from attn_plugins.benchmark.cost.timing import Pass, Workload
from attn_plugins.benchmark.results.cells import described, run_cells
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.output import check_folder
from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.core.rules import Rule, parse_rules

FORMAT = 1
"""Workload of every cell's key: raise it when a measurement changes its meaning."""

ALL = "all"
"""In place of a rule: every attention that has none."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_place(dtype: str, device: str) -> None:
    """Raise a ValueError unless tensors of ``dtype`` can be made on ``device``."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Which attentions at which lengths, and the shape of what they get."""

    output_dir: str = "runs/bench"
    """Where results.jsonl, report.md and the plots go."""
    attentions: dict[str, Any] | None = None
    """Label -> a name, or a mapping with type, options and backend; or "all": every attention of which no other label
    has a rule, with its defaults, under its own name. Null is all of them."""
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 8192, 16384])
    """Lengths in tokens."""
    passes: list[Pass] = field(default_factory=lambda: list(typing.get_args(Pass)))
    """forward: without autograd. forward_backward: with gradients to queries, keys, values and the own weights."""
    batch_size: int = 1
    num_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 8
    """Key/value heads; num_heads is a multiple of it."""
    head_dim: int = 64
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "cpu"
    """cpu, cuda, or another that torch knows."""
    rounds: int = 5
    """Rounds of timing; each runs every contender once. 0 measures memory alone."""
    together: int = 4
    """Contenders that share rounds with one run of torch's own attention."""
    wall_threads: int = 2
    """On a CPU, threads of a second series of rounds, by the clock; 0 leaves it out."""
    patience: float = 30.0
    """Seconds. A length at which a pass may take longer, judged by the length before, is left out for a contender."""
    memory: bool = True
    """Measure peak memory too; on CPUs and CUDA."""
    peers: bool = True
    """Measure the attentions of other installed packages too."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "together"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least 1")
        if self.rounds < 0 or (self.rounds == 0 and not self.memory):
            raise ValueError(f"rounds={self.rounds}; allowed: at least 1, or 0 with memory=true")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads={self.num_heads}; allowed: a multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths}; allowed: at least one, each at least 1")
        if not self.passes:
            raise ValueError(f"passes={self.passes}; allowed: at least one of {', '.join(typing.get_args(Pass))}")
        if self.wall_threads < 0:
            raise ValueError(f"wall_threads={self.wall_threads}; allowed: 0 or more")
        if self.patience <= 0:
            raise ValueError(f"patience={self.patience}; allowed: seconds above 0")
        check_place(self.dtype, self.device)
        if self.memory and torch.device(self.device).type not in timing.MEMORY:
            where = " and ".join(timing.MEMORY)
            raise ValueError(f"memory=true with device={self.device!r}; allowed: memory is measured on {where} only")
        contenders(self)

    @property
    def heads(self) -> HeadShape:
        """The heads that every attention serves."""
        return HeadShape(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            hidden_size=self.num_heads * self.head_dim,
            layer=0,
        )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that is measured against torch's own attention, causal or not as it is itself."""

    label: str
    family: str
    causal: bool
    source: dict[str, Any]
    """The rule of an attention, or the peer."""
    build: Callable[[int], Attend]
    """(longest length) -> what runs; raises a ValueError where it cannot serve the shape."""
    by: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], str] | None = None
    """(queries, keys, values) -> name of the form or backend that computes; None for a peer."""


def contenders(config: BenchConfig) -> list[Contender]:
    """Ours by family and name, then the installed peers."""
    chosen = {"others": ALL} if config.attentions is None else config.attentions
    found = [_ours(config, label, value) for label, value in chosen.items() if value != ALL]
    if ALL in chosen.values():
        named = {contender.source["type"] for contender in found}
        found += [_ours(config, name, name) for name in list_attentions() if name not in named]
    if len({contender.label for contender in found}) < len(found):
        raise ValueError(
            f"attentions={config.attentions!r}; allowed: a label that is the name of an attention is for it"
        )
    found.sort(key=lambda contender: contender.family)
    for peer in PEERS if config.peers and config.num_heads == config.num_key_value_heads else ():
        if peer.installed:
            source = {"peer": peer.name, "ours": peer.ours, "note": peer.note}
            found.append(
                Contender(
                    label=peer.name,
                    family="other packages",
                    causal=peer.causal,
                    source=source,
                    build=partial(peer.build, config.num_heads, config.head_dim),
                )
            )
    return found


def _ours(config: BenchConfig, label: str, value: Any) -> Contender:
    try:
        rules = parse_rules(value)
    except ValueError as error:
        raise ValueError(f"attentions.{label}: {error}") from None
    if len(rules) != 1 or {*rules[0].to_dict()} & {"layers", "roles", "modules"}:
        raise ValueError(
            f"attentions.{label}={value!r}; allowed: one attention with its options and backend, there is no model here"
        )
    (rule,) = rules
    attention = get_attention(rule.type)
    return Contender(
        label=label,
        family=attention.family,
        causal=attention.causal,
        source=rule.to_dict(),
        build=lambda length: _attend(config, rule, causal=attention.causal),
        by=lambda q, k, v: _computed_by(config, rule, q, k, v),
    )


def _module(config: BenchConfig, rule: Rule) -> Attention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = rule.attention(rule.config, config.heads, backend=rule.backend)
    return module.to(config.device, DTYPES[config.dtype])


def _computed_by(config: BenchConfig, rule: Rule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """Name of the form or backend that computes what :func:`_attend` asks for."""
    mask = AttentionMask(q.shape[0], q.shape[2], k.shape[2], causal=rule.attention.causal, device=q.device)
    by = _module(config, rule).computed_by(q, k, v, mask=mask, scale=config.head_dim**-0.5, dropout=0.0)
    return by if isinstance(by, str) else by.name


def _attend(config: BenchConfig, rule: Rule, *, causal: bool) -> Attend:
    module = _module(config, rule)
    scale = config.head_dim**-0.5
    hidden: dict[str, torch.Tensor] = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = AttentionMask(q.shape[0], q.shape[2], k.shape[2], causal=causal, device=q.device)
        module.zero_grad(set_to_none=True)
        if module.wants_hidden and ("hidden" not in hidden or hidden["hidden"].shape[1] != q.shape[2]):
            hidden["hidden"] = torch.randn_like(q.detach().transpose(1, 2).flatten(2)).requires_grad_(q.requires_grad)
        return module(q, k, v, mask=mask, scale=scale, **hidden)[0]

    return attend


@dataclass(frozen=True, kw_only=True)
class KernelCell:
    """One contender at one length in one pass."""

    contender: Contender
    length: int
    which: Pass
    settings: dict[str, Any]
    """All that the result depends on; the label is not in it."""

    @property
    def key(self) -> str:
        """Hash of all that the result depends on."""
        return hash_of({"format": FORMAT, "measure": "bench", **self.settings})

    @property
    def labels(self) -> dict[str, Any]:
        return {"measure": "bench", "label": self.contender.label, "family": self.contender.family}

    def __str__(self) -> str:
        return f"{self.contender.label} · {self.which} · {self.length}"


def cells(config: BenchConfig) -> Iterator[list[KernelCell]]:
    """The cells of a benchmark in groups that share rounds: of one length, one pass, causal or not."""
    shape = {name: getattr(config, name) for name in ("batch_size", "num_heads", "num_key_value_heads", "head_dim")}
    how = {name: getattr(config, name) for name in ("dtype", "device", "rounds", "memory")}
    for length in sorted(config.lengths):
        for which in config.passes:
            for causal in (True, False):
                same = [contender for contender in contenders(config) if contender.causal == causal]
                for start in range(0, len(same), config.together):
                    yield [
                        KernelCell(
                            contender=contender,
                            length=length,
                            which=which,
                            settings={
                                **{"source": contender.source, "causal": causal, "length": length, "which": which},
                                **{**shape, **how},
                            },
                        )
                        for contender in same[start : start + config.together]
                    ]


def run_bench(
    config: BenchConfig, results: Results, *, fresh: bool = False, say: Callable[[str], None] = print
) -> None:
    """Measure all cells that have no result of these versions yet, and add theirs to ``results``, group by group.

    A contender that fails is recorded with its error, and the others go on.

    Args:
        fresh: measure all cells, whatever has been written before.
        say: gets a line of progress at a time.

    Raises:
        ValueError: another run is measuring into the same file.
    """
    groups = list(cells(config))
    shorter: dict[tuple[str, Pass], list[KernelCell]] = {}

    def measure(group: list[KernelCell]) -> Iterator[tuple[KernelCell, dict[str, Any] | str]]:
        """The group without the contenders that the next shorter length shows to be too slow."""
        quick = []
        for cell in group:
            before = [other for other in shorter[cell.contender.label, cell.which] if other.length < cell.length]
            measured = [other for other in before if results.done(other.key)]
            last = max(measured, key=lambda other: other.length, default=cell)
            elapsed = results.records[last.key]["result"]["seconds"] if measured else 0.0
            if elapsed * (cell.length / last.length) ** 2 > config.patience:
                took = f"left out, a pass took {elapsed:.0f} s at {last.length} tokens"
                yield cell, f"{took} (patience={config.patience:g} s)"
            else:
                quick.append(cell)
        if quick:
            yield from _measure(config, quick)

    for group in groups:
        for cell in group:
            shorter.setdefault((cell.contender.label, cell.which), []).append(cell)
    run_cells(groups, results, measure, _note, fresh=fresh, say=say)


def _measure(config: BenchConfig, group: list[KernelCell]) -> Iterator[tuple[KernelCell, dict[str, Any]]]:
    """The outcomes of cells that share rounds, timed all together."""
    device, length, which = torch.device(config.device), group[0].length, group[0].which
    tensors = _tensors(config, length, gradients=which == "forward_backward")
    causal = group[0].contender.causal
    size = sum(x.numel() * x.element_size() for x in tensors) + tensors[0].numel() * tensors[0].element_size()

    def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = config.num_heads != config.num_key_value_heads
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    baseline = [_workload(own, tensors, which)]
    ready: dict[str, list[Workload]] = {}
    errors: dict[str, str] = {}
    first: dict[str, float] = {}
    for cell in group:
        label = cell.contender.label
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                part = _workload(cell.contender.build(max(config.lengths)), tensors, which)
            started = time.perf_counter()
            part.run()
            first[label] = time.perf_counter() - started
            ready[label] = [part]
        except Exception as error:  # what one attention cannot do must not end the others' measurement
            errors[label] = described(error)
    bytes_of = {}
    if config.memory:
        bytes_of = {label: timing.peak_bytes(parts, device) for label, parts in ready.items()}
        bytes_of[""] = timing.peak_bytes(baseline, device)
    timed = bool(ready and config.rounds)
    seconds = timing.interleaved({"": baseline, **ready}, config.rounds, device) if timed else {}
    wall, rates = {}, {}
    if timed and device.type == "cpu":
        rates = timing.cpu_rates()
        if config.wall_threads:
            wall = timing.interleaved({"": baseline, **ready}, config.rounds, device, config.wall_threads)
    for cell in group:
        label = cell.contender.label
        if label in errors:
            yield cell, {"status": "error", "error": errors[label]}
            continue
        result: dict[str, Any] = {"seconds": first[label]}
        if config.rounds:
            result = dict(timing.compared(seconds[label], seconds[""]))
        if wall:
            result["wall"] = timing.compared(wall[label], wall[""])
        if rates:
            result |= {"threads": 1, "gflops": rates}
        if cell.contender.by is not None:
            result["computed_by"] = cell.contender.by(*tensors)
        if config.memory:
            result |= {"bytes": bytes_of[label], "baseline_bytes": bytes_of[""], "tensor_bytes": size}
        yield cell, {"status": "ok", "result": result}


def _tensors(config: BenchConfig, length: int, *, gradients: bool) -> list[torch.Tensor]:
    """Queries, keys and values as transformers hands them over: (B, N, H, D), transposed."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for heads in (config.num_heads, config.num_key_value_heads, config.num_key_value_heads):
        x = torch.randn(config.batch_size, length, heads, config.head_dim, generator=generator)
        made.append(x.to(config.device, DTYPES[config.dtype]).transpose(1, 2).requires_grad_(gradients))
    return made


def _workload(attend: Attend, tensors: list[torch.Tensor], which: Pass) -> Workload:
    q, k, v = tensors

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def forward_backward() -> None:
        out = attend(q, k, v)
        out.backward(torch.ones_like(out))
        for x in tensors:
            x.grad = None

    return Workload(run=forward if which == "forward" else forward_backward, count=1)


def _note(cell: KernelCell, result: dict[str, Any]) -> str:
    parts = []
    if "times_as_fast" in result:
        parts.append(f"{result['times_as_fast']:.2f}x ({result['lowest']:.2f} to {result['highest']:.2f})")
    if "bytes" in result:
        parts.append(f"{result['bytes'] / result['tensor_bytes']:.1f} x the tensors' bytes")
    return ", ".join(parts)


def prepare_bench(config: BenchConfig) -> Results:
    """What an earlier run of the same benchmark has left.

    Raises:
        ValueError: output_dir cannot be written, or results.jsonl is not one.
    """
    return Results(check_folder(config.output_dir) / "results.jsonl")
