"""A short contract of one backend on one device: outputs and gradients against ``reference``; time and peak memory.

As the contract tests, without their depth and without pytest: what a user's machine can answer in seconds about kernels
that nobody has run there.
"""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.benchmark.cost import timing
from attn_plugins.benchmark.cost.launches import served
from attn_plugins.benchmark.cost.timing import Run, Workload
from attn_plugins.benchmark.results.cells import described
from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.rules import parse_rules

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Allowed difference from ``reference`` in float64, times the largest entry where that is above 1.

Kernels of others may multiply float32 in TF32. In bfloat16, torch's own fused attention is off by 1.4e-2 here."""
EXTRAS = ("position_bias", "softcap", "sinks")
SOFTCAP = 2.0
LENGTH = 300
"""Tokens: no multiple of any kernel's blocks, and several of them."""


def heads_of(number: int, key_value: int, size: int) -> HeadShape:
    """Heads that are as many and as large, in the first layer of a model."""
    return HeadShape(
        num_heads=number,
        num_key_value_heads=key_value,
        head_dim=size,
        value_dim=size,
        hidden_size=number * size,
        layer=0,
    )


HEADS, LARGE = heads_of(4, 2, 64), heads_of(16, 16, 64)


@dataclass(frozen=True)
class Case:
    """One call: what its rows are, and what it brings beside them."""

    name: str
    padding: str | None = None
    """Side on which half of the second row is padding."""
    packed: bool = False
    """Rows of three texts, cut at places of their own."""
    extras: tuple[str, ...] = ()


def contract(
    attention: str,
    options: Mapping[str, Any],
    backend: str,
    device: str | torch.device,
    dtypes: Sequence[torch.dtype],
    *,
    heads: HeadShape = HEADS,
    length: int = LENGTH,
    thorough: bool = False,
) -> list[str]:
    """What a backend gets wrong: lines that say in which call, and what differs by how much. None is what should be.

    Called with whole rows, with left padding, with packed rows that end in padding, and with position bias, softcap and
    learned sinks where the attention declares them: all of it in the first dtype, and one of these calls in each of the
    others, unless ``thorough``. What the backend says that it cannot honour is left out.

    Args:
        options: of the attention.
        dtypes: of queries, keys, values and weights, the one that matters most first.

    Raises:
        ValueError: the backend serves none of these calls; why.
    """
    module = _module(attention, options, backend, heads)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for weight in module.parameters():  # away from a start that may hide half of it
            weight.add_(0.3 * torch.randn(weight.shape))
    length = served(module, length)
    failures, refusals, called = [], [], 0
    for number, dtype in enumerate(dtypes):
        every = list(_cases(module))
        for case in every if thorough or number == 0 else every[-1:]:
            cast = copy.deepcopy(module).to(device, dtype)
            for part in _parts(case):
                given = _Given(cast, part, heads, length, torch.device(device), dtype)
                refusal = given.refusal()
                if refusal is None:
                    called += 1
                    failures += [f"{_short(dtype)}, {part.name}: {line}" for line in given.differences()]
                    if part is case:
                        break
                else:
                    refusals.append(refusal)
    if not called:
        raise ValueError(refusals[0])
    return failures


def time_of(
    attention: str,
    options: Mapping[str, Any],
    backend: str,
    device: str | torch.device,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: HeadShape = LARGE,
    batch_size: int = 1,
    rounds: int = 10,
    at_most: float = 0.5,
) -> tuple[float, int]:
    """(seconds, peak bytes) of a forward and backward pass of a layer whose mask other layers have seen before.

    Args:
        rounds: passes that are timed; the median counts.
        at_most: seconds after which no other pass is begun.

    Raises:
        ValueError: the backend does not serve the call, or the attention no such length.
    """
    module = _module(attention, options, backend, heads)
    length = served(module, length)
    module = module.to(device, dtype)
    given = _Given(module, Case("whole rows"), heads, length, torch.device(device), dtype, batch_size)
    return time_and_bytes(given.both, torch.device(device), rounds=rounds, at_most=at_most)


def time_and_bytes(run: Run, device: torch.device, *, rounds: int = 10, at_most: float = 0.5) -> tuple[float, int]:
    """(median seconds, peak bytes) of what runs, after runs that are thrown away. Arguments as of :func:`time_of`."""
    peak = timing.peak_bytes([Workload(run=run, count=1)], device)
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < rounds and (not seconds or time.perf_counter() - started < at_most):
        seconds.append(timing.seconds_of(run, device))
    return statistics.median(seconds), peak


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _module(attention: str, options: Mapping[str, Any], backend: str, heads: HeadShape) -> Attention:
    (rule,) = parse_rules({"type": attention, **options, "backend": backend})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return rule.attention(rule.config, heads, backend=backend)


