"""What a comparison found: tables for the terminal and report.md, and plots. Everything comes from results.jsonl."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.compare.cells import CompareCell, cells
from attn_plugins.benchmark.compare.config import CompareConfig, file_stem
from attn_plugins.benchmark.compare.cost_table import cache_cell, cost_tables
from attn_plugins.benchmark.compare.models import chosen
from attn_plugins.benchmark.compare.recall_plot import Line, draw_recall, other_columns, other_value, recalled
from attn_plugins.benchmark.contenders import LEFT_OUT
from attn_plugins.benchmark.results.statistics import LEVEL, difference, spelled, summary
from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import Table, brief_number, duration, frame
from attn_plugins.config.extras import need
from attn_plugins.training.evaluate import without_recall
from attn_plugins.training.new_models import told_model

STAGES = {"evaluate": "untrained", "transfer": "transferred", "finetune": "fine-tuned"}
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
SCOPES = {"model": "whole model", "attention": "attention layer"}


class CompareResults:
    """The records of a comparison's cells, as tables and plots ask for them."""

    def __init__(self, config: CompareConfig, results: Results):
        self.config = config
        self.results = results
        self.recall_elsewhere = False
        """Whether other tables say what the models recall."""
        self.cells = cells(config)
        self.record = {cell.key: results.records[cell.key] for cell in self.cells if cell.key in results.records}

    def of(self, model: str, attention: str, measure: str, **settings: Any) -> list[dict[str, Any]]:
        """Records of the cells that match, one for each seed that ran, failed ones too."""
        return [
            self.record[cell.key]
            for cell in self._matching(model, attention, measure, settings)
            if cell.key in self.record
        ]

    def _matching(self, model: str, attention: str, measure: str, settings: dict[str, Any]) -> Iterable[CompareCell]:
        for cell in self.cells:
            if (cell.model, cell.attention, cell.measure) == (model, attention, measure) and all(
                cell.settings[name] == value for name, value in settings.items()
            ):
                yield cell

    def values(self, model: str, attention: str, measure: str) -> list[float]:
        """The task's figure for each seed that succeeded."""
        return [record["result"]["value"] for record in _ok(self.of(model, attention, measure))]

    def against_baseline(self, model: str, attention: str, measure: str) -> str:
        """How far the task's figure is from the baseline's at the same stage, seed by seed, and whether by noise."""
        own, base = (
            {record["seed"]: record["result"]["value"] for record in _ok(self.of(model, label, measure))}
            for label in (attention, self.config.baseline)
        )
        return str(difference(own, base)) if own and base and attention != self.config.baseline else ""

    def pass_value(
        self, model: str, attention: str, measure: str, place: tuple[str, int, str], name: str
    ) -> float | None:
        """One figure of a speed or memory cell, or None where there is none. ``place`` is (scope, length, pass)."""
        scope, length, which = place
        records = _ok(self.of(model, attention, measure, scope=scope, length=length))
        return records[0]["result"]["passes"][which][name] if records else None

    @property
    def errors(self) -> list[tuple[CompareCell, str]]:
        """The cells that failed, with their messages."""
        return self._without("error")

    @property
    def left_out(self) -> list[tuple[CompareCell, str]]:
        """The cells that a contender leaves out, with its reasons."""
        return self._without(LEFT_OUT)

    def _without(self, status: str) -> list[tuple[CompareCell, str]]:
        found = [(cell, self.record[cell.key]) for cell in self.cells if cell.key in self.record]
        return [(cell, record["error"]) for cell, record in found if record["status"] == status]

    @property
    def unfinished(self) -> int:
        """Number of cells that have neither a result nor an error."""
        return len(self.cells) - len(self.record)


def write_report(config: CompareConfig, results: Results) -> tuple[list[Table], list[Path]]:
    """Tables, and report.md and the plots beside results.jsonl.

    Returns:
        (the tables, the files that were written)

    Raises:
        ValueError: matplotlib is not installed.
    """
    found = CompareResults(config, results)
    out = results.path.parent
    out.mkdir(parents=True, exist_ok=True)
    shown = tables(found)
    plots = draw(found, out)
    lines = ["# Comparison", "", *facts(found), ""]
    for table in shown:
        lines += [table.markdown(), ""]
    lines += [f"![{plot.stem.replace('_', ' ')}]({plot.name})\n" for plot in plots]
    report = out / "report.md"
    report.write_text("\n".join(lines), encoding="utf-8")
    return shown, [report, *plots]


