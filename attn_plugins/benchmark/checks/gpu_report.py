"""What a check of a GPU found, as Markdown, plots, and records of which backend is right there and how fast."""

import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.results.tables import Table, brief_number, duration, frame

RANKED_AT = 16384
"""Tokens at which backends of an attention are ranked, or the most that were measured below it."""

Record = dict[str, Any]


def write_report(records: list[Record], folder: Path) -> list[Path]:
    """Write report.md, checked.json and, where matplotlib is there, kernels.png and training.png: what was written."""
    (first, *_) = records
    lines = ["# Attentions on a GPU", ""]
    told = {name: value for name, value in first.items() if name not in ("part", "versions", "seconds")}
    lines += [f"- {name}: {value}" for name, value in told.items() if value is not None]
    lines += [f"- {name}: {value}" for name, value in first["versions"].items() if name not in told]
    lines += [f"- {record['part']}: left out {record['left_out']}" for record in records if "left_out" in record]
    for table in (contract_table(records), kernel_table(records), memory_table(records), training_table(records)):
        if table.rows:
            lines += ["", table.markdown()]
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md", folder / "checked.json"]
    written[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = {name: told.get(name) for name in told}
    written[1].write_text(json.dumps([{"place": place, "results": checked_results(records)}], indent=1) + "\n")
    return written + (_draw(records, folder) if importlib.util.find_spec("matplotlib") else [])


def checked_results(records: list[Record]) -> list[Record]:
    """As a record of :mod:`attn_plugins.core.checked` has them: of each attention and backend that was not refused."""
    passed: dict[tuple[str, str], list[str]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for record in records:
        place = (record.get("attention", ""), record.get("backend", ""))
        if record["part"] == "contract" and "passed" in record:
            passed.setdefault(place, []).extend(record["failures"])
        elif record["part"] == "kernels" and "attention" in record:
            if "error" in record:
                passed.setdefault(place, []).append(record["error"])
            elif "seconds" in record and record["length"] <= RANKED_AT:
                seconds[place] = record["seconds"]  # lengths come in order
    return [
        {
            "attention": attention,
            "backend": backend,
            "passed": not failures,
            "seconds": seconds.get((attention, backend)),
            "note": "; ".join(failures),
        }
        for (attention, backend), failures in sorted(passed.items())
    ]


def contract_table(records: list[Record]) -> Table:
    """A row an attention, a column a backend: passed, or the first thing that is wrong."""
    found = [record for record in records if record["part"] == "contract" and "attention" in record]
    served = [record for record in found if "refused" not in record]
    backends = _unique(record["backend"] for record in served)
    note = (
        "Outputs and gradients against the dense form in float64 at 300 tokens: plain, padded and packed rows, with "
        "bias, softcap and learned sinks, in bfloat16; one of these in float32 and float16. Empty: the backend does "
        "not serve it."
    )
    table = Table("Contract", note, ["attention", *backends])
    for name in _unique(record["attention"] for record in found):
        row = [name]
        for backend in backends:
            own = [one for one in served if (one["attention"], one["backend"]) == (name, backend)]
            failures = [line for one in own for line in one["failures"]]
            wrong = f"{failures[0]}{f' and {len(failures) - 1} more' if len(failures) > 1 else ''}" if failures else ""
            row.append(wrong or ("passed" if own else ""))
        table.rows.append(row)
    return table


def kernel_table(records: list[Record]) -> Table:
    """Milliseconds by length, with the ratio to torch's flash attention."""
    flash = {one["length"]: one["seconds"] for one in _timed(records) if one.get("baseline") == "sdpa flash"}

    def cell(record: Record) -> str:
        ratio = flash.get(record["length"], 0.0) / record["seconds"]
        return f"{duration(record['seconds'])} ({brief_number(ratio)}x)"

    note = (
        "A forward and a backward pass of one layer, batch 1, 16 heads of 64, bfloat16, with a mask that other layers "
        "have seen; in brackets times as fast as torch's causal flash attention."
    )
    return _by_length("Time", note, records, cell)


def memory_table(records: list[Record]) -> Table:
    """Peak memory over the bytes of queries, keys, values and output, by length."""
    note = "Peak of a forward and a backward pass, as a multiple of the bytes of queries, keys, values and output."
    return _by_length("Peak memory", note, records, lambda one: brief_number(one["bytes"] / one["tensor_bytes"]))


def training_table(records: list[Record]) -> Table:
    """Seconds and memory of a training step, by length, against the dense model."""
    found = [record for record in records if record["part"] == "training" and "length" in record]
    lengths = sorted({record["length"] for record in found})
    note = (
        "A step of a Llama of SmolLM2-135M's sizes with random weights: forward, backward and AdamW, one row, autocast "
        "in bfloat16; in brackets times as fast as the dense model, peak memory, and whether layers were checkpointed."
    )
    table = Table("Training step", note, ["attention", "by", *map(str, lengths)])
    dense = {one["length"]: one["seconds"] for one in found if one["rule"] is None and "seconds" in one}
    cells = {(_ruled(record), record["backend"], record["length"]): record for record in found}
    for name, backend in _unique((_ruled(one), one["backend"]) for one in found if "refused" not in one):
        row = [name, backend]
        for length in lengths:
            record = cells.get((name, backend, length), {})
            text = record.get("error", "")[:80]
            if "seconds" in record:
                ratio = brief_number(dense.get(length, 0.0) / record["seconds"])
                memory = f", {record['bytes'] / 2**30:.1f} GiB" if record["bytes"] else ""
                text = f"{duration(record['seconds'])} ({ratio}x{memory}"
                text += ", checkpointed)" if record["checkpointed"] else ")"
            row.append(text)
        table.rows.append(row)
    return table


def _ruled(record: Record) -> str:
    rule = record["rule"]
    options = {} if rule is None else {key: value for key, value in rule.items() if key != "type"}
    return ", ".join(["dense" if rule is None else rule["type"], *(f"{key} {value}" for key, value in options.items())])


def _timed(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["part"] == "kernels" and "seconds" in record]


def _label(record: Record) -> tuple[str, str]:
    return (record["baseline"], "") if "baseline" in record else (record["attention"], record["backend"])


def _by_length(title: str, note: str, records: list[Record], cell: Callable[[Record], str]) -> Table:
    found = [record for record in records if record["part"] == "kernels" and "length" in record]
    lengths = sorted({record["length"] for record in found})
    table = Table(title, note, ["attention", "by", *map(str, lengths)])
    for label in _unique(_label(record) for record in found if "refused" not in record):
        own = {record["length"]: record for record in found if _label(record) == label}
        row = [*label]
        for length in lengths:
            record = own.get(length, {})
            text = "too slow" if "skipped" in record else "fails" if "error" in record else ""
            row.append(cell(record) if "seconds" in record else text)
        table.rows.append(row)
    return table


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _draw(records: list[Record], folder: Path) -> list[Path]:
    drawn = []
    timed = _timed(records)
    backends = _unique(_label(record)[1] for record in timed if "attention" in record)
    if backends:
        figure, axes = frame(len(backends), columns=2)
        for axis, backend in zip(axes, backends, strict=True):
            for label in _unique(map(_label, timed)):
                if label[1] in ("", backend):
                    line = [(one["length"], 1000 * one["seconds"]) for one in timed if _label(one) == label]
                    style = {"color": "black", "ls": ":"} if label[1] == "" else {}
                    axis.plot(*zip(*line, strict=True), marker=".", label=label[0], **style)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylabel("ms, forward + backward")
            axis.set_title(f"by {backend}", fontsize="medium")
            axis.legend(fontsize="xx-small", ncols=2)
        drawn.append(folder / "kernels.png")
        figure.savefig(drawn[-1], dpi=100, bbox_inches="tight")
    steps = [one for one in records if one["part"] == "training" and "seconds" in one]
    lengths = sorted({one["length"] for one in steps})
    if steps:
        figure, axes = frame(len(lengths), columns=2)
        for axis, length in zip(axes, lengths, strict=True):
            own = [one for one in steps if one["length"] == length]
            axis.barh([f"{_ruled(one)}, {one['backend']}" for one in own], [one["seconds"] for one in own])
            axis.invert_yaxis()
            axis.set_title(f"seconds of a training step, {length} tokens", fontsize="medium")
        drawn.append(folder / "training.png")
        figure.savefig(drawn[-1], dpi=100, bbox_inches="tight")
    return drawn
