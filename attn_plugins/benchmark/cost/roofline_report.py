"""Cost on paper as tables, Markdown and JSON."""

import json
from dataclasses import asdict
from pathlib import Path

from attn_plugins.benchmark.cost.roofline import DEVICES, LAUNCH, Amounts, Cost, RooflineConfig, flash, takes
from attn_plugins.benchmark.results.tables import Table, brief_number, duration
from attn_plugins.config.output import check_folder
from attn_plugins.config.versions import versions
from attn_plugins.core.attention import HeadShape


def write_roofline(
    config: RooflineConfig, heads: HeadShape, layers: int, found: list[Cost]
) -> tuple[list[Table], list[Path]]:
    """Write roofline.json and report.md into the output folder: (the tables, what was written)."""
    out = check_folder(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    tables = [
        amounts_table(config, heads, found),
        *(time_table(config, heads, layers, found, name) for name in config.devices),
    ]
    failed = [[cost.label, cost.by, cost.error] for cost in found if cost.error]
    if failed:
        tables.append(
            Table(
                "Not counted",
                "What a form needs and tensors without values do not have.",
                ["attention", "by", "why"],
                failed,
            )
        )
    written = {
        "config": asdict(config),
        "heads": asdict(heads),
        "layers": layers,
        "devices": {name: asdict(DEVICES[name]) for name in config.devices},
        "versions": versions(),
        "flash": {length: flash(heads, length, config.batch_size, config.devices) for length in config.lengths},
        "costs": [asdict(cost) for cost in found],
    }
    (out / "roofline.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    lines = ["# Cost on paper", "", *_facts(config, heads, layers), ""]
    lines += [part for table in tables for part in (table.markdown(), "")]
    (out / "report.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return tables, [out / "roofline.json", out / "report.md"]


def _facts(config: RooflineConfig, heads: HeadShape, layers: int) -> list[str]:
    shape = f"batch {config.batch_size}, {heads.num_heads} heads of {heads.head_dim}"
    if heads.num_key_value_heads != heads.num_heads:
        shape += f" that share {heads.num_key_value_heads} key/value heads"
    lines = [f"- {shape}, bfloat16, a forward and a backward pass"]
    if config.model is not None:
        lines.append(f"- heads and {layers} layers of {config.model}")
    for name in config.devices:
        device = DEVICES[name]
        lines.append(
            f"- {device.name}: {device.half / 1e12:g} TFLOP/s in bfloat16, {device.single / 1e12:g} in float32, "
            f"{device.bandwidth / 1e12:g} TB/s ({device.source})"
        )
    return [*lines, f"- starting an operation: {LAUNCH * 1e6:g} us"]


def amounts_table(config: RooflineConfig, heads: HeadShape, found: list[Cost]) -> Table:
    """Arithmetic, bytes and launches of a layer, by length."""
    note = (
        "GFLOP of products, GB read and written, and operations started by a layer whose mask others have seen before. "
        "Batched: counted, each operation by itself. Others: the products of a kernel of theirs, each tensor moved "
        "once. ~ is extrapolated."
    )
    lengths = sorted(config.lengths)
    table = Table("What a layer asks for", note, ["attention", "by", *map(_tokens, lengths)])
    dense = [_amounts(flash(heads, length, config.batch_size, config.devices)) for length in lengths]
    table.rows.append(["softmax", "flash attention", *dense])
    for cost in _counted(found):
        row = [_amounts(cost.amounts[length]) if length in cost.amounts else "" for length in lengths]
        table.rows.append([cost.label, cost.by, *(_marked(cost, n, x) for n, x in zip(lengths, row, strict=True))])
    return table


def time_table(config: RooflineConfig, heads: HeadShape, layers: int, found: list[Cost], device: str) -> Table:
    """The least time of all layers on a device, by length, against flash attention's, and what length it pays from."""
    note = (
        f"The least time that the published rates allow for {f'all {layers} layers' if layers > 1 else 'a layer'}, in "
        "brackets times as fast as causal flash attention by the same rates. It pays from the shortest length from "
        "which on this is above 1. ~ is extrapolated."
    )
    lengths = sorted(config.lengths)
    header = ["attention", "by", *map(_tokens, lengths), "pays from"]
    table = Table(f"Time on {DEVICES[device].name}", note, header)
    dense = {n: takes(flash(heads, n, config.batch_size, [device]), device) for n in lengths}
    table.rows.append(["softmax", "flash attention", *(_time(layers * dense[n]) for n in lengths), ""])
    for cost in _counted(found):
        row = []
        for length in lengths:
            text = ""
            if length in cost.amounts:
                own = takes(cost.amounts[length], device)
                text = f"{_time(layers * own)} ({brief_number(dense[length] / own)}x)"
            row.append(_marked(cost, length, text))
        pays = cost.pays_from(device, heads, config.batch_size)
        longest = _tokens(max(cost.amounts))
        table.rows.append([cost.label, cost.by, *row, f"not up to {longest}" if pays is None else _tokens(pays)])
    return table


def _counted(found: list[Cost]) -> list[Cost]:
    return [cost for cost in found if cost.amounts]


def _marked(cost: Cost, length: int, text: str) -> str:
    return f"~{text}" if text and length not in cost.counted else text


def _tokens(length: int) -> str:
    return f"{length // 2**20}M" if length % 2**20 == 0 else f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _amounts(amounts: Amounts) -> str:
    return f"{brief_number(amounts['flops'] / 1e9)}, {brief_number(amounts['bytes'] / 1e9)}, {amounts['launches']:.0f}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else duration(seconds)
