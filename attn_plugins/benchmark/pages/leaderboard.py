"""Tables of docs/leaderboard.md, and which attention they speak for, by what is needed.

``make leaderboard`` measures; what it keeps in docs/benchmarks/leaderboard is read with the results of the demo and of
docs/benchmarks/tasks. Each table stands between two comments, as those of
:mod:`attn_plugins.benchmark.pages.attention_tables`.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch

from attn_plugins.benchmark.compare.models import HEADS
from attn_plugins.benchmark.pages.attention_tables import between_comments
from attn_plugins.benchmark.pages.seed_tables import Record, made
from attn_plugins.benchmark.pages.task_tables import FIGURES, task_of
from attn_plugins.benchmark.results.statistics import LEVEL, difference, spelled, summary
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import brief_number
from attn_plugins.core.rules import parse_rules

BASE = "dense"
"""Label of the model's own attention in all of these comparisons."""
SCRATCH = ("associative-recall", "induction", "selective-copying")
DEVIATION = "mean ± standard deviation of the seeds"
NOISE = (
    "Differences are means ± standard errors, seed by seed; noise by a paired t test, two-sided, beyond it where p is "
    f"less than {LEVEL}."
)
STAGES = {"evaluate": "untrained", "transfer": "taught", "finetune": "tuned"}

Seeds = dict[int, dict[str, Any]]
"""Result by seed."""
Found = dict[str, Seeds]
"""Results by attention."""


class Measured:
    """Records of comparisons, as tables ask for them."""

    def __init__(self, records: Iterable[Record]):
        given = list(records)
        self.records = [one for one in given if one["status"] == "ok"]
        self.failed = {one["attention"]: one["error"] for one in given if one["status"] == "error"}
        """Attention -> why it has no figure."""

    def of(self, task: str, measure: str) -> Found:
        """What was measured by a task, at a stage."""
        found: Found = {}
        for one in self.which(task, measure):
            found.setdefault(one["attention"], {})[one["seed"]] = one["result"]
        return found

    def which(self, task: str, measure: str | None = None) -> list[Record]:
        """The records of this."""
        return [
            one
            for one in self.records
            if one["measure"] in STAGES and measure in (None, one["measure"]) and task_of(one["settings"]) == task
        ]

    def bytes_of(self, attention: str) -> int | None:
        """Of its cache in a comparison at equal budget."""
        for one in self.records:
            if one["measure"] == "cost" and one["attention"] == attention and "bytes" in one["result"]:
                return one["result"]["bytes"]
        return None

    @functools.cached_property
    def bounded(self) -> dict[str, bool | None]:
        """Attention -> whether its cache stops growing; None for hybrids and what is chosen."""
        return {one["attention"]: _bounded(one["settings"]["rules"]) for one in self.records}


def _bounded(rules: Any) -> bool | None:
    if not isinstance(rules, list):
        return False if rules is None else None
    parsed = parse_rules(rules)
    if len(parsed) > 1 or parsed[0].to_dict().get("layers") is not None:
        return None
    with torch.device("meta"):
        state = parsed[0].attention(parsed[0].config, HEADS).new_state()
    return state is not None and not state.grows


def value(found: Found, attention: str, read: Callable[[dict[str, Any]], float]) -> dict[int, float]:
    """A figure of an attention, by seed."""
    return {seed: read(result) for seed, result in found.get(attention, {}).items()}


def headline(result: dict[str, Any]) -> float:
    return result["value"]


def _cell(figures: Mapping[int, float]) -> str:
    return spelled(list(figures.values()))


def _beside(own: Mapping[int, float], base: Mapping[int, float]) -> str:
    return str(difference(own, base)) if own and base else ""


def _lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _cache(measured: Measured, attention: str) -> str:
    return {True: "bounded", False: "grows", None: "in part"}[measured.bounded.get(attention)]


def _mean(figures: Mapping[int, float]) -> float:
    return summary(list(figures.values())).mean