def tables(found: CompareResults) -> list[Table]:
    """Quality, speed, memory and errors, of those that were measured."""
    config = found.config
    has_quality = any(cell.measure in STAGES for cell in found.cells)
    shown = [_quality(found)] if has_quality else []
    for measure, title in (("speed", "Speed"), ("memory", "Peak memory")):
        passes = getattr(config, measure)
        for scope in passes.lengths if passes else ():
            shown.append(_pass_table(found, measure, title, scope))
    shown += [] if has_quality and _is_beside_quality(config) else cost_tables(found)
    if found.left_out:
        shown.append(_left_out(found))
    if found.errors:
        table = Table(
            "Errors", "These cells failed; the next run tries them again (--no-retry leaves them).", ["cells", "error"]
        )
        by_error: dict[tuple[str, str, str], list[CompareCell]] = {}
        for cell, error in found.errors:
            by_error.setdefault((cell.model, cell.attention, error), []).append(cell)
        for (_, _, error), failed in by_error.items():
            others = f" and {len(failed) - 1} more of {failed[0].attention}" if len(failed) > 1 else ""
            table.rows.append([f"{failed[0]}{others}", error])
        shown.append(table)
    return shown


def _left_out(found: CompareResults) -> Table:
    """What contenders leave out of the comparison, a row for each reason."""
    note = "What a contender cannot do here, or would only seem to do; the next run asks again."
    table = Table("Left out", note, _with_model(found.config, ["attention", "what", "reason"]))
    by_reason: dict[tuple[str, str, str], dict[str, None]] = {}
    for cell, reason in found.left_out:
        what = cell.settings.get("what", cell.measure)
        by_reason.setdefault((cell.model, cell.attention, reason), {})[what] = None
    for (model, attention, reason), measures in by_reason.items():
        row = [attention, ", ".join(measures), reason]
        table.rows.append([model, *row] if len(found.config.models) > 1 else row)
    return table


def _is_beside_quality(config: CompareConfig) -> bool:
    """Whether all that is asked of costs is a column of the table of quality."""
    return config.cost is not None and config.cost.what == ["cache"] and len(config.cost.lengths) == 1


def _quality(found: CompareResults) -> Table:
    config, task = found.config, found.config.task
    seeds = len(config.seeds)
    better = "lower" if task.better == "lower" else "higher"
    note = f"{task.metric}: {better} is better" + (f"; mean ± standard deviation of {seeds} seeds" if seeds > 1 else "")
    if seeds > 1:
        note += (
            f". Against {config.baseline}: difference ± standard error, seed by seed; noise by a paired t test, "
            f"two-sided, beyond it where p is less than {LEVEL}"
        )
    if config.bar is not None:
        note += f". The bar to beat is {config.bar}, untrained: it costs no training at all"
    for other in config.tasks[1:]:
        note += f". {other.name}: {other.metric}, {other.better} is better"
    for record in found.record.values():
        if "attention" in record.get("result", {}):
            missing = without_recall([task.name for task in config.tasks], record["result"]["attention"])
            if missing is not None and not found.recall_elsewhere:
                note += f". {missing[0].upper()}{missing[1:]}"
                break
    header = ["attention", "stage", task.metric]
    parts = _parts(found)
    places = [_place(part) for part in parts]
    header += places
    others = other_columns(config.tasks[1:])
    header += list(others)
    cached = max(config.cost.lengths) if config.cost is not None and "cache" in config.cost.what else None
    if cached is not None:
        header.append(f"cache MiB at {cached}")
        note += f". Cache: MiB of a row of {cached} tokens, measured, and its share of {config.baseline}'s"
    against = f"against {config.baseline}"
    header += [against] if seeds > 1 else []
    header += ["times the bar's"] if config.bar is not None else []
    branches = any(
        _branches(_ok([record])) for record in found.record.values() if "figures" in record.get("result", {})
    )
    header += ["branches alone"] if branches else []
    header += ["new parameters", "training seconds"]
    aside = (*places[1:-1], against, "new parameters", "training seconds")
    table = Table("Quality", note + ".", _with_model(config, header), aside=aside)
    for model in config.models:
        bar = found.values(model, config.bar, "evaluate") if config.bar is not None else []
        for attention in config.attentions:
            for measure, stage in STAGES.items():
                if not any(found._matching(model, attention, measure, {})):
                    continue
                records = found.of(model, attention, measure)
                ok = _ok(records)
                shown = stage + (", the bar" if (attention, measure) == (config.bar, "evaluate") else "")
                row = [attention, shown, spelled([r["result"]["value"] for r in ok]) if ok else _why(records)]
                for number in range(len(parts)):
                    row.append(spelled([_parts_of(r["result"]["figures"])[number][task.metric] for r in ok]))
                row += [spelled([other_value(r["result"], *place) for r in ok]) for place in others.values()]
                if cached is not None:
                    row.append(cache_cell(found, model, attention, cached))
                if seeds > 1:
                    row.append(found.against_baseline(model, attention, measure))
                if config.bar is not None:
                    mean = [summary([r["result"]["value"] for r in ok]).mean / summary(bar).mean] if ok and bar else []
                    row.append(spelled(mean))
                if branches:
                    row.append(_branches(ok))
                row.append(f"{ok[0]['result']['attention']['new_params']:,}" if ok else "")
                row.append(spelled([r["result"]["train"]["seconds"] for r in ok if "train" in r["result"]]))
                table.rows.append([model, *row] if len(config.models) > 1 else row)
    return table


