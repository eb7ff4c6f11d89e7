"""How long does a model last? Perplexity along long texts, read piece by piece through one cache, by attention.

    python examples/long_document.py ESSAY.txt [MORE.txt ...]
    python examples/long_document.py ESSAY.txt --attention dense=null --attention "window={type: local}"

Each result goes to results.jsonl in the output folder as it comes, so a run that was stopped goes on where it was;
long_document.png is drawn from that file.
"""

import argparse
import math
import time
from pathlib import Path

from datasets import Dataset

from attn_plugins.benchmark.results.store import Results, hash_of
from attn_plugins.config.versions import versions
from attn_plugins.config.yaml import parse_yaml
from attn_plugins.tasks import get_task, run_task
from attn_plugins.training.evaluate import place
from attn_plugins.training.models import DEMO, load, read_attention, skeleton

SINKS = "type: local, window_size: 512, num_sink_tokens: 4"
ATTENTIONS = [
    "dense=null",
    "window 512={type: local, window_size: 512, num_sink_tokens: 0}",
    f"window 512 + 4 sinks={{{SINKS}}}",
    f"window 512 + 4 sinks, positions of the cache={{{SINKS}, positions: cache}}",
]


def measure(args: argparse.Namespace, results: Results) -> dict[str, list[dict]]:
    """Label -> what the task found in each text."""
    cls = get_task("streaming_perplexity")
    task = cls(cls.Config(length=args.length, piece=args.piece, stretch=args.stretch))
    found: dict[str, list[dict]] = {}
    for label, _, rule in (given.partition("=") for given in args.attention or ATTENTIONS):
        rule, loaded = read_attention(parse_yaml(rule)), None
        for text in args.texts:
            content = text.read_text(encoding="utf-8")
            settings = {"model": args.model, "rule": rule, "task": vars(task.config), "dtype": "float32"}
            key = hash_of({**settings, "text": content})
            if not results.done(key):
                loaded = loaded or place(load(args.model, attention=rule, dtype="float32"))
                batches = task.prepare(Dataset.from_dict({"text": [content]}), loaded.tokenizer, loaded.model)
                started = time.perf_counter()
                figures = run_task(task, loaded.model, batches, progress=f"{label}: {text.stem}")
                results.add(
                    {
                        "key": key,
                        "attention": label,
                        "text": text.stem,
                        "status": "ok",
                        "result": figures,
                        "seconds": round(time.perf_counter() - started, 1),
                        "settings": settings,
                        "versions": versions(),
                    }
                )
            found.setdefault(label, []).append(results.records[key]["result"])
    return found


def along(figures: list[dict]) -> list[tuple[int, float]]:
    """(last position of a stretch, perplexity there over all texts)."""
    rows = zip(*(one["by_position"] for one in figures), strict=True)
    return [
        (parts[0]["to"], math.exp(sum(math.log(part["perplexity"]) for part in parts) / len(parts))) for parts in rows
    ]


def table(found: dict[str, list[dict]]) -> str:
    """Markdown: a column for each stretch."""
    first = next(iter(found.values()))
    ends = [str(end + 1) for end, _ in along(first)]
    lines = [["up to token", *ends, "cache at the end"], ["---", *["---:"] * (len(ends) + 1)]]
    for label, figures in found.items():
        size = f"{max(one['cache_bytes'] for one in figures) / 2**20:.1f} MiB"
        lines.append([label, *(f"{value:.1f}" for _, value in along(figures)), size])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(found: dict[str, list[dict]], path: Path, limit: int | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, figures in found.items():
        ends, values = zip(*along(figures), strict=True)
        axes.plot([end + 1 for end in ends], values, marker="o", label=label)
    if limit is not None and limit < max(ends):
        axes.axvline(limit, color="grey", linestyle=":", label="longest text in pretraining")
    number = len(next(iter(found.values())))
    title = f"read through one cache, {number} text{'s' if number > 1 else ''}"
    axes.set(xlabel="tokens read", ylabel="perplexity of the stretch", title=title, yscale="log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="a text file of at least --length tokens")
    parser.add_argument("--model", default=DEMO, help="a folder, a name on the hub, or %(default)s (the default)")
    parser.add_argument("--length", type=int, default=16384, help="tokens of each text (default %(default)s)")
    parser.add_argument("--piece", type=int, default=512, help="tokens read at a time (default %(default)s)")
    parser.add_argument("--stretch", type=int, default=2048, help="tokens in a point of the plot (default %(default)s)")
    parser.add_argument(
        "--attention", action="append", metavar="LABEL=RULE", help="null for the model's own; repeat it to compare"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/long_document"))
    args = parser.parse_args()
    results = Results(args.output_dir / "results.jsonl")
    with results.lock():
        found = measure(args, results)
    limit = getattr(skeleton(args.model).config.get_text_config(), "max_position_embeddings", None)
    plot(found, args.output_dir / "long_document.png", limit)
    print(table(found))


if __name__ == "__main__":
    main()