def from_scratch(measured: Measured) -> list[str]:
    """Many pairs, what stood before and what is no noise, by tiny models trained with each attention."""
    many = measured.of(SCRATCH[0], "finetune")
    others = {task: its for task in SCRATCH[1:] if (its := measured.of(task, "finetune"))}
    counts = [part["pairs"] for part in next(iter(next(iter(many.values())).values()))["figures"]["by_pairs"]]

    def pairs(number: int) -> Callable[[dict[str, Any]], float]:
        return lambda result: result["figures"]["by_pairs"][number]["accuracy"]

    header = ["attention", "its cache", *(f"{count} pairs" for count in counts), f"all, against {BASE}"]
    header += [task.replace("-", " ") for task in others]
    rows = []
    for attention in sorted(many, key=lambda name: -_mean(value(many, name, headline))):
        own = value(many, attention, headline)
        row = [attention, _cache(measured, attention)]
        row += [_cell(value(many, attention, pairs(number))) for number in range(len(counts))]
        row.append("" if attention == BASE else _beside(own, value(many, BASE, headline)))
        rows.append([*row, *(_cell(value(its, attention, headline)) for its in others.values())])
    trained = [one for task in SCRATCH for one in measured.which(task)]
    return [*_lines(header, rows), "", NOISE, "", made(trained, DEVIATION)]


def untrained(measured: Measured) -> list[str]:
    """Every attention in a pretrained decoder, before any training."""
    found = measured.of("perplexity", "evaluate")
    rows = []
    for attention in sorted(found, key=lambda name: _mean(value(found, name, headline))):
        (result, *_) = found[attention].values()
        recall = result["others"]["recall"]
        cells = [brief_number(result["value"]), brief_number(result["figures"]["by_position"][-1]["perplexity"])]
        for part in recall["by_part"].values():
            cells += [brief_number(one["accuracy"]) for one in part["by_distance"]]
        rows.append([attention, _cache(measured, attention), *cells])
    parts = next(iter(next(iter(found.values())).values()))["others"]["recall"]["by_part"]
    header = ["attention", "its cache", "perplexity", "in the last quarter"]
    header += [f"{name} at {one['distance']}" for name, part in parts.items() for one in part["by_distance"]]
    return [*_lines(header, rows), *_left_out(measured), "", made(measured.which("perplexity", "evaluate"), DEVIATION)]


def _left_out(measured: Measured) -> list[str]:
    told = [f"`{name}` ({why.partition(': ')[2] or why})" for name, why in measured.failed.items()]
    return ["", f"Left out: {', '.join(told)}."] if told else []


def equal_budget(measured: Measured) -> list[str]:
    """Attentions at the same bytes of keys and values, without training."""
    quality, recall = measured.of("perplexity", "evaluate"), measured.of("recall", "evaluate")
    rows = []
    whole = measured.bytes_of(BASE)
    for attention in sorted(quality, key=lambda name: _mean(value(quality, name, headline))):
        kept = measured.bytes_of(attention)
        row = [attention, "" if kept is None or not whole else f"{kept / whole:.1%}"]
        row.append(_cell(value(quality, attention, headline)))
        for result in recall.get(attention, {}).values():
            row += [brief_number(one["accuracy"]) for one in result["figures"]["by_distance"]]
            break
        rows.append(row)
    figures = [result["figures"] for its in recall.values() for result in its.values()]
    distances = [one["distance"] for its in figures for one in its["by_distance"]]
    header = ["attention", "bytes kept", "perplexity", *(f"recall at {n}" for n in dict.fromkeys(distances))]
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    return [*_lines(header, rows), "", made(measured.which("perplexity"), DEVIATION)]


def tuned(measured: Measured) -> list[str]:
    """A pretrained decoder as it is swapped, taught, and after a short fine-tune."""
    task = "perplexity"
    rows = []
    stages = [measured.of(task, measure) for measure in STAGES]
    last = stages[-1]
    attentions = {one["attention"]: None for one in measured.which(task)}
    for attention in sorted(attentions, key=lambda name: _mean(value(last, name, headline)) if name in last else inf):
        recall = {seed: one["others"]["recall"]["accuracy"] for seed, one in last.get(attention, {}).items()}
        rows.append([attention, *(_cell(value(its, attention, headline)) for its in stages), _cell(recall)])
    header = ["attention", *STAGES.values(), "recall, tuned"]
    return [*_lines(header, rows), "", made(measured.which(task), DEVIATION)]


def tasks(comparisons: Sequence[tuple[str, Measured]]) -> list[str]:
    """Other models and tasks: the model's own attention beside the best other one after the same training."""
    rows = []
    for name, its in comparisons:
        for task, figures in FIGURES.items():
            found = its.of(task, "finetune")
            if not {*found} > {BASE}:
                continue
            metric, heading = next(iter(figures.items()))
            read = functools.partial(_figure, metric)
            lower = next(iter(found[BASE].values()))["better"] == "lower"
            others = [attention for attention in found if attention != BASE]
            best = min(others, key=lambda one: _mean(value(found, one, read)) * (1 if lower else -1))
            own, base = value(found, best, read), value(found, BASE, read)
            sense = f"{heading}, {'lower' if lower else 'higher'} is better"
            rows.append([name.replace("_", " "), sense, _cell(base), best, _cell(own), _beside(own, base)])
    return [
        *_lines(["task", "figure", BASE, "best other", "its figure", "difference"], rows),
        "",
        f"{DEVIATION.capitalize()}. {NOISE}",
    ]


