"""What a benchmark found: tables for the terminal and report.md, plots, and the length from which each one pays."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.cost.kernels import BenchConfig, Contender, KernelCell, cells, contenders
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import Table, brief_number, duration, frame
from attn_plugins.config.extras import need

PASSES = {"forward": "forward", "forward_backward": "forward + backward"}


class KernelResults:
    """The records of a benchmark's cells, as tables and plots ask for them."""

    def __init__(self, config: BenchConfig, results: Results):
        self.config, self.results = config, results
        self.record: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.number = 0
        for group in cells(config):
            for cell in group:
                self.number += 1
                if cell.key in results.records:
                    self.record[_place(cell)] = results.records[cell.key]

    def result(self, label: str, which: str, length: int) -> dict[str, Any] | None:
        """The figures of a cell, or None where it failed or did not run."""
        record = self.record.get((label, which, length))
        return record["result"] if record and record["status"] == "ok" else None

    def ratios(self, label: str, which: str, of: str = "times_as_fast") -> dict[int, float]:
        """Length -> times as fast as torch's own attention: the median of the rounds, or their "lowest"."""
        found = {length: self.result(label, which, length) for length in sorted(self.config.lengths)}
        return {n: result[of] for n, result in found.items() if result and of in result}

    def errors(self) -> dict[str, dict[str, list[str]]]:
        """label -> message -> the passes and lengths that failed with it."""
        found: dict[str, dict[str, list[str]]] = {}
        for (label, which, length), record in self.record.items():
            if record["status"] == "error":
                found.setdefault(label, {}).setdefault(record["error"], []).append(f"{PASSES[which]} {length}")
        return found

    @property
    def by_clock(self) -> bool:
        """Whether there are times on several threads too."""
        return any("wall" in record["result"] for record in self.record.values() if record["status"] == "ok")

    def rates(self) -> dict[str, tuple[float, float]]:
        """Name -> lowest and highest GFLOP/s of one thread of the CPU beside these times."""
        results = [record["result"] for record in self.record.values() if record["status"] == "ok"]
        found: dict[str, list[float]] = {}
        for result in results:
            for name, rate in result.get("gflops", {}).items():
                found.setdefault(name, []).append(rate)
        return {name: (min(rates), max(rates)) for name, rates in found.items()}

    @property
    def failed(self) -> bool:
        """Whether an attention of ours failed for another reason than that it does not serve a length or shape."""
        errors = self.errors()
        ours = [contender.label for contender in contenders(self.config) if "peer" not in contender.source]
        return any(not message.startswith("ValueError: ") for label in ours for message in errors.get(label, ()))


def _place(cell: KernelCell) -> tuple[str, str, int]:
    return cell.contender.label, cell.which, cell.length


def pays_from(lowest: dict[int, float]) -> int | None:
    """The length from which on it is faster than torch's own attention in every round, or None."""
    pays = None
    for length in sorted(lowest, reverse=True):
        if lowest[length] <= 1:
            break
        pays = length
    return pays


def says_pays_from(lowest: dict[int, float]) -> str:
    """The same in words."""
    if not lowest:
        return ""
    pays = pays_from(lowest)
    return f"not up to {max(lowest)}" if pays is None else f"{pays}"


def write_bench_report(found: KernelResults, out: Path) -> tuple[list[Table], list[Path]]:
    """Write report.md and the plots into ``out``.

    Returns:
        the tables, and the paths of what was written.
    """
    out.mkdir(parents=True, exist_ok=True)
    tables = bench_tables(found)
    plots = draw(found, out)
    lines = ["# Attentions by themselves: time and memory", "", *_facts(found), ""]
    lines += [part for table in tables for part in (table.markdown(), "")]
    lines += [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in plots]
    report = out / "report.md"
    report.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return tables, [report, *plots]


def bench_tables(found: KernelResults) -> list[Table]:
    """Speed for each pass, memory for each pass where it was measured, and what failed."""
    config = found.config
    tables = [_speed(found, which) for which in config.passes if config.rounds]
    if found.by_clock:
        tables += [_speed_by_clock(found, which) for which in config.passes]
    tables += [_memory(found, which) for which in config.passes if config.memory]
    errors = found.errors()
    if errors:
        rows = [[label, message, ", ".join(where)] for label, by in errors.items() for message, where in by.items()]
        header = ["attention", "what it says", "where"]
        tables.append(Table("Not measured", "Where an attention cannot serve a length, or failed.", header, rows))
    return tables


def _speed(found: KernelResults, which: str) -> Table:
    config = found.config
    table = Table(
        f"Speed, {PASSES[which]}",
        "Times as fast as torch's scaled_dot_product_attention in the same rounds, causal or not as the attention is; "
        "median. It pays from the length from which every round was faster.",
        ["attention", "family", *map(str, sorted(config.lengths)), "pays from"],
        detail=f"In brackets the lowest and highest of {config.rounds} rounds, and the median time of a pass.",
        aside=("family",),
    )
    for contender in contenders(config):
        row = [contender.label, _family(contender)]
        for length in sorted(config.lengths):
            result = found.result(contender.label, which, length)
            row.append(_ratio(result) if result else _why(found, contender.label, which, length))
        table.rows.append([*row, says_pays_from(found.ratios(contender.label, which, "lowest"))])
    return table


