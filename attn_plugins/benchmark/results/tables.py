"""Tables for a terminal and for Markdown, and the frame of a plot: how results are shown."""

import math
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table as RichTable

NAME = 40
"""Columns of a terminal that a row's name has for itself; a longer one would leave the others none."""


@dataclass
class Table:
    """A table, to be shown on a terminal or as Markdown."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    aside: tuple[str, ...] = ()
    """Columns that a terminal is too narrow for."""
    detail: str = ""
    """What stands in brackets in the cells; a terminal shows the cells without it."""

    def markdown(self, level: int = 2) -> str:
        """The table under a heading of this level."""
        lines = [
            f"{'#' * level} {self.title}",
            "",
            f"{self.note} {self.detail}".strip(),
            "",
            f"| {' | '.join(self.header)} |",
            "|---" * len(self.header) + "|",
        ]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in self.rows]
        return "\n".join(lines)

    def rich(self) -> RichTable:
        from rich.text import Text

        table = RichTable(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        shown = [number for number, name in enumerate(self.header) if name not in self.aside]
        short = max((len(row[0]) for row in self.rows), default=0) <= NAME
        for number in shown:
            right, whole = number > 1, number == 0 and short
            table.add_column(_brief(self.header[number]), justify="right" if right else "left", no_wrap=whole)
        for row in self.rows:
            cells = [row[number].partition(" (")[0] if self.detail else row[number] for number in shown]
            table.add_row(*map(Text, cells))
        return table


def _brief(header: str) -> str:
    """A column's name for a terminal, where it may be one of nine."""
    return header.replace("forward", "fwd").replace("backward", "bwd").replace(" + ", "+")


def frame(panels: int, columns: int = 4) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its panels, ``columns`` to a row."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(8 if panels == 1 else 6 * columns, 5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.grid(alpha=0.3)
    return figure, list(axes[:panels])


def brief_number(value: float) -> str:
    """About three digits."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10_000:
        return f"{value:.3g}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