def _figure(metric: str, result: dict[str, Any]) -> float:
    return result["figures"][metric]


def needs(board: "Board") -> list[str]:
    """Which attention for which need: what the tables above have at their top, where they have one."""
    return [f"- **{need}**: {answer}" for need, answer in _needs(board) if answer]


def _needs(board: "Board") -> Iterator[tuple[str, str]]:
    if board.scratch.records:
        many = board.scratch.of(SCRATCH[0], "finetune")
        bounded = [name for name in many if board.scratch.bounded.get(name)]
        most = next(iter(next(iter(many.values())).values()))["figures"]["by_pairs"][-1]["pairs"]
        need = f"Many facts at once in a cache that stays small ({most} pairs, from scratch)"
        yield need, _first(many, bounded, lambda result: -_most_pairs(result), _most_pairs)
    if board.zoo.records:
        found = board.zoo.of("perplexity", "evaluate")
        bounded = [name for name in found if board.zoo.bounded.get(name)]
        yield "A pretrained decoder, no training, a bounded cache (perplexity)", _first(found, bounded, headline)
    if board.quick.records:
        recall = board.quick.of("recall", "evaluate")
        need = "A pretrained decoder, no training, a quarter of the bytes (recall)"
        yield need, _first(recall, recall, lambda result: -headline(result), headline)
    if board.demo.records:
        found = board.demo.of("perplexity", "finetune")
        yield "A pretrained decoder, minutes of LoRA (perplexity)", _first(found, found, headline)


def _first(
    found: Found,
    names: Iterable[str],
    order: Callable[[dict[str, Any]], float],
    read: Callable[[dict[str, Any]], float] = headline,
) -> str:
    """The first three of these attentions, lowest order first, beside the baseline; empty where there is none."""
    others = (name for name in names if name != BASE)
    ranked = sorted(others, key=lambda name: _mean(value(found, name, order)))[:3]
    told = ", ".join(f"`{name}` {_cell(value(found, name, read))}" for name in ranked)
    return told and f"{told}; {BASE} {_cell(value(found, BASE, read))}."


def _most_pairs(result: dict[str, Any]) -> float:
    return result["figures"]["by_pairs"][-1]["accuracy"]


class Board:
    """All results that the page is made of, by the comparison that they are of."""

    def __init__(self, docs: Path):
        held = [*Results(docs / "benchmarks" / "leaderboard" / "results.jsonl").records.values()]
        parts = {"untrained": "zoo", "taught and tuned": "demo"}
        named: dict[str, list[Record]] = {"scratch": [], "zoo": [], "quick": [], "demo": []}
        for one in held:
            quick = one.get("part", "").startswith("quick: ")
            named["quick" if quick else parts.get(one.get("part", ""), "scratch")].append(one)
        demo = [*Results(docs / "demo" / "results.jsonl").records.values()]
        self.scratch, self.zoo, self.quick, self.demo = (Measured(its) for its in named.values())
        self.demo = self.demo if self.demo.records else Measured(demo)
        files = sorted((docs / "benchmarks" / "tasks").glob("*.jsonl"))
        self.tasks = [(file.stem, Measured(Results(file).records.values())) for file in files]


def _table(make: Callable[[Measured], list[str]], measured: Measured) -> Callable[[], list[str]]:
    return lambda: make(measured) if measured.records else ["Not measured yet."]


def with_leaderboard(text: str, docs: Path) -> str:
    """The page with its tables written anew.

    Raises:
        ValueError: it has one without its end.
    """
    board = Board(docs)
    tables: dict[str, Callable[[], list[str]]] = {
        "needs": lambda: needs(board),
        "from scratch": _table(from_scratch, board.scratch),
        "untrained": _table(untrained, board.zoo),
        "equal budget": _table(equal_budget, board.quick),
        "tuned": _table(tuned, board.demo),
        "tasks": lambda: tasks(board.tasks),
    }
    for name, table in tables.items():
        written = between_comments(text, name, table)
        text = text if written is None else written
    return text
