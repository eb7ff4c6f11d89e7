"""A long document by its sections: an encoder exact against the dense mask, and how its time grows with the document.

    python examples/structures/sections.py
    python examples/structures/sections.py --lengths 1024 4096 16384

Tokens see 128 tokens to either side in their section and the first token of every section; these see their section and
each other, as in ETC. The same BERT runs with `graph` at the cost of these pairs, and with dense attention under the
same mask. One thread; the ratio is of times in one run.
"""

import argparse
import time

import torch
from transformers import BertConfig, BertModel

import attn_plugins as ap

SECTION = 500
WINDOW = 128


def document(length: int) -> ap.Structure:
    """Sections of about SECTION tokens each, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(SECTION // 2, 3 * SECTION // 2, (2 * length // SECTION + 2,), generator=generator).cumsum(0)
    sections = torch.searchsorted(ends, torch.arange(length), right=True)
    return ap.Structure.sections(sections, window_size=WINDOW)


def timed(model: BertModel, ids: torch.Tensor, structure: ap.Structure) -> tuple[torch.Tensor, float]:
    """(Hidden states, seconds of a forward pass, the best of two)."""
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            out = model(ids, structure=structure).last_hidden_state
        best = min(best, time.perf_counter() - started)
    return out, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = BertConfig(vocab_size=1000, max_position_embeddings=max(args.lengths), **sizes)
    model = BertModel(config, add_pooling_layer=False).eval()
    print("| tokens | sections | pairs of all | greatest difference | graph, s | dense, s | dense / graph |")
    print("|---|---|---|---|---|---|---|")
    for length in args.lengths:
        structure, ids = document(length), torch.randint(1000, (1, length))
        ap.swap_attention(model, "graph", required=True)
        ours, fast = timed(model, ids, structure)
        ap.swap_attention(model, "softmax")
        dense, slow = timed(model, ids, structure)
        difference, sections = (ours - dense).abs().max().item(), int(structure.relations[0].k_BN.max()) + 1
        if difference > 1e-4:
            raise RuntimeError(f"graph and dense attention differ by {difference} at {length} tokens")
        print(
            f"| {length} | {sections} | {structure.num_pairs / length**2:.1%} | {difference:.1e} | {fast:.2f} "
            f"| {slow:.2f} | {slow / fast:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
