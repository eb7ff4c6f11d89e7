"""What a machine with a GPU can say of every attention and backend in minutes: make gpu-check.

``python -m attn_plugins.benchmark.gpu_check --help``. Nothing is installed or fetched. Three parts, each with its share
of the time: the contract of every backend, time and peak memory by length, and whole training steps of a model of
SmolLM2's sizes. Each figure is on disk as soon as it is there, so a run that is killed keeps what it has, and what the
time did not suffice for is named.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.benchmark.backend_contract import LARGE, contract, time_and_bytes, time_of
from attn_plugins.benchmark.cells import described
from attn_plugins.benchmark.gpu_report import write_report
from attn_plugins.benchmark.gpu_training import training_records
from attn_plugins.config.output import check_folder
from attn_plugins.config.versions import versions
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.backend import list_backends
from attn_plugins.core.checked import place
from attn_plugins.core.registry import get_attention, list_attentions

SHARES = {"contract": 0.3, "kernels": 0.4, "training": 0.3}
"""Part -> its share of the time; what one leaves over, the next ones get."""
LENGTHS = (1024, 4096, 16384, 65536, 131072)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
LONGEST_PASS = 2.0
"""Seconds. A length at which a pass may take longer, judged by the length before, is left out."""


class Log:
    """Records, each on disk as soon as it is there, one a line of ``gpu_check.jsonl``."""

    def __init__(self, folder: Path, say: Callable[[str], None] = print):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.records, self._say = folder / "gpu_check.jsonl", [], say
        self.path.write_text("", encoding="utf-8")

    records: list[dict[str, Any]]

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._say(" ".join(f"{value}" if key == "part" else f"{key}={value}" for key, value in record.items()))


@dataclass(frozen=True)
class Target:
    """One attention by one of its forms or backends."""

    attention: str
    options: dict[str, Any]
    backend: str

    @property
    def labels(self) -> dict[str, Any]:
        return {"attention": self.attention, "options": self.options, "backend": self.backend}


def targets(attentions: Sequence[str], *, small: bool) -> list[Target]:
    """Every attention by its batched form, then by each backend, whether it serves it or not.

    Args:
        small: with options that matter on a few hundred tokens, beside the defaults.
    """
    found = []
    for backend in ("batched", *list_backends()):
        for name in attentions:
            examples = get_attention(name).examples
            if small and examples[0]:
                found.append(Target(name, examples[0], backend))
            if not small or not examples[0] or backend == "batched":
                found.append(Target(name, {}, backend))
    return found


def contract_record(target: Target, device: str) -> dict[str, Any]:
    """What the short contract says of a target: passed, refused with the reason, or failed with what differed."""
    started = time.perf_counter()
    record: dict[str, Any] = {"part": "contract", **target.labels}
    try:
        failures = contract(target.attention, target.options, target.backend, device, DTYPES)
        record |= {"passed": not failures, "failures": failures}
    except ValueError as error:
        record |= {"refused": str(error)}
    except Exception as error:  # kernels of others fail with whatever they like
        record |= {"passed": False, "failures": [described(error)]}
    return {**record, "took": round(time.perf_counter() - started, 2)}


def check_contracts(log: Log, attentions: Sequence[str], device: str, deadline: float, workers: int) -> None:
    """The contract of every target, in processes side by side, since most of it is compiling."""
    every = targets(attentions, small=True)
    if workers < 2:
        for number, target in enumerate(every):
            if time.monotonic() > deadline:
                log.add(_left_out("contract", every[number:]))
                return
            log.add(contract_record(target, device))
        return
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting = {pool.submit(contract_record, target, device): target for target in every}
        for done in _until(deadline, waiting):
            target = waiting.pop(done)
            error = done.exception()
            log.add(done.result() if error is None else _broke(target, error))
        if waiting:
            log.add(_left_out("contract", list(waiting.values())))
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]


def _until(deadline: float, waiting: dict[Future[Any], Target]) -> Iterator[Future[Any]]:
    try:
        yield from as_completed(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return


def _broke(target: Target, error: BaseException) -> dict[str, Any]:
    return {"part": "contract", **target.labels, "passed": False, "failures": [f"{type(error).__name__}: {error}"]}


def _left_out(part: str, what: Sequence[Target]) -> dict[str, Any]:
    names = [f"{one.attention} by {one.backend}" for one in what]
    return {"part": part, "left_out": f"{len(names)} for lack of time: {', '.join(names)}"}


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def baselines(length: int, device: str) -> dict[str, Callable[[], Attend]]:
    """Causal attention by what torch brings: name -> what makes it for a length."""

    def sdpa(backend: SDPBackend) -> Attend:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True)

        return attend

    def flex() -> Attend:
        blocks = create_block_mask(_causal, None, None, length, length, device=device)
        return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=blocks)

    return {
        "sdpa flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "flex causal": flex,
    }


def _causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q >= k


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def _tensors(length: int, device: str, heads: HeadShape) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    size = (1, length, heads.num_heads, heads.head_dim)
    drawn = (torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3))
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


def time_kernels(
    log: Log, attentions: Sequence[str], device: str, deadline: float, lengths: Sequence[int], heads: HeadShape = LARGE
) -> None:
    """Time and peak memory of a forward and backward pass: baselines, then every target, each from short to long."""

    def baseline(name: str, length: int) -> tuple[float, int]:
        attend = baselines(length, device)[name]()
        tensors = _tensors(length, device, heads)

        def run() -> None:
            out = attend(*tensors)
            torch.autograd.grad(out, tensors, torch.ones_like(out))

        return time_and_bytes(run, torch.device(device), at_most=0.2)

    def own(target: Target, length: int) -> tuple[float, int]:
        options = _with_length(target, length)
        return time_of(target.attention, options, target.backend, device, length, heads=heads, at_most=0.2)

    todo: list[tuple[dict[str, Any], Callable[[int], tuple[float, int]]]] = [
        ({"baseline": name}, partial(baseline, name)) for name in baselines(1, device)
    ]
    todo += [(target.labels, partial(own, target)) for target in targets(attentions, small=False)]
    left: list[str] = []
    for labels, measure in todo:
        name = labels.get("baseline") or f"{labels['attention']} by {labels['backend']}"
        before: tuple[int, float] | None = None
        for length in sorted(lengths):
            if time.monotonic() > deadline:
                left.append(f"{name} from {length} on")
                break
            if before is not None and before[1] * (length / before[0]) ** 2 > LONGEST_PASS:
                log.add({"part": "kernels", **labels, "length": length, "skipped": f"{before[1]:.2f} s at {before[0]}"})
                break
            record = {"part": "kernels", **labels, "length": length}
            started = time.perf_counter()
            try:
                seconds, peak = measure(length)
            except ValueError as error:
                log.add({**record, "refused": str(error)})
                break
            except Exception as error:  # out of memory, and what kernels of others fail with
                log.add({**record, "error": described(error)[:500]})
                _free(device)
                break
            tensor_bytes = 4 * length * heads.num_heads * heads.head_dim * 2
            took = round(time.perf_counter() - started, 2)
            log.add({**record, "seconds": seconds, "bytes": peak, "tensor_bytes": tensor_bytes, "took": took})
            before = (length, seconds)
    if left:
        log.add({"part": "kernels", "left_out": f"{len(left)} for lack of time: {', '.join(left)}"})


def _with_length(target: Target, length: int) -> dict[str, Any]:
    """Options, with tables that are large enough where an attention is built for a longest length."""
    longest = getattr(get_attention(target.attention).Config(), "max_length", None)
    return target.options if longest is None else {"max_length": max(longest, length), **target.options}


def _free(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def main(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where everything is written.")] = Path(
        "runs/gpu_check"
    ),
    part: Annotated[list[str] | None, typer.Option(help="contract, kernels or training. Repeatable; all.")] = None,
    attn: Annotated[list[str] | None, typer.Option("--attn", "-a", help="An attention. Repeatable; all.")] = None,
    seconds: Annotated[float, typer.Option(help="For everything together.")] = 450.0,
    device: Annotated[str, typer.Option(help="cuda, or another that torch knows.")] = "cuda",
    length: Annotated[list[int] | None, typer.Option(help="Tokens, of the part kernels. Repeatable.")] = None,
    workers: Annotated[int, typer.Option(help="Processes of the part contract.")] = 8,
) -> None:
    """Contract, time and memory, and training steps of every attention and backend on a GPU."""
    parts, attentions = part or list(SHARES), attn or list_attentions()
    unknown = [*({*parts} - {*SHARES}), *({*attentions} - {*list_attentions()})]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r}; allowed: a part of {', '.join(SHARES)}, an attention's name")
    end = time.monotonic() + seconds
    log = Log(check_folder(output_dir))
    log.add({"part": "place", **place(torch.device(device).type), "versions": versions(), "seconds": seconds})
    for number, one in enumerate(parts):
        now, rest = time.monotonic(), sum(SHARES[later] for later in parts[number:])
        deadline = now + (end - now) * SHARES[one] / rest
        if one == "contract":
            check_contracts(log, attentions, device, deadline, workers)
        elif one == "kernels":
            time_kernels(log, attentions, device, deadline, length or LENGTHS)
        else:
            for record in training_records(device, deadline):
                log.add(record)
        write_report(log.records, output_dir)
    print("files:", *[f"  {path}" for path in sorted(output_dir.iterdir())], sep="\n")


if __name__ == "__main__":
    typer.run(main)
