"""What a machine with a GPU can say of every attention and backend in minutes: make gpu-check.

``python -m attn_plugins.benchmark.checks.gpu_check --help``. Nothing is installed or fetched. Three parts, each with
its share of the time: the contract of every backend, time and peak memory by length, and whole training steps of a
model of SmolLM2's sizes. Each figure is on disk as soon as it is there, so a run that is killed keeps what it has, and
what the time did not suffice for is named.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.benchmark.checks.apart import each_apart
from attn_plugins.benchmark.checks.backend_contract import LARGE, contract, time_and_bytes, time_of
from attn_plugins.benchmark.checks.gpu_report import write_report
from attn_plugins.benchmark.checks.gpu_training import training_record, training_steps
from attn_plugins.benchmark.results.cells import described
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
AT_MOST = 0.2
"""Seconds after which a length is not timed once more."""
PATIENCE = 120.0
"""Seconds after which one target is given up: a kernel may hang."""
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

    def __str__(self) -> str:
        return f"{self.attention} by {self.backend}"

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


def contract_record(target: Target, device: str) -> Iterator[dict[str, Any]]:
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
    yield {**record, "took": round(time.perf_counter() - started, 2)}


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


def kernel_records(
    what: Target | str, device: str, lengths: Sequence[int], heads: HeadShape = LARGE
) -> Iterator[dict[str, Any]]:
    """Time and peak memory of a forward and backward pass, from short to long, of a target or of a baseline's name."""
    before: tuple[int, float] | None = None
    for length in sorted(lengths):
        record: dict[str, Any] = {"part": "kernels", **_labels(what), "length": length}
        if before is not None and before[1] * (length / before[0]) ** 2 > LONGEST_PASS:
            yield {**record, "skipped": f"{before[1]:.2f} s at {before[0]}"}
            return
        started = time.perf_counter()
        try:
            if isinstance(what, str):
                seconds, peak = _time_of_baseline(what, length, device, heads)
            else:
                options = _with_length(what, length)
                seconds, peak = time_of(
                    what.attention, options, what.backend, device, length, heads=heads, at_most=AT_MOST
                )
        except ValueError as error:
            yield {**record, "refused": str(error)}
            return
        except Exception as error:  # out of memory, and what kernels of others fail with
            yield {**record, "error": described(error)[:500]}
            return
        tensor_bytes = 4 * length * heads.num_heads * heads.head_dim * 2
        took = round(time.perf_counter() - started, 2)
        yield {**record, "seconds": seconds, "bytes": peak, "tensor_bytes": tensor_bytes, "took": took}
        before = (length, seconds)


def _labels(what: Target | str) -> dict[str, Any]:
    return {"baseline": what} if isinstance(what, str) else what.labels


def _time_of_baseline(name: str, length: int, device: str, heads: HeadShape) -> tuple[float, int]:
    attend = baselines(length, device)[name]()
    tensors = _tensors(length, device, heads)

    def run() -> None:
        out = attend(*tensors)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return time_and_bytes(run, torch.device(device), at_most=AT_MOST)


def _with_length(target: Target, length: int) -> dict[str, Any]:
    """Options, with tables that are large enough where an attention is built for a longest length."""
    longest = getattr(get_attention(target.attention).Config(), "max_length", None)
    return target.options if longest is None else {"max_length": max(longest, length), **target.options}


def run_part(
    part: str, log: Log, attentions: Sequence[str], device: str, deadline: float, lengths: Sequence[int], processes: int
) -> None:
    """One part, in processes of its own, until a time is reached; what was left out is named."""
    if part == "contract":
        items: Sequence[Any] = targets(attentions, small=True)
        work: Callable[[Any], Iterator[dict[str, Any]]] = partial(contract_record, device=device)
    elif part == "kernels":
        items = [*baselines(1, device), *targets(attentions, small=False)]
        work = partial(kernel_records, device=device, lengths=tuple(lengths))
    else:
        items, work = training_steps(), partial(training_record, device=device)

    def failed(item: Any, why: str) -> dict[str, Any]:
        if part == "contract":
            return {"part": part, **item.labels, "passed": False, "failures": [why]}
        labels = _labels(item) if part == "kernels" else item.labels
        return {"part": part, **{"length": min(lengths), **labels}, "error": why}

    if part == "contract":
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # of each process
    left = each_apart(
        items,
        work,
        processes=processes if part == "contract" else min(1, processes),  # nothing beside what is timed
        deadline=deadline,
        patience=PATIENCE,
        add=log.add,
        failed=failed,
    )
    os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS", None)
    if left:
        log.add({"part": part, "left_out": f"{len(left)} for lack of time: {'; '.join(map(str, left))}"})


def main(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where everything is written.")] = Path(
        "runs/gpu_check"
    ),
    part: Annotated[list[str] | None, typer.Option(help="contract, kernels or training. Repeatable; all.")] = None,
    attn: Annotated[list[str] | None, typer.Option("--attn", "-a", help="An attention. Repeatable; all.")] = None,
    seconds: Annotated[float, typer.Option(help="For everything together.")] = 450.0,
    device: Annotated[str, typer.Option(help="cuda, or another that torch knows.")] = "cuda",
    length: Annotated[list[int] | None, typer.Option(help="Tokens, of the part kernels. Repeatable.")] = None,
    processes: Annotated[int, typer.Option(help="Of the part contract; 0 is this one for everything.")] = 8,
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
        run_part(one, log, attentions, device, deadline, length or LENGTHS, processes)
        write_report(log.records, output_dir)
    print("files:", *[f"  {path}" for path in sorted(output_dir.iterdir())], sep="\n")


if __name__ == "__main__":
    typer.run(main)
