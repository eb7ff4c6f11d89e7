"""Figures of a group as plotly's JSON: a page draws them, in its own colours, without plotly's Python."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from attn_plugins.benchmark.compare.report import PASSES, SCOPES
from attn_plugins.benchmark.html.groups import COSTS, Cost, Figure, Group, Place, Row, metric_of
from attn_plugins.benchmark.results.tables import brief_number

IN_TOKENS = ("distance", "length", "position", "gap")
"""Places whose numbers are tokens."""

FAR = 3
"""Lines that lie beyond so many times the median are named below a figure, and do not set its scale."""

WIDE = 6
"""Figures of which the greatest is so many times the least stand on a logarithmic axis."""


def place_words(place: Place) -> str:
    """Where a cost was measured."""
    scope, length, which = place
    whole = {
        "cache": f"cache after {length} tokens",
        "decode": f"a token after {length} others",
        "step": f"a training step of {length} tokens",
    }
    return whole.get(which, f"{SCOPES.get(scope, scope)}, {PASSES.get(which, which)}, {length} tokens")


def front(points: list[tuple[float, float]], lower: bool) -> list[int]:
    """Which of (cost, quality) no other point beats in both, cheapest first."""
    order = sorted(range(len(points)), key=lambda n: (points[n][0], points[n][1] if lower else -points[n][1]))
    best: list[int] = []
    for number in order:
        value = points[number][1]
        if not best or (value < points[best[-1]][1] if lower else value > points[best[-1]][1]):
            best.append(number)
    return best


def figures_of(group: Group) -> list[dict[str, Any]]:
    """All figures that what was measured allows, in the order of the page's sections."""
    return [
        *(one for cost in COSTS if (one := _quality_by_cost(group, cost)) is not None),
        *_curves(group),
        *_costs_by_length(group),
        *_maps(group),
        *_losses(group),
    ]


def _quality_by_cost(group: Group, cost: Cost) -> dict[str, Any] | None:
    found = [(row, its) for row in group.ranked if (its := group.cost(row.attention, cost)) is not None]
    if len({its for _, its in found}) < 2:
        return None
    scale = 1 if cost.ratio else 2**20
    points = [(its / scale, row.figure.mean) for row, its in found if row.figure is not None]
    best = front(points, group.lower)
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [points[number][0] for number in best],
            "y": [points[number][1] for number in best],
            "line": {"shape": "hv", "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
            "meta": {"front": True},
        }
    ]
    for number, (row, _) in enumerate(found):
        x, y = points[number]
        data.append(
            {
                **_trace(group, row, [x], [y], "markers+text"),
                "error_y": _bars([row.figure]),
                "text": [_safe(row.attention) if number in best else ""],
                "textposition": "bottom center"
                if (best.index(number) if number in best else 0) % 2 == 0
                else "top center",
                "hovertemplate": f"{_safe(row.attention)}, {_safe(row.stage)}<br>{group.metric} {row.figure}"
                f"<br>{cost.name} %{{x:.3g}}<extra></extra>",
            }
        )
    place = group.place(cost)
    where = "" if place is None else sentence(place_words(place))
    units = f"{cost.name}, times {_safe(str(group.baseline))}'s" if cost.ratio else f"{cost.name}, MiB"
    names = ", then ".join(f"{found[n][0].attention} ({found[n][0].stage})" for n in best)
    axis, above = _framed([(row, [y]) for (row, _), (_, y) in zip(found, points, strict=True)], group.lower)
    return {
        "section": "cost",
        "title": f"{group.metric} against {cost.name}",
        "caption": " ".join(filter(None, [where, f"On the front, cheapest first: {names}.", above])),
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": units}, **_log_axis([x for x, _ in points], 4)},
            "yaxis": {"title": {"text": f"{group.metric} ({'lower' if group.lower else 'higher'} is better)"}, **axis},
        },
    }


