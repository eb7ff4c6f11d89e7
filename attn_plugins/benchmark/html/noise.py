"""Whether two rows differ by more than their seeds do, in terms of better and worse."""

import math
from dataclasses import dataclass
from typing import Literal

from attn_plugins.benchmark.html.groups import Row
from attn_plugins.benchmark.results.statistics import LEVEL
from attn_plugins.benchmark.results.statistics import difference as tested

Verdict = Literal["better", "worse", "noise", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A row beside another one."""

    verdict: Verdict
    """noise: a test over seeds does not tell them apart. unknown: one seed, or seeds that change nothing."""
    change: float
    """Of the figure, as a share of the other's; positive is better."""
    several: bool
    """Whether there are several seeds."""

    def __str__(self) -> str:
        """A few characters: ≈ is within the noise, ~ is where several seeds tell no noise."""
        sign = {"noise": "≈ ", "unknown": "~ " if self.several else ""}.get(self.verdict, "")
        if self.change < -3:
            return f"{sign}{1 - self.change:.0f}\u00d7"
        return f"{sign}{self.change:+.1%}".replace("-0.0%", "0.0%").replace("+0.0%", "0.0%").translate(SPELLED)


SPELLED = str.maketrans({"-": "\u2212", "%": " %"})


def share(part: float) -> str:
    """A share in percent, with a digit more where it is small."""
    return (f"{part:.1%}" if 0 < part < 0.0095 else f"{part:.0%}").translate(SPELLED)


def beside(row: Row, other: Row, lower: bool) -> Beside | None:
    """How a row stands beside another, by a test over the seeds of both; None without finite figures.

    Args:
        lower: whether lower figures are better.
    """
    own, base = row.figure, other.figure
    if own is None or base is None or not (math.isfinite(own.mean) and math.isfinite(base.mean)):
        return None
    gap = tested(own.values, base.values)
    better = gap.mean < 0 if lower else gap.mean > 0
    change = abs(own.mean - base.mean) / abs(base.mean) if base.mean else 0.0
    verdict: Verdict = "unknown"
    if gap.p is not None:
        verdict = "noise" if gap.p >= LEVEL else "better" if better else "worse"
    return Beside(verdict=verdict, change=change if better else -change, several=len(own.values) > 1)
