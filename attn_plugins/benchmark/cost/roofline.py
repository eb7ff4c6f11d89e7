"""Cost on paper: what an attention asks of a GPU by length, and the least time that published rates allow for it.

The batched form is counted operation by operation on tensors without values, at the very length unless that is
:data:`MOST_COUNTED` operations: then it follows from the last counts, by a + b N + c N^2, launches by a + b N.

The kernels of a backend are not run. They multiply the pairs in blocks that hold a visible one, or, where an attention
is no pattern of pairs, what the batched form multiplies, and move queries, keys, values, output and their gradients
once. An operation takes as long as its arithmetic or its bytes, whichever is longer; a pass as long as its operations,
or as starting them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_plugins.benchmark.cost.launches import LaunchCall, quadratic, served, served_without_values
from attn_plugins.benchmark.cost.operations import Launch, Operations
from attn_plugins.benchmark.results.cells import described
from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.backend import get_backend, list_backends
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import list_attentions
from attn_plugins.core.rules import Rule, parse_rules
from attn_plugins.training.models import resolve

MOST_COUNTED = 4000
"""Operations of a pass that are counted one by one: a few seconds."""
GRID = (256, 1024, 4096, 16384, 65536)
"""Lengths that are counted, beside those asked for, to tell from which one it pays and how it grows."""
BLOCK = 128
"""Queries and keys to a side of the blocks that FlexAttention's and flash attention's kernels leave out or compute."""
TILES = 8
"""Rows of blocks, spread over a sequence, in which visible ones are counted."""
LAUNCH = 5e-6
"""Seconds that starting an operation takes: the usual order for PyTorch without CUDA graphs."""
KERNELS = 4
"""Launches of a fused forward and backward pass: one, and three for the sums and the gradients."""
TENSORS = 12
"""Times that a fused kernel moves a tensor of the queries' size: q, k, v, out; these, dout, dq, dk, dv."""
FUSED = 14
"""Operations a pair and channel of a fused kernel: two products of 2 forward, five backward, which begin again."""


@dataclass(frozen=True)
class Device:
    """Published rates of a GPU; dense, without sparsity."""

    name: str
    half: float
    """FLOP/s of bfloat16 and float16 in the matrix units."""
    single: float
    """FLOP/s of float32 outside of them, as torch multiplies by default."""
    bandwidth: float
    """Bytes/s of its memory."""
    memory: float
    """Bytes of it."""
    source: str


DEVICES = {
    "a100": Device("A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12, 80e9, "NVIDIA A100 Tensor Core GPU datasheet"),
    "h100": Device("H100 SXM", 989e12, 67e12, 3.35e12, 80e9, "NVIDIA H100 Tensor Core GPU datasheet"),
    "h200": Device("H200 SXM", 989e12, 67e12, 4.8e12, 141e9, "NVIDIA H200 Tensor Core GPU datasheet"),
    "b200": Device(
        "B200 (a GPU of a DGX B200)", 2250e12, 75e12, 8.0e12, 180e9, "NVIDIA DGX B200 and HGX B200 datasheets"
    ),
}


@dataclass(frozen=True, kw_only=True)
class RooflineConfig:
    """Which attentions at which lengths in which model, and on what."""

    output_dir: str = "runs/roofline"
    """Where roofline.json and report.md go."""
    devices: list[str] = field(default_factory=lambda: list(DEVICES))
    """a100, h100, h200, b200."""
    attentions: dict[str, Any] | None = None
    """Label -> a name, or a mapping with type, options and backend; null is every attention, with its defaults. Without
    a backend it is the batched form and each backend that serves it."""
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16384, 65536, 262144, 1048576])
    """Lengths in tokens."""
    model: str | None = None
    """A folder or a name on the hub: its config tells the heads and layers. Null is the heads below, one layer."""
    batch_size: int = 1
    num_heads: int = 16
    """Query heads."""
    num_key_value_heads: int = 16
    """Key/value heads; num_heads is a multiple of it."""
    head_dim: int = 64
    layers: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least 1")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads={self.num_heads}; allowed: a multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths}; allowed: at least one, each at least 1")
        unknown = [name for name in self.devices if name not in DEVICES]
        if unknown or not self.devices:
            raise ValueError(f"devices={self.devices}; allowed: {', '.join(DEVICES)}")
        self.rules()

    def rules(self) -> dict[str, Rule]:
        """Label -> rule."""
        chosen = {name: name for name in list_attentions()} if self.attentions is None else self.attentions
        found = {}
        for label, value in chosen.items():
            try:
                (found[label],) = parse_rules(value)
            except ValueError as error:
                raise ValueError(f"attentions.{label}: {error}") from None
        return found


