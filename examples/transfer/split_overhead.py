"""What it costs that several attentions share a layer: the split attention against its parts alone, on one CPU thread.

    python examples/transfer/split_overhead.py             9 rounds of 4096 tokens
    python examples/transfer/split_overhead.py --rounds 3 --length 1024

A layer of SmolLM2-135M's sizes (9 query heads, 3 key/value heads of 64), float32, random inputs. Each round runs the
split attention and then each of its parts alone, on heads that were cut out before, and takes the difference as a part
of the split attention's CPU time: slices, and putting outputs together. Against the model's own attention it is that of
the whole module, projections too. A line of JSON for each pair goes to --out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attn_plugins as ap
from attn_plugins.benchmark.cost.timing import Workload, parts
from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.versions import versions
from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.names import slot_of

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "transfer" / "split_overhead.jsonl"

WINDOW = {"type": "local", "window_size": 256, "num_sink_tokens": 4}
PAIRS: dict[str, list[dict[str, Any]]] = {
    "softmax [1] beside softmax": [{"type": "softmax", "kv_heads": [1]}, {"type": "softmax"}],
    "softmax [2] beside local": [{"type": "softmax", "kv_heads": [2]}, WINDOW],
    "softmax [0, 2] beside linear": [
        {"type": "softmax", "kv_heads": [0, 2]},
        {"type": "linear", "feature_map": "hedgehog"},
    ],
}
OWN = "own beside softmax [1], against the model's own"
PASSES = ("forward", "forward_backward")


def layer(seed: int, rules: Any = None) -> Any:
    """A model of one such layer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 576, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3)).eval()
    return model if rules is None else ap.swap_attention(model, rules)


def measure(seed: int, *, rounds: int = 9, length: int = 4096) -> dict[str, dict[str, float]]:
    """pair and pass -> what the split costs, as a part of the attention's time: median, lowest and highest round."""
    before, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for name in (*PAIRS, OWN):
            for which in PASSES:
                found[f"{name}, {which}"] = cost(name, which, seed, rounds, length)
    finally:
        torch.set_num_threads(before)
    return found


def cost(name: str, which: str, seed: int, rounds: int, length: int) -> dict[str, float]:
    """As :func:`measure`, of one pair and pass."""
    if name == OWN:
        ids = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(seed))
        split = layer(seed, [{"type": "softmax", "kv_heads": [1]}])
        contenders = {
            "split": parts(split, ids, "attention", which),  # type: ignore[arg-type]
            "alone": parts(layer(seed), ids, "attention", which),  # type: ignore[arg-type]
        }
    else:
        contenders = _alone_and_split(layer(seed, PAIRS[name]), which, seed, length)
    seconds = _in_turn({name: work.run for name, (work,) in contenders.items()}, rounds)
    costs = sorted(1 - alone / split for split, alone in zip(seconds["split"], seconds["alone"], strict=True))
    return {
        "cost": round(statistics.median(costs), 4),
        "lowest": round(costs[0], 4),
        "highest": round(costs[-1], 4),
        "seconds": round(statistics.median(seconds["split"]), 4),
    }


def _in_turn(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each in each round, after one that is thrown away: other work on a machine counts for nothing."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in runs if number % 2 else reversed(runs):
            started = time.process_time()
            runs[name]()
            if number:
                seconds[name].append(time.process_time() - started)
    return seconds


def _alone_and_split(model: Any, which: str, seed: int, length: int) -> dict[str, list[Workload]]:
    slot: Any = slot_of(model.model.layers[0].self_attn)
    generator = torch.Generator().manual_seed(seed)
    # As a module's projections make them: heads lie beside each other in memory.
    q, k, v = (torch.randn(1, length, heads, 64, generator=generator).transpose(1, 2) for heads in (9, 3, 3))
    cut = [
        [x.contiguous() for x in (held.of_queries(q, 1), held.of_keys(k, 1), held.of_keys(v, 1))] for held in slot.taken
    ]
    calls = [(part, heads) for part, heads in zip(slot.parts, cut, strict=True)]
    return {
        "split": [Workload(run=_run([(slot, [q, k, v])], which, length), count=1)],
        "alone": [Workload(run=_run(calls, which, length), count=1)],
    }


def _run(calls: list[tuple[Any, list[torch.Tensor]]], which: str, length: int) -> Callable[[], None]:
    backward = which == "forward_backward"
    given = [(attention, [x.detach().requires_grad_(backward) for x in tokens]) for attention, tokens in calls]

    def run() -> None:
        mask = AttentionMask(1, length, length, causal=True)
        for attention, tokens in given:
            with torch.set_grad_enabled(backward):
                out, _ = attention(*tokens, mask=mask, scale=64**-0.5)
                if backward:
                    torch.autograd.backward(out.sum(), inputs=[*tokens, *attention.parameters()])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.out)
    for name in (*PAIRS, OWN):
        for which in PASSES:
            settings = {
                "pair": name,
                "pass": which,
                **{key: getattr(args, key) for key in ("seed", "rounds", "length")},
            }
            record = {"key": hash_of(settings), "status": "ok", "settings": settings}
            if results.done(record["key"]):
                continue
            record |= {"result": cost(name, which, args.seed, args.rounds, args.length), "versions": versions()}
            results.add(record)
            print(f"{name}, {which}:", json.dumps(record["result"]), flush=True)


if __name__ == "__main__":
    main()