def _curves(group: Group) -> Iterator[dict[str, Any]]:
    """What was measured by position, by distance or by length."""
    lines: dict[tuple[str, str, str], dict[int, dict[Any, dict[Any, float]]]] = {}
    for number, row in enumerate(group.rows):
        for seed, result in row.results.items():
            for key, points in series(result, group.metric):
                for x, y in points:
                    lines.setdefault(key, {}).setdefault(number, {}).setdefault(x, {})[seed] = y
    for (name, by, metric), by_row in lines.items():
        data, drawn = [], []
        for number, by_place in by_row.items():
            row, found = group.rows[number], [Figure(values) for values in by_place.values()]
            means = [figure.mean for figure in found]
            drawn.append((row, means))
            data.append({**_trace(group, row, list(by_place), means, "lines+markers"), "error_y": _bars(found)})
        places = list(dict.fromkeys(x for by_place in by_row.values() for x in by_place))
        share = metric in ("accuracy", "exact")
        axis, above = _framed(drawn, metric == group.metric and group.lower)
        text = any(isinstance(x, str) for x in places)
        yield {
            "section": "curves",
            "title": f"{name} by {by}",
            "caption": above,
            "data": data,
            "layout": {
                "xaxis": {
                    "title": {"text": f"{by} in tokens" if by in IN_TOKENS else by},
                    **({"type": "category"} if text else _lengths(places)),
                },
                "yaxis": {"title": {"text": metric}, **({"range": [-0.03, 1.05]} if share else axis)},
            },
        }


def series(
    result: dict[str, Any], metric: str | None
) -> Iterator[tuple[tuple[str, str, str], list[tuple[Any, float]]]]:
    """((what, place, figure), points) of every ``by_...`` list in a result that has at least two entries."""
    if metric is not None:
        yield from _series(metric, metric, result.get("figures", {}))
    for task, figures in result.get("others", {}).items():
        yield from _series(task, metric_of(task), figures)


def _series(
    name: str, metric: str | None, figures: Any
) -> Iterator[tuple[tuple[str, str, str], list[tuple[Any, float]]]]:
    parts = figures.get("by_part") or {}
    for part, its in parts.items():
        yield from _series(part, metric, its)
    for key, entries in () if parts else figures.items():
        if not key.startswith("by_") or not isinstance(entries, list) or len(entries) < 2:
            continue
        place, shown = key.removeprefix("by_"), None
        points = []
        for entry in entries:
            x = _place(entry, place)
            values = {k: v for k, v in entry.items() if isinstance(v, float)}
            shown = metric if metric in values else next(iter(values), None)
            if x is not None and shown is not None:
                points.append((x, values[shown]))
        if len(points) > 1 and shown is not None:
            yield (name, place, shown), points


def _place(entry: dict[str, Any], name: str) -> Any:
    return f"{entry['from']}\u2013{entry['to']}" if {"from", "to"} <= set(entry) else entry.get(name)


def _costs_by_length(group: Group) -> Iterator[dict[str, Any]]:
    for cost in COSTS:
        measured = group.costs.get(cost.kind, {})
        places = sorted({place for found in measured.values() for place in found})
        for scope, which in dict.fromkeys((scope, which) for scope, _, which in places):
            lengths = sorted({length for s, length, w in places if (s, w) == (scope, which)})
            data = []
            for attention, found in measured.items() if len(lengths) > 1 else ():
                points = [(n, found[scope, n, which]) for n in lengths if (scope, n, which) in found]
                row = Row(attention=attention, stage="", family="", records=[], missing=[])
                y = [its["times_as_fast"] if cost.ratio else its["bytes"] / 2**20 for _, its in points]
                bars = _rounds([its for _, its in points]) if cost.ratio else {"visible": False}
                data.append({**_trace(group, row, [n for n, _ in points], y, "lines+markers"), "error_y": bars})
            if not data:
                continue
            axis = _log_axis([y for trace in data for y in trace["y"]], 8)
            units = f"times as fast as {_safe(str(group.baseline))}" if cost.ratio else f"{cost.name}, MiB"
            what = sentence(f"{SCOPES[scope]}, {PASSES[which]}") if which in PASSES else ""
            bars_are = "Bars: slowest and fastest round." if cost.ratio else ""
            yield {
                "section": "curves",
                "title": f"{'speed' + cost.name.removeprefix('time') if cost.ratio else cost.name} by length",
                "caption": f"{what} {bars_are}".strip(),
                "data": data,
                "layout": {
                    "xaxis": {"title": {"text": "length in tokens"}, **_lengths(lengths)},
                    "yaxis": {"title": {"text": units}, **axis},
                    "shapes": [_line_at(1)] if cost.ratio else [],
                },
            }