def heads_of(config: RooflineConfig) -> tuple[HeadShape, int]:
    """Heads of a layer and the number of layers: of the model that the config names, or of the numbers in it.

    Raises:
        ValueError: the model's config cannot be read, or does not tell its heads.
    """
    number, shared, size, layers = config.num_heads, config.num_key_value_heads, config.head_dim, config.layers
    if config.model is not None:
        number, shared, size, layers = _of_model(config.model)
    shape = HeadShape(
        num_heads=number,
        num_key_value_heads=shared,
        head_dim=size,
        value_dim=size,
        hidden_size=number * size,
        layer=0,
    )
    return shape, layers


def _of_model(model: str) -> tuple[int, int, int, int]:
    from transformers import AutoConfig

    source = resolve(model)
    try:
        read = AutoConfig.from_pretrained(source).get_text_config()
        number = read.num_attention_heads
        size = getattr(read, "head_dim", None) or read.hidden_size // number
        return number, getattr(read, "num_key_value_heads", None) or number, size, read.num_hidden_layers
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"model={model!r}: its config does not tell its heads: {described(error)}") from None


Amounts = dict[str, float]
"""flops, bytes, launches, and for each device the seconds that its rates allow for the operations."""


def flash(heads: HeadShape, length: int, batch_size: int, devices: Sequence[str]) -> Amounts:
    """Causal flash attention of one layer, forward and backward: half of all pairs."""
    flops = length * length / 2 * heads.num_heads * heads.head_dim * FUSED * batch_size
    return fused(heads, length, batch_size, devices, flops)


def fused(heads: HeadShape, length: int, batch_size: int, devices: Sequence[str], flops: float) -> Amounts:
    """Amounts of a kernel that moves each tensor once."""
    moved = TENSORS * length * heads.num_heads * heads.head_dim * 2.0 * batch_size
    found = {"flops": flops, "bytes": moved, "launches": float(KERNELS)}
    return found | {name: max(flops / DEVICES[name].half, moved / DEVICES[name].bandwidth) for name in devices}


def batched(operations: Operations, devices: Sequence[str]) -> Amounts:
    """Amounts of operations that run one after another."""
    found = {
        "flops": float(operations.flops),
        "bytes": float(operations.bytes),
        "launches": float(len(operations.launches)),
    }
    return found | {name: sum(seconds_of(one, DEVICES[name]) for one in operations.launches) for name in devices}


def seconds_of(launch: Launch, device: Device) -> float:
    """Seconds of an operation: of its arithmetic or its bytes."""
    rate = device.half if launch.dtype in (torch.bfloat16, torch.float16) else device.single
    return max(launch.flops / rate, launch.bytes / device.bandwidth)


def takes(amounts: Amounts, device: str) -> float:
    """Seconds of a pass: those of its operations, or of starting them."""
    return max(amounts[device], amounts["launches"] * LAUNCH)


