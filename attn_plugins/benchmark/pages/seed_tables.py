"""Tables of results over seeds, in Markdown: means, and between which figures they lie."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attn_plugins.config.versions import spelled_own

Record = dict[str, Any]
Figures = Mapping[str, str]
"""Figure of a result -> the heading of its column."""


def by(records: Sequence[Record], of: Callable[[Record], str]) -> dict[str, list[Record]]:
    """Records by what ``of`` says of them, in the order in which they were measured; those that failed are left out."""
    found: dict[str, list[Record]] = {}
    for one in records:
        if one["status"] == "ok":
            found.setdefault(of(one), []).append(one)
    return found


def table(first: str, rows: Sequence[tuple[str, list[Mapping[str, float]]]], figures: Figures) -> list[str]:
    """A row for each label, with its results' figures; ``first`` is the heading of the labels."""
    lines = [f"| {first} | {' | '.join(figures.values())} |", "|---" * (1 + len(figures)) + "|"]
    for label, results in rows:
        cells = [spread(name, [one[name] for one in results]) for name in figures]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def spread(name: str, values: Sequence[float]) -> str:
    """The mean, and between which figures it lies where there are several."""
    mean = number(name, values)
    least, most = (number(name, [value]) for value in (min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def number(name: str, values: Sequence[float]) -> str:
    """The mean of a figure of this name."""
    mean = sum(values) / len(values)
    return f"{mean:.0f}" if name == "perplexity" and mean >= 100 else f"{mean:.2f}"


def made(records: Sequence[Record], several: str = "mean (least to most) of the seeds") -> str:
    """Seeds and versions of the records; ``several`` says what figures are where there are several seeds."""
    seeds = sorted({one["seed"] if "seed" in one else one["settings"]["seed"] for one in records})
    how = list(dict.fromkeys(f"torch {one['versions']['torch']}, {spelled_own(one['versions'])}" for one in records))
    numbers = ", ".join(map(str, seeds))
    told = several if len(seeds) > 1 else "one seed"
    return f"Seeds {numbers}, {told}; {'; '.join(how)}." if len(seeds) > 1 else f"Seed {numbers}, {told}; {how[0]}."
