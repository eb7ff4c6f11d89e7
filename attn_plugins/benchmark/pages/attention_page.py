"""docs/attentions.md, written from the classes in the registry and what a benchmark has measured of them.

python -m attn_plugins.benchmark.pages.attention_page FOLDER writes the page and the tables of attentions in others,
of the project in that folder; figures are those of docs/benchmarks/cpu/results.jsonl.
"""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attn_plugins.benchmark.cost.kernels_report import says_pays_from
from attn_plugins.benchmark.pages.attention_tables import with_tables
from attn_plugins.benchmark.pages.leaderboard import with_leaderboard
from attn_plugins.benchmark.pages.starts_table import starts
from attn_plugins.benchmark.pages.task_tables import with_tasks
from attn_plugins.benchmark.pages.transfer_tables import with_measured
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import brief_number
from attn_plugins.config.versions import spelled_own
from attn_plugins.core.attention import Attention
from attn_plugins.core.capabilities import CAPABILITIES, capabilities
from attn_plugins.core.options import describe_options
from attn_plugins.core.registry import get_attention, list_attentions

OWN = "attn_plugins.attentions."
"""Where the package's own attentions live: an installed plug-in has its own documentation."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """How fast an attention was with some options, forward and backward together."""

    label: str
    causal: bool
    ratios: dict[int, float]
    """Length -> times as fast as torch's own attention, median of the rounds."""
    lowest: dict[int, float]
    """Length -> the same in the slowest round."""


def timed(results: Results) -> dict[str, list[Timed]]:
    """What a benchmark measured, by the attention's name, in the order in which it was measured."""
    found: dict[tuple[str, str], Timed] = {}
    for record in results.records.values():
        settings = record["settings"]
        name = settings["source"].get("type")
        if name is None or settings["which"] != "forward_backward" or record["status"] != "ok":
            continue
        new = Timed(label=record["label"], causal=settings["causal"], ratios={}, lowest={})
        one = found.setdefault((name, record["label"]), new)
        one.ratios[settings["length"]] = record["result"]["times_as_fast"]
        one.lowest[settings["length"]] = record["result"]["lowest"]
    by_name: dict[str, list[Timed]] = {}
    for (name, _), one in found.items():
        by_name.setdefault(name, []).append(one)
    return by_name


def measured_on(results: Results) -> list[str]:
    """Shapes, machines and versions that figures are from."""
    found = []
    for record in results.records.values():
        shape, made = record["settings"], record["versions"]
        number = int(record.get("result", {}).get("threads", made["threads"]))
        threads = f"{number} thread{'' if number == 1 else 's'}"
        found.append(
            f"{spelled_own(made)}, batch {shape['batch_size']}, {shape['num_heads']} heads of {shape['head_dim']}, "
            f"{shape['dtype']}, on {made['device']}, {threads}, torch {made['torch']}"
        )
    return list(dict.fromkeys(found)) or ["not measured yet"]


def own_attentions() -> list[type[Attention]]:
    """The package's own attentions, by name."""
    return [a for a in map(get_attention, list_attentions()) if a.__module__.startswith(OWN)]


def pages(root: Path) -> dict[Path, str]:
    """What is to stand in each page that the registry makes, or has a table in."""
    docs = root / "docs"
    transfer = docs / "benchmarks" / "transfer"
    started = starts(transfer / "starts.jsonl", transfer / "encoder_starts.jsonl")
    written = {docs / "attentions.md": page(docs / "benchmarks" / "cpu" / "results.jsonl", started)}
    for other in (root / "README.md", docs / "generation.md"):
        written[other] = with_tables(other.read_text(encoding="utf8"), own_attentions())
    written[root / "README.md"] = with_measured(written[root / "README.md"], transfer)
    written[docs / "transfer.md"] = with_measured((docs / "transfer.md").read_text(encoding="utf8"), transfer)
    tasks = (docs / "tasks.md").read_text(encoding="utf8")
    written[docs / "tasks.md"] = with_tasks(tasks, docs / "benchmarks" / "tasks")
    board = docs / "leaderboard.md"
    written[board] = with_leaderboard(board.read_text(encoding="utf8"), docs)
    return written