def count_batched(rule: Rule, heads: HeadShape, length: int, batch_size: int = 1) -> Operations:
    """The operations of a forward and backward pass in bfloat16, whose mask another layer has seen before.

    Raises:
        Exception: the form asks for values of tensors, or the attention serves no such length.
    """
    before = torch.get_default_dtype()
    try:
        with FakeTensorMode():  # weights too, which may be of the longest length
            torch.set_default_dtype(torch.bfloat16)
            module = rule.attention(rule.config, heads, backend="batched")
            call = LaunchCall(module, served_without_values(module, length), 0, batch_size)
            torch.set_default_dtype(before)
            call.forward()
            return call.both()
    finally:
        torch.set_default_dtype(before)


def least_seconds(rule: Rule, heads: HeadShape, length: int, batch_size: int, device: str) -> tuple[int, float]:
    """(launches of a layer's batched form, least seconds of that or of a backend's kernels), forward and backward."""
    operations = count_batched(rule, heads, length, batch_size)
    found = [batched(operations, [device])]
    module = rule.attention(rule.config, heads, backend="batched")
    for _ in serving(rule, heads):
        multiplied = pairs(module, heads, length)
        flops = operations.flops if multiplied is None else multiplied * heads.head_dim * FUSED * batch_size
        found.append(fused(heads, length, batch_size, [device], flops))
    return len(operations.launches), min(takes(amounts, device) for amounts in found)