def _rounds(found: list[dict[str, Any]]) -> dict[str, Any]:
    up = [its["highest"] - its["times_as_fast"] for its in found]
    down = [its["times_as_fast"] - its["lowest"] for its in found]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 3}


def _maps(group: Group) -> Iterator[dict[str, Any]]:
    """Layers x heads: scores that a choice was made by, with what it kept; or which attention serves which head."""
    for attention in group.attentions:
        results = [one for row in group.measured if row.attention == attention for one in row.results.items()]
        scored = {json.dumps(result["scores"]): seed for seed, result in reversed(results) if result.get("scores")}
        served = {
            json.dumps(its): seed for seed, result in reversed(results) if (its := result["attention"].get("map"))
        }
        for told, seed in reversed((scored or served).items()):
            several = f", seed {seed}" if len(scored or served) > 1 else ""
            if scored:
                yield _score_map(f"{attention}{several}", json.loads(told))
            for role, layers in () if scored else json.loads(told).items():
                yield _kind_map(f"{attention}{several}" + (f", {role}" if role != "decoder" else ""), layers)


def _score_map(name: str, scores: list[dict[str, Any]]) -> dict[str, Any]:
    layers = list(dict.fromkeys((one.get("role", ""), one["layer"]) for one in scores))
    heads = sorted({one.get("kv_head") or 0 for one in scores})
    z: list[list[float | None]] = [[None] * len(layers) for _ in heads]
    kept: list[list[str]] = [[""] * len(layers) for _ in heads]
    for one in scores:
        x, y = layers.index((one.get("role", ""), one["layer"])), heads.index(one.get("kv_head") or 0)
        z[y][x], kept[y][x] = one["score"], "●" if one["kept"] else ""
    several = len({role for role, _ in layers}) > 1
    return {
        "section": "maps",
        "title": f"{name}: scores, and what keeps full attention",
        "caption": f"● keeps full attention: {sum(one['kept'] for one in scores)} of {len(scores)}.",
        "data": [
            {
                "type": "heatmap",
                "z": z,
                "x": [f"{role} {layer}" if several else str(layer) for role, layer in layers],
                "y": [str(head) for head in heads],
                "text": kept,
                "texttemplate": "%{text}",
                "colorscale": "Cividis",
                "colorbar": {"title": {"text": "score", "side": "right"}, "thickness": 12},
                "xgap": 1,
                "ygap": 1,
                "hovertemplate": "layer %{x}, head %{y}<br>score %{z:.3g} %{text}<extra></extra>",
            }
        ],
        "layout": _grid(len(heads), any(one.get("kv_head") is not None for one in scores)),
    }


def _kind_map(name: str, layers: list[list[str]]) -> dict[str, Any]:
    heads = max(map(len, layers))
    kinds = list(dict.fromkeys(kind for layer in layers for kind in layer))
    kinds.sort(key=lambda kind: kind == "softmax" or kind.startswith("own ("))  # what sees all tokens stands out
    shown = [layer * heads if len(layer) == 1 else [*layer, *[None] * (heads - len(layer))] for layer in layers]
    rows = [list(row) for row in zip(*shown, strict=True)]
    counts = {kind: sum(row.count(kind) for row in rows) for kind in kinds}
    what = "heads" if heads > 1 else "layers"
    return {
        "section": "maps",
        "title": f"{name}: which attention serves which {what[:-1]}",
        "caption": ", ".join(f"{kind} in {count} of {sum(counts.values())} {what}" for kind, count in counts.items())
        + ".",
        "data": [
            {
                "type": "heatmap",
                "z": [[None if kind is None else kinds.index(kind) for kind in row] for row in rows],
                "x": [str(layer) for layer in range(len(layers))],
                "y": [str(head) for head in range(heads)],
                "text": [[kind or "" for kind in row] for row in rows],
                "zmin": -0.5,
                "zmax": len(kinds) - 0.5,
                "meta": {"kinds": len(kinds)},
                "colorbar": {
                    "tickvals": list(range(len(kinds))),
                    "ticktext": kinds,
                    "thickness": 12,
                },
                "xgap": 1,
                "ygap": 1,
                "hovertemplate": "layer %{x}, head %{y}: %{text}<extra></extra>",
            }
        ],
        "layout": _grid(heads, heads > 1),
    }