def _branches(records: list[dict[str, Any]]) -> str:
    """The task's figure with each branch of an attention alone, mean over seeds."""
    parts = [record["result"]["figures"].get("branches", {}) for record in records]
    return ", ".join(f"{branch} {spelled([part[branch] for part in parts])}" for branch in (parts[0] if parts else ()))


def _parts(found: CompareResults) -> list[dict[str, Any]]:
    for record in found.record.values():
        if record["status"] == "ok" and "figures" in record["result"]:
            return _parts_of(record["result"]["figures"])
    return []


def _parts_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What a task found in parts of a text, or of its rows: by position, distance, length, number of pairs."""
    names = ("by_pairs", "by_position", "by_distance", "by_length")
    return next((figures[name] for name in names if name in figures), [])


def _place(part: dict[str, Any]) -> str:
    if "from" in part:
        return f"at {part['from']}-{part['to']}"
    if "pairs" in part:
        return f"{part['pairs']} pairs"
    return f"at {part.get('distance', part.get('length'))}"


def _pass_table(found: CompareResults, measure: str, title: str, scope: str) -> Table:
    config = found.config
    passes = getattr(config, measure)
    places = [(scope, length, which) for which in passes.passes_of(scope) for length in passes.lengths[scope]]
    base = config.baseline
    if measure == "speed":
        note = f"Times as fast as {base} in the same rounds, median. {base} beside itself shows the noise."
        detail = f"In brackets the lowest and highest of {passes.rounds} rounds, and the median time of a pass."
    else:
        note = "MiB that a pass allocates at its peak, weights and inputs not counted."
        detail = f"In brackets the share of {base}'s."
    note += f" Batch {passes.batch_size}."
    header = ["attention", *(f"{PASSES[which]} {length}" for _, length, which in places)]
    table = Table(f"{title}, {SCOPES[scope]}", note, _with_model(config, header), detail=detail)
    for model in config.models:
        for attention in config.attentions:
            row = [attention, *(_pass_cell(found, measure, model, attention, place) for place in places)]
            table.rows.append([model, *row] if len(config.models) > 1 else row)
    return table


def _pass_cell(found: CompareResults, measure: str, model: str, attention: str, place: tuple[str, int, str]) -> str:
    records = found.of(model, attention, measure, scope=place[0], length=place[1])
    if not _ok(records):
        return _why(records)
    if measure == "speed":
        figures = _ok(records)[0]["result"]["passes"][place[2]]
        ratio, lowest, highest = figures["times_as_fast"], figures["lowest"], figures["highest"]
        return f"{ratio:.2f}x ({lowest:.2f} to {highest:.2f}; {duration(figures['seconds'])})"
    own = found.pass_value(model, attention, measure, place, "bytes")
    base = found.pass_value(model, found.config.baseline, measure, place, "bytes")
    assert own is not None
    return brief_number(own / 2**20) + (f" ({own / base:.2f})" if base else "")


def draw(found: CompareResults, out: Path, part: str | None = None) -> list[Path]:
    """The plots that what was measured allows, a PNG each: quality against time, memory and speed against length.

    Args:
        part: of a suite, which files are named after.
    """
    need("matplotlib", "compare")
    drawn = []
    for model in found.config.models:
        stem = file_stem(model) if part is None else f"{file_stem(part)}_{file_stem(model)}"
        for name, figure in (
            ("quality_vs_time", _quality_plot(found, model)),
            ("memory_vs_length", _length_plot(found, model, "memory")),
            ("speed_vs_length", _length_plot(found, model, "speed")),
            ("recall_vs_distance", _recall_plot(found, model)),
        ):
            if figure is not None:
                path = out / f"{stem}_{name}.png"
                figure.savefig(path, dpi=130, bbox_inches="tight")
                drawn.append(path)
    return drawn


def _quality_plot(found: CompareResults, model: str) -> Any:
    """One point an attention and stage: what it costs, as a multiple of the baseline's time, and how good it is."""
    config, task = found.config, found.config.task
    place = _longest(config)
    points = []
    for number, attention in enumerate(config.attentions):
        ratio = 1.0 if attention == config.baseline else None
        if place is not None and ratio is None:
            ratio = found.pass_value(model, attention, "speed", place, "times_as_fast")
        for measure in STAGES:
            values = found.values(model, attention, measure)
            if ratio and values:
                points.append((number, attention, measure, 1 / ratio, values))
    if place is None or not points:
        return None
    figure, axes = frame(1)
    for number, attention, measure, cost, values in points:
        face = {"finetune": f"C{number}", "transfer": (f"C{number}", 0.4)}.get(measure, "none")
        mean, spread = summary(values).mean, summary(values).deviation
        label = (
            attention
            if not any(p[1] == attention and p[2] == "evaluate" for p in points) or measure == "evaluate"
            else None
        )
        axes[0].errorbar(
            cost, mean, yerr=spread, color=f"C{number}", marker="o", markersize=8, mfc=face, ls="none", label=label
        )
    for number, attention in enumerate(config.attentions):  # an arrow's worth: from untrained to fine-tuned
        ends = [(p[3], summary(p[4]).mean) for p in points if p[1] == attention]
        axes[0].plot(*zip(*ends, strict=True), color=f"C{number}", lw=1, alpha=0.5) if len(ends) > 1 else None
    means = [summary(p[4]).mean for p in points]
    if task.better == "lower" and max(means) > 5 * min(means):
        axes[0].set_yscale("log")
    scope, length, which = place
    axes[0].set_xlabel(f"time over {config.baseline}'s: {SCOPES[scope]}, {PASSES[which]}, {length} tokens")
    axes[0].set_ylabel(f"{task.metric} ({task.better} is better)")
    faces = {"evaluate": "hollow", "transfer": "pale", "finetune": "filled"}
    shown = [f"{faces[measure]}: {stage}" for measure, stage in STAGES.items() if any(p[2] == measure for p in points)]
    axes[0].set_title(f"{model}: quality against time ({', '.join(shown)})")
    axes[0].legend(fontsize="small")
    return figure


