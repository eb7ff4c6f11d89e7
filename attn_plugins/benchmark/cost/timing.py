"""Time and peak memory of a pass, through a whole model or through its attention layers alone.

Times are taken side by side: each round runs every contender once, the order turns round from one round to the next,
and what counts is the ratio within a round, so that a machine that slows down slows all of them. On a CPU it is the
time of the process on one thread: with several, each small operation waits for the slower of them, so that what else
the machine does would be measured, and most where operations are many. Memory is the peak of
what torch's allocator handed out during one pass, above what was there before it: weights and inputs are not in it.
"""

import contextlib
import functools
import inspect
import itertools
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.core.backend import get_backend, list_backends
from attn_plugins.hf.swap import describe_attention
from attn_plugins.training.models import in_slot

Pass = Literal["forward", "forward_backward"]
Scope = Literal["model", "attention"]
MEMORY = ("cpu", "cuda")
"""Types of device whose peak memory can be measured."""
Run = Callable[[], None]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A piece of work and how often it occurs in what is measured."""

    run: Run
    count: int


def parts(model: nn.Module, input_ids: torch.Tensor, scope: Scope, which: Pass) -> list[Workload]:
    """What is to be run for one pass. The model is put into evaluation mode, its weights outside attentions are frozen.

    Args:
        input_ids: (B, N) tokens.
        scope: "model" is the whole of it, from embeddings to logits; "attention" is one attention module of each kind
            that is in the model, projections included, on the inputs that it gets in the model.
        which: "forward" runs without autograd. "forward_backward" runs as a fine-tune with adapters does: gradients
            flow to the inputs and into the attention's own weights, and not into the other weights.

    Returns:
        one part for a model, one for each kind of attention module for "attention".
    """
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_slot(name))
    if scope == "model":
        return [Workload(run=_model_run(model, input_ids, which), count=1)]
    return [Workload(run=_module_run(call, which), count=call.count) for call in attention_calls(model, input_ids)]


def interleaved(
    contenders: Mapping[Name, list[Workload]], rounds: int, device: torch.device, threads: int = 1
) -> dict[Name, list[float]]:
    """Seconds of each contender in each of ``rounds`` rounds, after one round that is thrown away.

    Several parts count as the mean of a part, weighted by how often each occurs.

    Args:
        threads: of torch, where the device is a CPU: with one it is the time of the process, else that of the clock.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; allowed: at least 1")
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    with on_threads(threads) if device.type == "cpu" else contextlib.nullcontext():
        for number in range(rounds + 1):
            for name in order if number % 2 else reversed(order):
                total = sum(part.count for part in contenders[name])
                elapsed = sum(seconds_of(part.run, device) * part.count for part in contenders[name]) / total
                if number > 0:
                    seconds[name].append(elapsed)
    return seconds


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    """So many threads of torch's for what runs within."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_rates() -> dict[str, float]:
    """GFLOP/s of one thread of this CPU in float32, here and now: what ratios of times depend on beside the code.

    ``mm`` is of a product of matrices of 1024, ``attention`` of causal ``scaled_dot_product_attention``, forward, of 8
    heads of 64 and 2048 tokens, of which half the pairs are counted. Under the name of a backend is the product of
    matrices that its kernels are made of.
    """
    a = torch.randn(1024, 1024)
    q = torch.randn(1, 8, 2048, 64)
    work = {
        "mm": [Workload(run=lambda: _done(torch.mm(a, a)), count=1)],
        "attention": [Workload(run=lambda: _done(scaled_dot_product_attention(q, q, q, is_causal=True)), count=1)],
    }
    operations = {"mm": 2 * 1024**3, "attention": 2 * 2 * 8 * 64 * 2048**2 / 2}
    for name in list_backends():
        if (found := get_backend(name).product()) is not None:
            work[name] = [Workload(run=functools.partial(_only_run, found[0]), count=1)]
            operations[name] = found[1]
    with torch.no_grad():
        seconds = interleaved(work, 3, torch.device("cpu"))
    return {name: operations[name] / statistics.median(found) / 1e9 for name, found in seconds.items()}


def compared(seconds: list[float], baseline: list[float]) -> dict[str, float]:
    """Median times, and how many times as fast as the baseline in the same round: median, lowest and highest round."""
    ratios = sorted(base / own for own, base in zip(seconds, baseline, strict=True))
    return {
        "seconds": statistics.median(seconds),
        "baseline_seconds": statistics.median(baseline),
        "times_as_fast": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }


def peak_bytes(work: list[Workload], device: torch.device) -> int:
    """Peak of the memory that torch allocates during a pass above what it held before; of several parts, the largest.

    On a CPU it is summed up from the allocator's own reports to torch's profiler, on CUDA the allocator knows it. So
    scratch memory of kernels counts where they take it from torch's allocator, and not where a library (such as oneDNN)
    takes its own.
    """
    if device.type not in MEMORY:
        raise ValueError(f"peak memory can be measured on {' and '.join(MEMORY)}, not on {device.type}")
    peak = _peak if device.type == "cpu" else _peak_on_cuda
    return max(peak(part.run) for part in work)


def _peak(run: Run) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines to stderr each time
    from torch.autograd.profiler import profile

    run()  # what is allocated once and kept is not part of a pass
    with profile(use_kineto=True, profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def _peak_on_cuda(run: Run) -> int:
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _done(_: torch.Tensor) -> None:
    """For a run, which returns nothing."""


def _only_run(compute: Callable[[], Any]) -> None:
    compute()


def seconds_of(run: Run, device: torch.device) -> float:
    """Seconds of one run, until the device has done all of it; of the process, on a CPU with one thread."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _synchronize(device)
    started = clock()
    run()
    _synchronize(device)
    return clock() - started


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _model_run(model: Any, input_ids: torch.Tensor, which: Pass) -> Run:
    without = no_cache(model)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=input_ids, **without)

    def forward_backward() -> None:
        embedded = model.get_input_embeddings()(input_ids).detach().requires_grad_()
        model(inputs_embeds=embedded, **without).logits.sum().backward()
        model.zero_grad(set_to_none=True)

    return forward if which == "forward" else forward_backward


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """One call of an attention module, as the model makes it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int
    """How many modules of the model are of this kind."""


class _EnoughError(Exception):
    """Ends a forward pass whose inputs have all been seen."""


def attention_calls(model: nn.Module, input_ids: torch.Tensor) -> list[ModuleCall]:
    """The inputs that the first attention module of each kind gets.

    Modules are of one kind if class, attention, options and the model's own sliding window are the same. The model runs
    only as far as the last of these modules.
    """
    groups: dict[str, list[str]] = {}
    for path, rows in itertools.groupby(describe_attention(model), key=lambda row: row.path):
        module, served = model.get_submodule(path), [(row.role, row.plugin, row.options, row.kv_heads) for row in rows]
        kind = (type(module).__name__, served, getattr(module, "sliding_window", None))
        groups.setdefault(repr(kind), []).append(path)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no attention that can be measured alone")
    calls: list[ModuleCall] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        paths = next(paths for paths in groups.values() if model.get_submodule(paths[0]) is module)
        calls.append(ModuleCall(module=module, args=_detached(args), kwargs=_detached(kwargs), count=len(paths)))
        if len(calls) == len(groups):
            raise _EnoughError

    firsts = [model.get_submodule(paths[0]) for paths in groups.values()]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in firsts]
    try:
        with torch.no_grad():
            model(input_ids=input_ids, **no_cache(model))
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _module_run(call: ModuleCall, which: Pass) -> Run:
    def forward() -> None:
        with torch.no_grad():
            call.module(*call.args, **call.kwargs)

    def forward_backward() -> None:
        args, kwargs = call.args, dict(call.kwargs)
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = kwargs["hidden_states"].detach().requires_grad_()
        else:
            args = (args[0].detach().requires_grad_(), *args[1:])
        output = call.module(*args, **kwargs)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        call.module.zero_grad(set_to_none=True)

    return forward if which == "forward" else forward_backward


def no_cache(model: Any) -> dict[str, bool]:
    """What keeps a model's call from filling a cache."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _detached(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.detach()
    if isinstance(tree, tuple):
        return tuple(_detached(item) for item in tree)
    return {key: _detached(item) for key, item in tree.items()} if isinstance(tree, dict) else tree