def _grid(heads: int, named: bool) -> dict[str, Any]:
    return {
        "height": 130 + 26 * heads,
        "xaxis": {"title": {"text": "layer"}, "type": "category", "showgrid": False},
        "yaxis": {
            "title": {"text": "key/value head" if named else ""},
            "type": "category",
            "showgrid": False,
            "autorange": "reversed",
            "showticklabels": named,
        },
    }


def _losses(group: Group) -> Iterator[dict[str, Any]]:
    """Losses along transfers and fine-tunes, a line a seed."""
    for stage in dict.fromkeys(row.stage for row in group.measured):
        data, ys = [], []
        for row in group.measured:
            for seed, result in row.results.items() if row.stage == stage else ():
                told = [one for one in result.get("train", {}).get("losses", []) if "loss" in one]
                if len(told) < 2:
                    continue
                y = [one["loss"] for one in told]
                ys += y
                trace = _trace(group, row, [one["step"] for one in told], y, "lines+markers")
                name = f"{_safe(row.attention)}, seed {seed}"
                data.append({**trace, "hovertemplate": f"{name}<br>step %{{x}}: %{{y:.4g}}<extra></extra>"})
        if data:
            yield {
                "section": "training",
                "title": f"loss in training, {stage}",
                "caption": "A line a seed.",
                "data": data,
                "layout": {
                    "xaxis": {"title": {"text": "step"}},
                    "yaxis": {"title": {"text": "loss"}, **_log_axis(ys, 10)},
                },
            }


def _trace(group: Group, row: Row, x: list[Any], y: list[float], mode: str) -> dict[str, Any]:
    """A trace that a page gives the colour, marker and dash of its attention and stage."""
    own = row.attention == group.baseline
    number = [name for name in group.attentions if name != group.baseline].index(row.attention) if not own else -1
    return {
        "type": "scatter",
        "mode": mode,
        "x": x,
        "y": y,
        "name": f"{row.attention}, {row.stage}" if row.stage else row.attention,
        "meta": {"attention": row.attention, "stage": row.stage, "number": number},
    }


def _bars(figures: Sequence[Figure | None]) -> dict[str, Any]:
    errors = [None if figure is None else figure.error for figure in figures]
    if not any(errors):
        return {"visible": False}
    return {"type": "data", "array": [error or 0 for error in errors], "thickness": 1, "width": 3}


def _framed(lines: list[tuple[Row, list[float]]], lower: bool) -> tuple[dict[str, Any], str]:
    """An axis, and a sentence that names the lines beyond it: one that is far off would flatten all others."""
    found = [(row, y) for row, ys in lines if (y := [value for value in ys if math.isfinite(value)])]
    values = sorted(value for _, y in found for value in y)
    if not lower or not values or values[0] <= 0:
        return {}, ""
    limit = FAR * statistics.median(values)
    kept = [value for value in values if value <= limit]
    axis = _log_axis(kept, WIDE)
    beyond = [f"{row.attention} ({row.stage}, {brief_number(min(y))})" for row, y in found if min(y) > limit]
    if len(kept) < len(values):
        ends = [math.log10(value) if axis else value for value in (kept[0], kept[-1])]
        pad = (ends[1] - ends[0] or abs(ends[0]) or 1.0) * 0.12
        axis = {**axis, "range": [ends[0] - pad, ends[1] + pad]}
    return axis, f"Above the frame: {', '.join(beyond)}." if beyond else ""


def _log_axis(values: list[float], factor: float) -> dict[str, Any]:
    """A logarithmic axis with its ticks written out, where values lie further apart than that."""
    values = [value for value in values if math.isfinite(value)]
    if not values or min(values) <= 0 or max(values) < factor * min(values):
        return {}
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if min(values) / 1.6 <= tick <= max(values) * 1.6]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _lengths(values: Sequence[float]) -> dict[str, Any]:
    return {"type": "log", "tickvals": sorted(values), "ticktext": [str(value) for value in sorted(values)]}


def sentence(text: str) -> str:
    """Text with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def _line_at(y: float) -> dict[str, Any]:
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": {"width": 1, "dash": "dot"}}


def _safe(text: str) -> str:
    """Text in plotly's labels, which take some HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")