def _length_plot(found: CompareResults, model: str, measure: str) -> Any:
    """A panel for each pass: memory, or times as fast as the baseline, at each length."""
    config = found.config
    passes = getattr(config, measure)
    if passes is None:
        return None
    scope = max(passes.lengths, key=lambda name: len(passes.lengths[name]))
    figure, axes = frame(len(passes.passes_of(scope)))
    drawn = False
    for axis, which in zip(axes, passes.passes_of(scope), strict=True):
        for number, attention in enumerate(config.attentions):
            name = "bytes" if measure == "memory" else "times_as_fast"
            lengths = passes.lengths[scope]
            points = [(n, found.pass_value(model, attention, measure, (scope, n, which), name)) for n in lengths]
            line = [(n, value / 2**20 if measure == "memory" else value) for n, value in points if value is not None]
            if line:
                marker = "osD^vPX*"[number % 8]  # lines that lie on each other stay visible
                axis.plot(*zip(*line, strict=True), color=f"C{number}", marker=marker, mfc="none", label=attention)
                drawn = True
        axis.set_xscale("log", base=2)
        axis.set_xticks(passes.lengths[scope], [str(n) for n in passes.lengths[scope]])
        axis.minorticks_off()
        axis.set_xlabel("length in tokens")
        axis.set_title(f"{model}, {SCOPES[scope]}, {PASSES[which]}", fontsize="medium")
        if measure == "memory":
            axis.set_yscale("log")
        else:
            axis.axhline(1.0, color="black", lw=0.8, ls=":")
    if not drawn:
        return None
    axes[0].set_ylabel("peak memory, MiB" if measure == "memory" else f"times as fast as {config.baseline}")
    axes[0].legend(fontsize="small")
    return figure