def pairs(attention: Attention, heads: HeadShape, length: int) -> float | None:
    """Pairs of all heads in the blocks of 128 by 128 that hold a visible one; None where there is no pattern of them.

    Counted in some rows of blocks that are spread over the sequence.
    """
    patterns: Callable[..., Any] | None = getattr(attention, "patterns", None)
    if patterns is None:
        return None
    length = served(attention, length)
    mask = AttentionMask(1, length, length, causal=attention.causal)
    k_index, rows = torch.arange(length).view(1, 1, -1), -(-length // BLOCK)
    chosen = sorted({round((row + 0.5) * rows / TILES - 0.5) for row in range(TILES)})
    found = 0.0
    for part, pattern in patterns(heads.num_heads, mask):
        blocks = 0
        for row in chosen:
            q_index = torch.arange(row * BLOCK, min((row + 1) * BLOCK, length)).view(1, -1, 1)
            seen = pattern.sees(mask, q_index, k_index).any(dim=-2).flatten(1).any(dim=0)
            blocks += int(torch.nn.functional.pad(seen, (0, -length % BLOCK)).view(-1, BLOCK).any(dim=1).sum())
        found += blocks / len(chosen) * rows * BLOCK**2 * (part.stop - part.start)
    return found


def serving(rule: Rule, heads: HeadShape) -> list[str]:
    """Backends that serve a causal, or else bidirectional, call of an attention, whether they are installed or not."""
    module = rule.attention(rule.config, heads, backend="batched")
    length = served(module, 256)
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = LaunchCall(module, length, 0, 1, torch.bfloat16)
        options: dict[str, Any] = {"mask": call.mask, "scale": call.scale, "dropout": 0.0}
        if module.wants_hidden:
            options["hidden_BQE"] = call.hidden["hidden"]
        chosen = list_backends() if rule.backend == "auto" else [rule.backend]
        return [name for name in chosen if name in list_backends() and _serves(name, module, call.tensors, options)]


def _serves(name: str, module: Attention, tensors: list[torch.Tensor], options: dict[str, Any]) -> bool:
    return get_backend(name).refuses(module, *tensors, **options) is None


@dataclass
class Cost:
    """Amounts of one attention by one form or backend, by length."""

    label: str
    by: str
    amounts: dict[int, Amounts]
    counted: list[int]
    """Lengths that were counted; the others are extrapolated."""
    error: str | None = None

    def extrapolate(self, lengths: Sequence[int], *, quadratic: bool) -> None:
        """Add what was not counted, by the law of the module's docstring.

        Args:
            quadratic: launches grow as the pairs do, in pieces of them.

        Raises:
            ValueError: fewer than three were counted.
        """
        missing = [length for length in lengths if length not in self.amounts]
        if missing and len(self.counted) < 3:
            raise ValueError(f"counted at {len(self.counted)} lengths, which does not tell how it grows")
        last = self.counted[-1] if missing else 0
        for length in missing:
            grown = {
                name: self._through(self.counted[-3 if quadratic or name != "launches" else -2 :], name, length)
                for name in self.amounts[last]
            }
            # Rounding to whole blocks may bend the curve: what is longer costs no less.
            self.amounts[length] = {name: max(amount, self.amounts[last][name]) for name, amount in grown.items()}

    def _through(self, known: Sequence[int], name: str, length: int) -> float:
        """The polynomial through what is known."""
        return sum(
            self.amounts[one][name] * math.prod((length - other) / (one - other) for other in known if other != one)
            for one in known
        )

    def pays_from(self, device: str, heads: HeadShape, batch_size: int) -> int | None:
        """The shortest length from which on it takes less time than causal flash attention at all that are known."""
        pays = None
        for length in sorted(self.amounts, reverse=True):
            dense = flash(heads, length, batch_size, [device])
            if takes(self.amounts[length], device) >= takes(dense, device):
                break
            pays = length
        return pays


def costs(config: RooflineConfig, heads: HeadShape, say: Callable[[str], None] = print) -> list[Cost]:
    """Costs of every attention of a config by its batched form, and by each backend that serves it.

    What cannot be counted has its error in its place, and the others go on.
    """
    found = []
    for label, rule in config.rules().items():
        started = time.perf_counter()
        own = _batched_cost(label, _long_enough(rule, max(config.lengths)), heads, config)
        kernels = [_kernel_cost(label, name, rule, heads, own, config) for name in serving(rule, heads)]
        if rule.backend in ("auto", "batched"):
            found.append(own)
        found += kernels
        told = own.error or f"batched{''.join(f', {one.by}' for one in kernels)}"
        say(f"{label}: {told} ({time.perf_counter() - started:.0f} s)")
    return found


def _long_enough(rule: Rule, length: int) -> Rule:
    """The rule with tables that are large enough, where an attention is built for a longest length."""
    size: int | None = getattr(rule.config, "max_length", None)
    if size is None or size >= length:
        return rule
    (larger,) = parse_rules({**rule.to_dict(), "max_length": length})
    return larger


def _batched_cost(label: str, rule: Rule, heads: HeadShape, config: RooflineConfig) -> Cost:
    cost = Cost(label, "batched", {}, [])
    power = 2 if quadratic(rule.attention) else 1
    try:
        for length in sorted({*GRID, *config.lengths}):
            if len(cost.counted) >= 3:  # enough to tell how it grows
                last = cost.counted[-1]
                if cost.amounts[last]["launches"] * (length / last) ** power > MOST_COUNTED:
                    continue
            operations = count_batched(rule, heads, length, config.batch_size)
            cost.amounts[length] = batched(operations, config.devices)
            cost.counted.append(length)
        cost.extrapolate(config.lengths, quadratic=quadratic(rule.attention))
    except Exception as error:  # what one attention cannot do must not end the others' counts
        cost.error = described(error)
    return cost


def _kernel_cost(label: str, name: str, rule: Rule, heads: HeadShape, own: Cost, config: RooflineConfig) -> Cost:
    """Amounts of a backend's kernels, fused: of visible blocks, or of the products of the batched form."""
    cost = Cost(label, name, {}, [])
    module = rule.attention(rule.config, heads, backend="batched")
    try:
        is_pattern = hasattr(module, "patterns")
        asked = {length for length in config.lengths if length < GRID[-1]}
        for length in sorted({*GRID, *asked}) if is_pattern else own.counted:
            multiplied = pairs(module, heads, length)
            if multiplied is not None:
                flops = multiplied * heads.head_dim * FUSED * config.batch_size
            else:
                flops = own.amounts[length]["flops"]
            cost.amounts[length] = fused(heads, length, config.batch_size, config.devices, flops)
            cost.counted.append(length)
        cost.extrapolate(config.lengths, quadratic=False)
    except Exception as error:  # as above
        cost.error = described(error)
    return cost
