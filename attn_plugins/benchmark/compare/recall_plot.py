"""What a comparison's tasks beside its first one found: columns, and recall against distance."""

from dataclasses import dataclass
from typing import Any

from attn_plugins.benchmark.results.tables import frame
from attn_plugins.tasks import Task, get_task


@dataclass(frozen=True, kw_only=True)
class Line:
    """One attention at one stage, in a plot."""

    label: str
    number: int
    """Of its colour and marker."""
    dashed: bool
    found: dict[str, dict[str, Any]]
    """What is recalled -> its figures."""


def other_columns(tasks: list[Task]) -> dict[str, tuple[str, str | None]]:
    """Heading of a column -> the task, and the part of it where it has several."""
    columns: dict[str, tuple[str, str | None]] = {}
    for task in tasks:
        parts = task.parts() if task.recalls else ()  # type: ignore[attr-defined]
        if len(parts) > 1:
            columns |= {part: (task.name, part) for part in parts if part not in columns}
        else:
            columns[task.name] = (task.name, None)
    return columns


def other_value(result: dict[str, Any], task: str, part: str | None) -> float:
    """The figure of such a column in a cell's result."""
    figures = result["others"][task]
    return (figures if part is None else figures["by_part"][part])[get_task(task).metric]


def recalled(tasks: list[Task], result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is recalled -> its figures in a cell's result, of all tasks that tell."""
    found = {tasks[0].name: result["figures"], **result.get("others", {})}
    parts: dict[str, dict[str, Any]] = {}
    for task in tasks:
        if task.recalls:
            parts |= found[task.name].get("by_part", {task.name: found[task.name]})
    return parts


def draw_recall(title: str, lines: list[Line]) -> Any:
    """A panel for each thing that is recalled: the share that is right against distance; None without distances."""
    names = dict.fromkeys(name for line in lines for name, its in line.found.items() if len(its["by_distance"]) > 1)
    if not names:
        return None
    figure, axes = frame(len(names))
    for axis, name in zip(axes, names, strict=True):
        for line in lines:
            places = line.found[name]["by_distance"]
            distances = [place["distance"] for place in places]
            style = {"color": f"C{line.number}", "marker": "osD^vPX*"[line.number % 8], "mfc": "none"}
            shares = [place["accuracy"] for place in places]
            axis.plot(distances, shares, ls="--" if line.dashed else "-", label=line.label, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(distances, [str(distance) for distance in distances])
        axis.minorticks_off()
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("distance in tokens")
        axis.set_title(f"{title}, {name}", fontsize="medium")
    axes[0].set_ylabel("share of the answer that is right")
    axes[0].legend(fontsize="small")
    return figure