def _recall_plot(found: CompareResults, model: str) -> Any:
    """What is recalled at each distance, dashed untrained; of the first seed that ran."""
    lines = [
        Line(label=f"{attention}, {stage}", number=number, dashed=measure == "evaluate", found=recalled(tasks, result))
        for tasks in [found.config.tasks]
        for number, attention in enumerate(found.config.attentions)
        for measure, stage in STAGES.items()
        for result in [record["result"] for record in _ok(found.of(model, attention, measure))[:1]]
    ]
    return draw_recall(model, lines)


def _longest(config: CompareConfig) -> tuple[str, int, str] | None:
    """Where the plot of quality reads time: the whole model if it was timed, the greatest length, forward if timed."""
    if config.speed is None:
        return None
    scope = "model" if config.speed.lengths.get("model") else "attention"
    passes = config.speed.passes_of(scope)
    which = "forward" if "forward" in passes else passes[0]
    return scope, max(config.speed.lengths[scope]), which


def facts(found: CompareResults) -> list[str]:
    """What was compared with which settings, by what, as lines of Markdown."""
    config = found.config
    lines = [f"- Model {label}: {told_model(source)}" for label, source in config.models.items()]
    for label, rules in config.attentions.items():
        lines.append(f"- Attention {label}: {_rules(rules)}")
        for model in config.models if chosen(rules) else ():
            took = [record["result"]["rules"] for record in _ok(found.of(model, label, "evaluate"))]
            lines += [f"- Chosen for {label} of {model}: {_rules(one)}" for one in took]
    if config.data is not None:
        set_fields = {k: v for k, v in dataclasses.asdict(config.data).items() if v is not None}
        lines.append(f"- Data: {_inline(set_fields)}")
        told = ({"task": task.name, **dataclasses.asdict(task.config)} for task in config.tasks)
        lines += [f"- Evaluation: {_inline(one)}" for one in told]
    for stage, settings in (("Transfer", config.transfer), ("Fine-tune", config.finetune)):
        if settings is not None:
            lines.append(f"- {stage}: {_inline(settings)}")
    lines.append(f"- Seeds: {', '.join(map(str, config.seeds))}; weights in {config.dtype}")
    lines += found.results.provenance(found.record)
    lines.append(f"- Time of all cells: {sum(record['seconds'] for record in found.record.values()) / 60:.1f} minutes")
    if found.unfinished:
        lines.append(f"- {found.unfinished} of {len(found.cells)} cells have not been run")
    return lines


def _rules(rules: Any) -> str:
    if rules is None or isinstance(rules, str):
        return "the model's own" if rules is None else rules
    if isinstance(rules, dict) and not chosen(rules):
        return _inline(rules)
    if isinstance(rules, dict):
        ((name, settings),) = rules.items()
        return (
            f"{name} {_inline({key: value for key, value in settings.items() if value is not None and key != 'data'})}"
        )
    return "; ".join(_inline(rule) for rule in rules)


def _inline(tree: Any) -> str:
    if isinstance(tree, dict):
        return ", ".join(f"{key} {_inline(value)}" for key, value in tree.items())
    return " ".join(map(_inline, tree)) if isinstance(tree, list) else str(tree)


def _ok(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["status"] == "ok"]


def _why(records: list[dict[str, Any]]) -> str:
    return records[0]["status"] if records else "not run"


def _with_model(config: CompareConfig, header: list[str]) -> list[str]:
    return ["model", *header] if len(config.models) > 1 else header