def _speed_by_clock(found: KernelResults, which: str) -> Table:
    lengths, threads = sorted(found.config.lengths), found.config.wall_threads
    table = Table(
        f"Speed, {PASSES[which]}, {threads} threads by the clock",
        f"The same on {threads} threads, by the clock. What else the machine does is in it, most where operations are "
        "many.",
        ["attention", "family", *map(str, lengths)],
        detail=f"In brackets the lowest and highest of {found.config.rounds} rounds, and the median time of a pass.",
        aside=("family",),
    )
    for contender in contenders(found.config):
        results = [found.result(contender.label, which, length) for length in lengths]
        told = [_ratio(result["wall"]) if result and "wall" in result else "" for result in results]
        table.rows.append([contender.label, _family(contender), *told])
    return table


def _memory(found: KernelResults, which: str) -> Table:
    config = found.config
    table = Table(
        f"Peak memory, {PASSES[which]}",
        "What a pass allocates at its peak, as a multiple of the bytes of queries, keys, values and output together.",
        ["attention", "family", *map(str, sorted(config.lengths))],
        detail="In brackets the share of what torch's scaled_dot_product_attention allocates.",
        aside=("family",),
    )
    for contender in contenders(config):
        row = [contender.label, _family(contender)]
        for length in sorted(config.lengths):
            result = found.result(contender.label, which, length)
            if result is None:
                row.append(_why(found, contender.label, which, length))
            else:
                share = result["bytes"] / result["baseline_bytes"]
                row.append(f"{brief_number(result['bytes'] / result['tensor_bytes'])} ({brief_number(share)})")
        table.rows.append(row)
    return table


def _family(contender: Contender) -> str:
    return contender.family if contender.causal else f"{contender.family}, not causal"


def _ratio(result: dict[str, Any]) -> str:
    spread = f"{brief_number(result['lowest'])} to {brief_number(result['highest'])}"
    return f"{brief_number(result['times_as_fast'])}x ({spread}; {duration(result['seconds'])})"


def _why(found: KernelResults, label: str, which: str, length: int) -> str:
    return "cannot" if (label, which, length) in found.record else ""


def draw(found: KernelResults, out: Path) -> list[Path]:
    """A PNG for speed and one for memory of each pass, a panel for each family."""
    need("matplotlib", "compare")
    families: dict[str, list[Contender]] = {}
    for contender in contenders(found.config):
        families.setdefault(contender.family, []).append(contender)
    drawn = []
    for which in found.config.passes:
        for what in ("speed", "memory") if found.config.memory else ("speed",):
            figure = _plot(found, families, which, what)
            if figure is not None:
                path = out / f"{what}_{which}.png"
                figure.savefig(path, dpi=100, bbox_inches="tight")
                drawn.append(path)
    return drawn


def _plot(found: KernelResults, families: dict[str, list[Contender]], which: str, what: str) -> Any:
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for family, members in families.items():
        for member in members:
            line = _line(found, member.label, which, what)
            if line:
                lines.setdefault(family, {})[member.label] = line
    if not lines:
        return None
    figure, axes = frame(len(lines), columns=3)
    for axis, (family, drawn) in zip(axes, lines.items(), strict=True):
        for number, (label, line) in enumerate(drawn.items()):
            axis.plot(*zip(*line, strict=True), marker="osD^vPX*"[number % 8], mfc="none", label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2 if what == "speed" else 10)
        axis.set_xticks(sorted(found.config.lengths), [str(n) for n in sorted(found.config.lengths)])
        axis.minorticks_off()
        axis.set_title(f"{family}: {PASSES[which]}", fontsize="medium")
        axis.legend(fontsize="x-small")
        if what == "speed":
            axis.axhline(1.0, color="black", lw=0.8, ls=":")
            axis.set_ylabel("times as fast as torch's own attention")
        else:
            axis.set_ylabel("peak over bytes of q, k, v, out")
    return figure


def _line(found: KernelResults, label: str, which: str, what: str) -> list[tuple[int, float]]:
    if what == "speed":
        return sorted(found.ratios(label, which).items())
    results = {length: found.result(label, which, length) for length in sorted(found.config.lengths)}
    return [(length, r["bytes"] / r["tensor_bytes"]) for length, r in results.items() if r]


def _facts(found: KernelResults) -> list[str]:
    config = found.config
    shape = f"batch {config.batch_size}, {config.num_heads} heads of {config.head_dim}"
    if config.num_key_value_heads != config.num_heads:
        shape += f" that share {config.num_key_value_heads} key/value heads"
    lines = [f"- {shape}, {config.dtype}, on {config.device}; one attention alone, its mask included"]
    if rates := found.rates():
        told = ", ".join(f"{name} {low:.0f} to {high:.0f} GFLOP/s" for name, (low, high) in rates.items())
        lines.append(f"- times are those of the process on one thread; this CPU's rates beside them: {told}")
    lines += found.results.provenance(record["key"] for record in found.record.values())
    if len(found.record) < found.number:
        lines.append(f"- {found.number - len(found.record)} of {found.number} cells have no result")
    for contender in contenders(config):
        source = contender.source
        source_text = source["note"] if "peer" in source else _inline(source.items())
        lines.append(f"- {contender.label}: {source_text}")
    return lines


def _inline(items: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{key} {value}" for key, value in items)
