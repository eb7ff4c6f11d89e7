"""A pretrained decoder's body under other attentions, beside itself: ratios of times; writes whole_model.json.

python docs/benchmarks/whole_model.py --model FOLDER [--layers 6] [--rounds 3] [--output whole_model.json]

Time of the process on one thread of a CPU. The body has its first layers and no head; its weights are frozen, and
"training" is a pass whose gradients go to the embedded tokens and to the attention's own weights, as with adapters.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers as tf

import attn_plugins as ap
from attn_plugins.benchmark.cost.timing import Workload, compared, cpu_rates, interleaved
from attn_plugins.config.versions import hardware

ATTENTIONS = {
    "softmax, through the slot": "softmax",
    "local 256 + 4 sinks": {"type": "local", "window_size": 256, "num_sink_tokens": 4},
    "linear elu": {"type": "linear", "feature_map": "elu"},
    "linear_window": {"type": "linear_window", "window_size": 64},
    "block_topk 4": {"type": "block_topk", "topk": 4},
}
BACKENDS = {"PyTorch": "torch", "C++": "cpp"}
COMPILED = ("local 256 + 4 sinks", "linear elu", "linear_window", "block_topk 4")
"""Those that compiled kernels serve, measured by both."""


def body(folder, layers, rule=None):
    """The model's first layers, frozen but for what the attention adds."""
    model = tf.AutoModel.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=layers).eval()
    model.requires_grad_(False)
    if rule is not None:
        ap.swap_attention(model, rule)
    return model


def contenders(folder, layers):
    yield "dense", body(folder, layers)
    for name, rule in ATTENTIONS.items():
        for by, backend in BACKENDS.items():
            if backend == "torch" or name in COMPILED:
                options = {"type": rule} if isinstance(rule, str) else rule
                yield f"{name}, {by}", body(folder, layers, {**options, "backend": backend})


def work(model, tokens, training):
    embedded = model.get_input_embeddings()(torch.arange(tokens)[None] % 40000).detach()

    def forward():
        with torch.no_grad():
            model(inputs_embeds=embedded, use_cache=False)

    def forward_backward():
        given = embedded.clone().requires_grad_()
        model(inputs_embeds=given, use_cache=False).last_hidden_state.sum().backward()
        model.zero_grad(set_to_none=True)

    return [Workload(run=forward_backward if training else forward, count=1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or name of a decoder such as SmolLM2-135M")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forward", type=int, nargs="*", default=[512, 2048], help="tokens")
    parser.add_argument("--training", type=int, nargs="*", default=[512, 4096, 8192], help="tokens")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    models, rows = dict(contenders(args.model, args.layers)), []
    for training, lengths in ((False, args.forward), (True, args.training)):
        for tokens in lengths:
            rounds = args.rounds * (5 if tokens <= 1024 else 1)
            given = {name: work(model, tokens, training) for name, model in models.items()}
            seconds = interleaved(given, rounds, torch.device("cpu"))
            for name, found in seconds.items():
                told = {"attention": name, "pass": "training" if training else "forward", "tokens": tokens}
                figures = compared(found, seconds["dense"])
                rows.append({**told, "rounds": rounds, **{key: round(x, 4) for key, x in figures.items()}})
                print(rows[-1], flush=True)
    written = {
        "versions": {"torch": torch.__version__, "transformers": tf.__version__, "attn_plugins": ap.__version__},
        "hardware": hardware(),
        "gflops": {name: round(rate) for name, rate in cpu_rates().items()},
        "figure": "time of the process on one thread; times as fast as dense in the same round, median",
        "layers": args.layers,
        "rows": rows,
    }
    args.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
