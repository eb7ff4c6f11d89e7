"""What attention over a graph costs beside dense attention under the same mask, by the number of nodes.

    python examples/structures/cost.py
    python examples/structures/cost.py --nodes 1024 4096 --output cost.json

One call of `graph` and one of torch's scaled_dot_product_attention with the mask as a boolean tensor, forward and
backward, on random graphs of the same degree; one thread, float32, 4 heads of 32. The dense mask is made before the
clock starts; `graph` makes its tables anew in every call, as in every forward pass of a model.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import attn_plugins as ap

HEADS, HEAD_DIM = 4, 32
LARGEST_BACKWARD = 4096
"""Nodes beyond which no backward is measured: the dense one would take minutes."""


def seconds(call: Callable[[], torch.Tensor], backward: bool, times: int) -> float:
    """The best of so many times."""
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        out = call()
        if backward:
            out.sum().backward()
        best = min(best, time.perf_counter() - started)
    return best


def measure(nodes: int, degree: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(nodes, (nodes * degree // 2, 2), generator=generator)
    structure = ap.Structure.graph(edges, nodes)
    q, k, v = (torch.randn(1, HEADS, nodes, HEAD_DIM, generator=generator) for _ in range(3))
    mask = ap.AttentionMask(1, nodes, nodes, causal=False).with_structure(structure)
    attention = ap.get_attention("graph")
    module = attention(attention.Config(required=True))
    dense_mask = torch.eye(nodes, dtype=torch.bool)
    dense_mask[edges[:, 0], edges[:, 1]] = dense_mask[edges[:, 1], edges[:, 0]] = True

    def graph() -> torch.Tensor:
        return module(q, k, v, mask=mask.with_structure(structure), scale=HEAD_DIM**-0.5)[0]

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=dense_mask)

    found: dict[str, float] = {"nodes": nodes, "degree": degree, "pairs": structure.num_pairs}
    for what, backward in (("forward", False), ("forward and backward", True))[: 1 + (nodes <= LARGEST_BACKWARD)]:
        for x in (q, k, v):
            x.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            ours, theirs = (seconds(call, backward, 2 if nodes <= 4096 else 1) for call in (graph, dense))
        found |= {f"graph, {what}": ours, f"dense, {what}": theirs, f"dense / graph, {what}": theirs / ours}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--degree", type=int, default=16)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| nodes | pairs | graph, s | dense, s | dense / graph | with backward |\n|---|---|---|---|---|---|")
    rows = []
    for nodes in args.nodes:
        row = measure(nodes, args.degree)
        rows.append(row)
        both = row.get("dense / graph, forward and backward")
        print(
            f"| {nodes} | {row['pairs']} | {row['graph, forward']:.3f} | {row['dense, forward']:.3f} "
            f"| {row['dense / graph, forward']:.2f} | {'' if both is None else f'{both:.2f}'} |",
            flush=True,
        )
    if args.output is not None:
        about = {"device": platform.machine(), "threads": 1, "torch": torch.__version__, "heads": [HEADS, HEAD_DIM]}
        args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
