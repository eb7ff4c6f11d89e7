"""Metrics of ``evaluate``: modules of this package where there is one of the name, the hub's and others' else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn_plugins.config.extras import need

LOCAL = Path(__file__).parent.parent / "metrics"


def local_metrics() -> list[str]:
    """Names of the metrics that need no download."""
    return sorted(path.stem for path in LOCAL.glob("[!_]*.py"))


def load_metric(name: str) -> Any:
    """A metric to ``compute(predictions=..., references=...)`` with.

    Args:
        name: one of :func:`local_metrics`, a name on the hub, or the path of a module of ``evaluate``.

    Returns:
        an ``evaluate.EvaluationModule`` that keeps its rows in memory, so that processes are not in each other's way.

    Raises:
        ValueError: there is none of the name, it cannot be reached, or a package that it needs is not installed.
    """
    evaluate = need("evaluate", "train")
    path = str(LOCAL / f"{name}.py") if name in local_metrics() else name
    try:
        return evaluate.load(path, keep_in_memory=True)
    except Exception as error:  # no network, no such name, a package that it needs: the message is evaluate's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"metric {name!r} cannot be loaded; allowed without a download: {', '.join(local_metrics())}. {reason}"
        ) from error


def compute_metrics(names: Sequence[str], predictions: list[str], references: list[str]) -> dict[str, float]:
    """Figures of texts: each metric's "score", or its one number, under its name; of others all their numbers, under
    their own names.

    Raises:
        ValueError: as :func:`load_metric`, or a metric cannot be computed of texts.
    """
    figures: dict[str, float] = {}
    for name in names:
        found = load_metric(name).compute(predictions=predictions, references=references)
        label = name.rpartition("/")[2].removesuffix(".py")
        if not isinstance(found, dict):
            figures[label] = float(found)
        elif "score" in found:
            figures[label] = float(found["score"])
        else:
            figures |= {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
    return figures