def page(measured: Path, started: Sequence[str] = ()) -> str:
    """The text of docs/attentions.md, with the figures of a benchmark's results.jsonl.

    Args:
        started: tables of where attentions start in pretrained models.
    """
    own = sorted(own_attentions(), key=lambda a: (a.family, a.name))
    results = Results(measured)
    figures = timed(results)
    lines = [
        "# Attentions",
        "",
        "Written by `make docs` from the classes in the registry: change a docstring there, not this file.",
        "",
        "| name | family | cost of a head | pays from | "
        + " | ".join(name.replace("_", " ") for name in CAPABILITIES)
        + " |",
        "|---" * (4 + len(CAPABILITIES)) + "|",
    ]
    for attention in own:
        honoured = ["yes" if name in capabilities(attention) else "" for name in CAPABILITIES]
        pays = "; ".join(dict.fromkeys(says_pays_from(one.lowest) for one in figures.get(attention.name, ())))
        first = [f"[{attention.name}](#{attention.name})", attention.family, attention.cost, pays]
        lines.append(f"| {' | '.join([*first, *honoured])} |")
    lines += [
        "",
        "A column says what an attention can honour. What it cannot, it refuses with an error and never leaves out in",
        "silence. N is the length, D the size of a head. `any mask` means masks beyond causal, padding and packed",
        "segments: a model's own sliding window, prefixes, image blocks. `dropout` is that of attention weights in",
        "training. Methods that define none run without it, and a warning says so where the model asks for it, once,",
        "when it is swapped.",
        "",
        "Infinities and NaN at padded positions stay there in the fast forms of "
        + ", ".join(sorted(f"`{a.name}`" for a in own if a.clean_padding))
        + ". Elsewhere they",
        "reach real tokens, as in torch's own attention: a weight of 0 times NaN is NaN. Models put numbers there.",
        "",
        "`pays from` is the length in tokens from which every round was faster than torch's own attention, which is",
        "`scaled_dot_product_attention`:",
        f"forward and backward together, the attention alone: {'; '.join(measured_on(results))}.",
        "Several values are for several options. All lengths, spread, memory and other packages are in",
        "[benchmarks/cpu](benchmarks/cpu/report.md). On another machine it is another length: `attn-plugins bench`.",
    ]
    if started:
        lines += [
            "",
            "## Where each starts",
            "",
            "A pretrained model, swapped in all layers and not trained. Each attention at its defaults, and without",
            "the first tokens or blocks that it keeps by default. The error of layers is the squared error of their",
            "outputs relative to squares of the model's own, each given what the unswapped model gives it: 1 is as",
            "bad as zeros. [transfer](transfer.md) says what training makes of it.",
            *started,
        ]
    for attention in own:
        lines += ["", *_section(attention, figures.get(attention.name, []))]
    return "\n".join(lines) + "\n"


def _section(attention: type[Attention], figures: list[Timed]) -> list[str]:
    source = attention.__module__.replace(".", "/") + ".py"
    lines = [f"## {attention.name}", "", inspect.getdoc(attention) or "", ""]
    lines += [f"- When to use it: {attention.when}"] if attention.when else []
    lines += [f"- Cost: {attention.cost}", f"- Paper: {attention.paper}"]
    lines += [f"- Keeps, when text is generated, a key/value head: {attention.keeps}"] if attention.causal else []
    if not figures:
        lines += [f"- Not measured yet: `attn-plugins bench --attn {attention.name}` does"]
    for one in figures:
        ratios = ", ".join(f"{brief_number(ratio)}x at {length}" for length, ratio in sorted(one.ratios.items()))
        beside = "causal attention" if one.causal else "attention over the whole sequence"
        lines.append(f"- Measured, `{one.label}`, beside torch's {beside}: {ratios}")
    lines += [f"- Honours: {', '.join(capabilities(attention))}", f"- Source: [{source}](../{source})"]
    tested = ", ".join(f"`{example}`" if example else "the defaults" for example in attention.examples)
    lines += [f"- Tested on a few dozen tokens with: {tested}"]
    declared = describe_options(attention.Config)
    if declared:
        lines += ["", "Options:", ""]
        lines += [f"- `{o.name}: {o.type}{f' = {o.default}' if o.default else ''}` {o.doc}".rstrip() for o in declared]
    else:
        lines += ["- Options: none"]
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m attn_plugins.benchmark.pages.attention_page FOLDER")
    for target, text in pages(Path(sys.argv[1])).items():
        target.write_text(text, encoding="utf8")
