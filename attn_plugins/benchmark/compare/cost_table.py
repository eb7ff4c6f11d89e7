"""What whole models cost, in tables: a row an attention, a table a length."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attn_plugins.benchmark.results.tables import Table, brief_number, duration

if TYPE_CHECKING:
    from attn_plugins.benchmark.compare.report import CompareResults

Figures = dict[str, Any]


def cost_note(result: Figures) -> str:
    """A line of progress on a cell of cost."""
    if "bytes" in result:
        return f"{result['bytes']:,} bytes of cache"
    if "launches" in result:
        return f"{result['launches']:,} launches, {duration(result['least_seconds'])} at least on {result['gpu']}"
    return f"{result['times_as_fast']:.2f}x the baseline, {duration(result['seconds'])}"


def figures(found: "CompareResults", model: str, attention: str, what: str, length: int) -> Figures | None:
    """What a cell of cost found, or None where it has no result."""
    records = found.of(model, attention, "cost", what=what, length=length)
    return records[0]["result"] if records and records[0]["status"] == "ok" else None


def cache_cell(found: "CompareResults", model: str, attention: str, length: int) -> str:
    """MiB of a cache, and its share of the baseline's."""
    own = figures(found, model, attention, "cache", length)
    base = figures(found, model, found.config.baseline, "cache", length)
    if own is None:
        return _missing(found, model, attention, "cache", length)
    return brief_number(own["bytes"] / 2**20) + (f" ({own['bytes'] / base['bytes']:.3f})" if base else "")


def cost_tables(found: "CompareResults") -> list[Table]:
    """A table for each length."""
    config, asked = found.config, found.config.cost
    if asked is None:
        return []
    device = asked.gpu
    columns: dict[str, dict[str, Callable[[Figures], str]]] = {
        "decode": {"a token": _times, "J a token": _joules},
        "step": {"a training step": _times, "peak MiB": _peak, "J a step": _joules},
        "paper": {
            "launches": lambda its: f"{its['launches']:,}",
            f"least on {device}": lambda its: duration(its["least_seconds"]),
        },
    }
    notes = {
        "cache": "Cache: MiB of a row",
        "decode": f"A token with so many before it: times as fast as {config.baseline} in the same rounds, median",
        "step": f"A training step of all weights: times as fast as {config.baseline}'s; its peak is what it allocates, "
        "gradients included, weights and the optimizer's states not",
        "paper": f"On paper: launches of the attention layers of a step, forward and backward, in their batched form, "
        f"and the least time that the published rates of {device} allow for these layers in bfloat16",
    }
    tables = []
    for length in asked.lengths:
        chosen = {
            what: {name: show for name, show in columns[what].items() if _has(found, what, length, name)}
            for what in asked.what
            if what in columns
        }
        header = [*(["model"] if len(config.models) > 1 else []), "attention"]
        header += ["cache MiB"] if "cache" in asked.what else []
        header += [name for shown in chosen.values() for name in shown]
        note = ". ".join(notes[what] for what in notes if what in asked.what)
        detail = (
            f"In brackets the share of {config.baseline}'s bytes; the lowest and highest of the rounds, and the time."
        )
        table = Table(f"Cost at {length} tokens", f"{note}. Batch {asked.batch_size}.", header, detail=detail)
        for model in config.models:
            for attention in config.attentions:
                row = [*([model] if len(config.models) > 1 else []), attention]
                row += [cache_cell(found, model, attention, length)] if "cache" in asked.what else []
                for what, shown in chosen.items():
                    its = figures(found, model, attention, what, length)
                    why = _missing(found, model, attention, what, length)
                    row += [why if its is None else show(its) for show in shown.values()]
                table.rows.append(row)
        tables.append(table)
    return tables


def _missing(found: "CompareResults", model: str, attention: str, what: str, length: int) -> str:
    records = found.of(model, attention, "cost", what=what, length=length)
    return str(records[0]["status"]) if records else "not run"


def _has(found: "CompareResults", what: str, length: int, name: str) -> bool:
    """Whether a column is shown: energy is, where a device has told it."""
    if not name.startswith("J "):
        return True
    places = ((model, attention) for model in found.config.models for attention in found.config.attentions)
    return any("joules" in (figures(found, *place, what, length) or {}) for place in places)


def _times(its: Figures) -> str:
    return f"{its['times_as_fast']:.2f}x ({its['lowest']:.2f} to {its['highest']:.2f}; {duration(its['seconds'])})"


def _joules(its: Figures) -> str:
    return brief_number(its["joules"]) if "joules" in its else ""


def _peak(its: Figures) -> str:
    return brief_number(its["peak_bytes"] / 2**20) if "peak_bytes" in its else ""
