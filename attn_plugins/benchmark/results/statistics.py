"""Figures over seeds: what they are on average, how far that is known, and whether two of them differ by more."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attn_plugins.benchmark.results.tables import brief_number
from attn_plugins.config.extras import need

LEVEL = 0.05
"""A difference with a greater p is within the noise."""
ROUNDING = 1e-12
"""Of the figures: seeds that give a difference to within this have the same one, as 0.95 - 0.9 is 0.9 - 0.85."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of several seeds."""

    number: int
    mean: float
    deviation: float | None
    """Standard deviation of the seeds, with n - 1; None of one."""

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None of one seed."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.number)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much one set of figures is above another, and whether that is more than noise."""

    mean: float
    error: float | None
    """Standard error of the mean difference, or None where no noise is known."""
    p: float | None
    """Probability of as great a difference where there is none, two-sided, or None where no noise is known."""
    test: str
    """How p was found, or why there is none."""

    @property
    def verdict(self) -> str:
        """In a few words: same, within noise, beyond noise, or that no noise is known."""
        if self.p is not None:
            return f"{'beyond' if self.p < LEVEL else 'within'} noise, p {self.p:.2g}"
        return "same" if self.mean == 0 else self.test

    def __str__(self) -> str:
        if self.mean == 0 and self.p is None:
            return "same"
        shown = f"{'+' if self.mean >= 0 else '-'}{brief_number(abs(self.mean))}"
        return f"{shown}{'' if self.error is None else f' ± {brief_number(self.error)}'} ({self.verdict})"


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of at least one value; the latter is no number where one of them is infinite."""
    finite = all(map(math.isfinite, values))
    mean, deviation = statistics.mean(values) if finite else sum(values) / len(values), None
    if len(values) > 1:
        deviation = statistics.stdev(values) if finite else math.nan
    return Summary(number=len(values), mean=mean, deviation=deviation)


def spelled(values: Sequence[float]) -> str:
    """Mean, and where there are several values, ± their standard deviation; nothing of none."""
    if not values:
        return ""
    found = summary(values)
    mean = brief_number(found.mean)
    return mean if found.deviation is None else f"{mean} ± {brief_number(found.deviation)}"


def difference(one: Mapping[Any, float], other: Mapping[Any, float]) -> Difference:
    """``one`` minus ``other``, each a figure by seed.

    Of two and more seeds that both have: a paired t test of these. Where they share fewer and each has two: Welch's t
    test. Both are two-sided. Where the seeds change nothing of the difference, or there is one, no noise is known.

    Raises:
        ValueError: scipy is not installed.
    """
    shared = [seed for seed in one if seed in other]
    if len(shared) < 2 and min(len(one), len(other)) > 1:
        return _unpaired(summary(list(one.values())), summary(list(other.values())))
    if not shared:
        mean = statistics.mean(one.values()) - statistics.mean(other.values())
        return Difference(mean=mean, error=None, p=None, test="no seed in common, noise unknown")
    found = summary([one[seed] - other[seed] for seed in shared])
    if found.error is None:
        return Difference(mean=found.mean, error=None, p=None, test="one seed, noise unknown")
    if not math.isfinite(found.error):
        return Difference(mean=found.mean, error=None, p=None, test="not finite, noise unknown")
    if found.error <= ROUNDING * max(abs(side[seed]) for side in (one, other) for seed in shared):
        return Difference(mean=found.mean, error=None, p=None, test=f"the same with each of {len(shared)} seeds")
    p = 2 * need("scipy.stats", "train").t.sf(abs(found.mean) / found.error, len(shared) - 1)
    return Difference(mean=found.mean, error=found.error, p=float(p), test=f"paired t, {len(shared)} seeds")


def _unpaired(one: Summary, other: Summary) -> Difference:
    assert one.error is not None
    assert other.error is not None
    mean, error = one.mean - other.mean, math.hypot(one.error, other.error)
    if error == 0 or not math.isfinite(error):
        return Difference(mean=mean, error=None, p=None, test="seeds change nothing, noise unknown")
    told = {"mean1": one.mean, "std1": one.deviation, "nobs1": one.number}
    told |= {"mean2": other.mean, "std2": other.deviation, "nobs2": other.number}
    p = need("scipy.stats", "train").ttest_ind_from_stats(**told, equal_var=False).pvalue
    return Difference(mean=mean, error=error, p=float(p), test=f"Welch's t, {one.number} and {other.number} seeds")
