"""Longformer and BigBird under their own attention from the registry, beside their own code; writes own_patterns.json.

python docs/benchmarks/own_patterns.py [--tokens 2048 4096] [--rounds 3] [--output docs/benchmarks/own_patterns.json]
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers as tf

import attn_plugins as ap

SIZES = {
    "vocab_size": 100,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MODELS = {
    "longformer": "attention_window 512, global attention on 2 tokens",
    "bigbird": "block_size 64, num_random_blocks 3",
}


def built(attention, tokens):
    torch.manual_seed(0)
    sizes = {**SIZES, "max_position_embeddings": tokens + 2}
    if attention == "longformer":
        return tf.LongformerModel(tf.LongformerConfig(**sizes, attention_window=[512, 512], sep_token_id=2)).eval()
    return tf.BigBirdModel(tf.BigBirdConfig(**sizes, block_size=64, num_random_blocks=3)).eval()


def seconds(model, given, backward):
    """Of one pass over the whole model."""
    model.zero_grad()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        hidden = model(**given).last_hidden_state
        if backward:
            hidden.square().mean().backward()
    return time.perf_counter() - start, hidden.detach()


def measured(attention, tokens, rounds):
    """Rows of a forward pass and of one with its backward pass, and the largest difference of outputs."""
    own, swapped = built(attention, tokens), ap.swap_attention(built(attention, tokens), attention)
    given = {"input_ids": torch.randint(3, 100, (1, tokens))}
    if attention == "longformer":
        given["global_attention_mask"] = torch.zeros_like(given["input_ids"])
        given["global_attention_mask"][:, [0, tokens // 2]] = 1
    rows, largest = [], 0.0
    for backward in (False, True):
        taken = []
        for _ in range(rounds):
            (one, expected), (other, got) = (seconds(model, given, backward) for model in (own, swapped))
            taken.append((one, other))
            largest = max(largest, float((got - expected).abs().max()))
        least = [round(min(column), 3) for column in zip(*taken, strict=True)]
        name = "forward+backward" if backward else "forward"
        told = {"attention": attention, "tokens": tokens, "pass": name}
        rows.append({**told, "own_s": least[0], "attn_plugin_s": least[1]})
    return rows, largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [measured(attention, tokens, args.rounds) for attention in MODELS for tokens in args.tokens]
    written = {
        "versions": {"torch": torch.__version__.partition("+")[0], "transformers": tf.__version__},
        "device": "cpu, 1 thread",
        "batch": 1,
        "dtype": "float32",
        "layers": 2,
        "heads": "4 x 64",
        "mode": "eval",
        "figure": f"least of {args.rounds} rounds in turn, whole model, seconds",
        "largest_difference_of_outputs": float(f"{max(largest for _, largest in found):.2g}"),
        "models": MODELS,
        "rows": [row for rows, _ in found for row in rows],
    }
    args.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