def _cases(module: Attention) -> Iterator[Case]:
    yield Case("whole rows")
    extras = tuple(name for name in EXTRAS if getattr(type(module), name))
    if extras:
        yield Case(_named(extras), extras=extras)
    if module.any_length:
        yield Case("left padding", padding="left")
    if type(module).segments:
        yield Case("packed rows", padding="right", packed=True)


def _parts(case: Case) -> Iterator[Case]:
    """A case, then each of its extras by itself, for a backend that cannot honour all of them together."""
    yield case
    if len(case.extras) > 1:
        for extra in case.extras:
            yield Case(_named((extra,)), extras=(extra,))


def _named(extras: tuple[str, ...]) -> str:
    return ", ".join(extras).replace("_", " ")


class _Given:
    """One call of a module: tensors drawn on the CPU, the same for every device, laid out as transformers does."""

    def __init__(
        self,
        module: Attention,
        case: Case,
        heads: HeadShape,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int = 2,
    ):
        self.module = module
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        queries, hidden_size = (batch_size, length, heads.num_heads), heads.num_heads * heads.head_dim
        keys = (batch_size, length, heads.num_key_value_heads)
        self.tensors = {
            "q": draw(*queries, heads.head_dim).transpose(1, 2),
            "k": draw(*keys, heads.head_dim).transpose(1, 2),
            "v": draw(*keys, heads.value_dim).transpose(1, 2),
        }
        self.cotangent = draw(*queries, heads.value_dim)
        if module.wants_hidden:
            self.tensors["hidden"] = draw(batch_size, length, hidden_size)
        if "position_bias" in case.extras:
            self.tensors["position_bias"] = draw(1, heads.num_heads, length, length)
        if "sinks" in case.extras:
            self.tensors["sinks"] = draw(heads.num_heads)
        self.options: dict[str, Any] = {"scale": heads.head_dim**-0.5}
        if "softcap" in case.extras:
            self.options["softcap"] = SOFTCAP
        padding_BK = segments_BK = None
        if case.padding is not None:
            padding_BK = torch.ones(batch_size, length, dtype=torch.bool)
            padding_BK[1:, length // 2 + 1 :] = False
            padding_BK = (padding_BK.flip(1) if case.padding == "left" else padding_BK).to(device)
            self.cotangent = self.cotangent * padding_BK[:, :, None, None]  # nobody reads what is at padding
        if case.packed:
            own = torch.arange(length) * 3 // length + (torch.arange(length) >= length - 7).long()
            segments_BK = torch.stack([own, own.flip(0).neg()] * batch_size)[:batch_size].to(device)
        device = self.cotangent.device  # with its number
        tables: dict[str, Any] = {"padding_BK": padding_BK, "segments_BK": segments_BK}
        self.mask = AttentionMask(batch_size, length, length, causal=module.causal, **tables, device=device)

    def refusal(self) -> str | None:
        """Why the module's backend cannot honour the call, or None."""
        options = {name: x for name, x in self.tensors.items() if name in EXTRAS} | self.options
        if self.module.wants_hidden:
            options["hidden_BQE"] = self.tensors["hidden"]
        if self.module.wants_grid:
            options["grid_size"] = None
        q, k, v = (self.tensors[name] for name in "qkv")
        try:
            self.module.computed_by(q, k, v, mask=self.mask, dropout=0.0, **options)
        except ValueError as error:
            return str(error)
        return None

    def both(self) -> None:
        """A forward and a backward pass."""
        self._outcome(self.module, self.tensors)

    def differences(self) -> list[str]:
        """What differs from ``reference`` in float64 by more than is allowed, or the error in a line."""
        oracle = copy.deepcopy(self.module).double()
        oracle.backend = "reference"
        want = self._outcome(oracle, {name: x.double() for name, x in self.tensors.items()})
        try:
            got = self._outcome(self.module, self.tensors)
        except Exception as error:  # kernels of others fail with whatever they like
            return [described(error)]
        told = []
        for name, b in want.items():
            a = torch.zeros_like(b) if got[name] is None else got[name].double()
            b = torch.zeros_like(a) if b is None else b
            off, allowed = _off(a, b), TOLERANCE[self.cotangent.dtype]
            if not off <= allowed:
                told.append(f"{name} differs by {off:.1e}, allowed {allowed:.0e}")
        return told

    def _outcome(self, module: Attention, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        wanted = {**leaves, **dict(module.named_parameters())}
        q, k, v = (leaves[name] for name in "qkv")
        rest = {name: x for name, x in leaves.items() if name not in "qkv"}
        out = module(q, k, v, mask=self.mask, **rest, **self.options)[0]
        gradients = torch.autograd.grad(out, list(wanted.values()), self.cotangent.to(out.dtype), allow_unused=True)
        named = {f"gradient to {name}": x for name, x in zip(wanted, gradients, strict=True)}
        real = self.mask.padding_BK
        return {"output": out.detach() if real is None else out.detach() * real[:, :, None, None], **named}


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, times as large as the largest entry of ``b`` where that is above 1."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()
