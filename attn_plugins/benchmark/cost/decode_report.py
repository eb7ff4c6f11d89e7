"""What generation with long contexts cost: tables for the terminal and report.md, and plots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.cost.decode import DecodeConfig, decode_cells
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import Table, brief_number, duration, frame
from attn_plugins.config.extras import need


class DecodeResults:
    """The records of a benchmark's cells, as tables and plots ask for them."""

    def __init__(self, config: DecodeConfig, results: Results):
        self.config, self.results = config, results
        self.contexts = sorted(set(config.contexts))
        cells = [cell for group in decode_cells(config) for cell in group]
        self.number = len(cells)
        self.record = {
            (cell.label, cell.context): results.records[cell.key] for cell in cells if cell.key in results.records
        }

    def result(self, label: str, context: int) -> dict[str, Any] | None:
        """The figures of a cell, or None where it failed or did not run."""
        record = self.record.get((label, context))
        return record["result"] if record and record["status"] == "ok" else None

    def errors(self) -> dict[str, dict[str, list[str]]]:
        """label -> message -> the contexts that failed with it."""
        found: dict[str, dict[str, list[str]]] = {}
        for (label, context), record in self.record.items():
            if record["status"] == "error":
                found.setdefault(label, {}).setdefault(record["error"], []).append(str(context))
        return found

    @property
    def failed(self) -> bool:
        """Whether an attention failed for another reason than that it does not serve the model or the context."""
        return any(not message.startswith("ValueError: ") for by in self.errors().values() for message in by)


def write_decode_report(found: DecodeResults, out: Path) -> tuple[list[Table], list[Path]]:
    """Write report.md and the plots into ``out``.

    Returns:
        the tables, and the paths of what was written.
    """
    out.mkdir(parents=True, exist_ok=True)
    tables, plots = decode_tables(found), draw(found, out)
    lines = ["# Generation with a long context: time of a token and size of the cache", "", *_facts(found), ""]
    lines += [part for table in tables for part in (table.markdown(), "")]
    lines += [f"![{path.stem}]({path.name})" for path in plots]
    report = out / "report.md"
    report.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return tables, [report, *plots]


def decode_tables(found: DecodeResults) -> list[Table]:
    """Time, its growth, bytes, and what failed."""
    config, first = found.config, found.config.first
    spread = f"In brackets the lowest and highest of {config.rounds} rounds."
    tables = [
        _table(found, "Time of a token", "Median, by tokens in the cache.", lambda r: duration(r["seconds"])),
        _table(
            found,
            "Times as fast as the dense model",
            "The dense model with the same context, in the same rounds; median.",
            lambda r: _ratio(r, "times_as_fast", "lowest", "highest"),
            spread,
        ),
        _table(
            found,
            f"Times its own time at {first} tokens",
            f"The same attention with {first} tokens in the cache, in the same rounds; median.",
            lambda r: _ratio(r, "growth", "growth_lowest", "growth_highest"),
            spread,
            contexts=[context for context in found.contexts if context != first],
        ),
        _table(
            found,
            "Bytes of the cache",
            "All tensors that all layers hold.",
            lambda r: f"{r['bytes']:,} ({brief_number(r['bytes'] / r['baseline_bytes'])})",
            "In brackets the share of the dense model's.",
        ),
    ]
    tables = [table for table in tables if len(table.header) > 1]
    errors = found.errors()
    if errors:
        rows = [[label, message, ", ".join(where)] for label, by in errors.items() for message, where in by.items()]
        header = ["attention", "what it says", "contexts"]
        tables.append(Table("Not measured", "Where an attention cannot serve the model, or failed.", header, rows))
    return tables


def _table(
    found: DecodeResults,
    title: str,
    note: str,
    show: Callable[[dict[str, Any]], str],
    detail: str = "",
    contexts: list[int] | None = None,
) -> Table:
    """A row for each attention, a column for each context."""
    contexts = found.contexts if contexts is None else contexts
    table = Table(title, note, ["attention", *map(str, contexts)] if contexts else ["attention"], detail=detail)
    for label in found.config.attentions:
        row = [label]
        for context in contexts:
            result = found.result(label, context)
            failed = "cannot" if (label, context) in found.record else ""
            row.append(failed if result is None else show(result))
        table.rows.append(row)
    return table


def _ratio(result: dict[str, Any], *names: str) -> str:
    median, lowest, highest = (brief_number(result[name]) for name in names)
    return f"{median}x ({lowest} to {highest})"


def draw(found: DecodeResults, out: Path) -> list[Path]:
    """A PNG of the time of a token and one of the cache's size, over the context."""
    need("matplotlib", "compare")
    drawn = []
    for name, axis_label, value in (
        ("time", "milliseconds a token", lambda result: result["seconds"] * 1000),
        ("bytes", "bytes of the cache", lambda result: result["bytes"]),
    ):
        figure, (axis,) = frame(1)
        for number, label in enumerate(found.config.attentions):
            results = {context: found.result(label, context) for context in found.contexts}
            line = {context: value(result) for context, result in results.items() if result}
            axis.plot(list(line), list(line.values()), marker="osD^vPX*"[number % 8], mfc="none", label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(found.contexts, [str(context) for context in found.contexts])
        axis.set_xlabel("tokens in the cache")
        axis.set_ylabel(axis_label)
        axis.legend(fontsize="small")
        path = out / f"{name}.png"
        figure.savefig(path, dpi=100, bbox_inches="tight")
        drawn.append(path)
    return drawn


def _facts(found: DecodeResults) -> list[str]:
    config, shape = found.config, found.config.model
    model = shape
    if not isinstance(shape, str):
        model = (
            f"a Llama with random weights: {shape.num_layers} layers, hidden size {shape.hidden_size}, "
            f"{shape.num_heads} heads of {shape.head_dim} that share {shape.num_key_value_heads} key/value heads"
        )
    timed = (config.rounds + 2) * config.tokens  # the first run and the first round warm up
    lines = [
        f"- {model}; {config.dtype}, on {config.device}, batch {config.batch_size}",
        "- A token is one call of the model with a stock DynamicCache, without padding. Each of "
        f"{config.rounds} rounds times {config.tokens} tokens of every attention, one attention after the other. All "
        f"lengthen the context, by {timed} tokens in the end; bytes are counted before.",
        "- Contexts are random keys and values: neither time nor bytes depend on them. Layers that keep all tokens are "
        f"given them at once, states take them in through their attention, {config.chunk} at a time.",
    ]
    lines += found.results.provenance(record["key"] for record in found.record.values())
    if len(found.record) < found.number:
        lines.append(f"- {found.number - len(found.record)} of {found.number} cells have no result")
    for label, rules in config.attentions.items():
        rules_text = "the model's own attention" if rules is None else "; ".join(_inline(rule) for rule in rules)
        lines.append(f"- {label}: {rules_text}")
    return lines


def _inline(tree: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in tree.items())
