"""What differs by more than noise is told from what does not, and where no noise is known that is said."""

import math

import pytest
from scipy import stats

from attn_plugins.benchmark.results.statistics import difference, spelled, summary


def test_means_with_their_errors():
    found = summary([1.0, 2.0, 3.0])
    assert (found.number, found.mean, found.deviation) == (3, 2.0, 1.0)
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert summary([2.0]).deviation is summary([2.0]).error is None
    assert spelled([math.inf, 1.0]) == "inf ± nan"
    assert [spelled(values) for values in ([], [2.0], [1.0, 2.0, 3.0])] == ["", "2.00", "2.00 ± 1.00"]


def test_seeds_that_both_have_are_paired():
    one, other = {0: 10.0, 1: 20.0, 2: 31.0, 9: 999.0}, {2: 30.0, 1: 19.2, 0: 9.1}
    found = difference(one, other)
    want = stats.ttest_rel([10.0, 20.0, 31.0], [9.1, 19.2, 30.0])
    assert found.p == pytest.approx(want.pvalue)
    assert found.p < 0.01
    assert found.mean == pytest.approx(0.9)
    assert found.error == pytest.approx(found.mean / want.statistic)
    assert str(found) == "+0.900 ± 0.058 (beyond noise, p 0.0041)"
    assert found.test == "paired t, 3 seeds"
    assert difference(other, one).mean == pytest.approx(-0.9)
    assert difference({0: 1.0, 1: 2.0}, {0: 1.5, 1: 1.6}).verdict.startswith("within noise, p 0.9")


def test_other_seeds_are_compared_unpaired():
    one, other = {0: 1.0, 1: 2.0, 2: 3.0}, {3: 7.0, 4: 9.0, 0: 11.0}
    found = difference(one, other)
    want = stats.ttest_ind(list(one.values()), list(other.values()), equal_var=False)
    assert found.p == pytest.approx(want.pvalue)
    assert found.error == pytest.approx(found.mean / want.statistic)
    assert found.test == "Welch's t, 3 and 3 seeds"


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({0: 1.0}, {0: 1.0}, "same"),
        ({0: 1.5}, {0: 1.0}, "+0.500 (one seed, noise unknown)"),
        ({0: 1.5}, {1: 1.0}, "+0.500 (no seed in common, noise unknown)"),
        ({0: 1.5, 1: 1.5}, {0: 1.0, 1: 1.0}, "+0.500 (the same with each of 2 seeds)"),
        ({0: 0.95, 1: 0.9, 2: 0.85}, {0: 0.9, 1: 0.85, 2: 0.8}, "+0.050 (the same with each of 3 seeds)"),
        ({0: 1.5, 1: 1.5}, {2: 1.0, 3: 1.0}, "+0.500 (seeds change nothing, noise unknown)"),
        ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, "same"),
        ({0: math.inf, 1: 2.0}, {0: 1.0, 1: 2.0}, "+inf (not finite, noise unknown)"),
    ],
)
def test_where_no_noise_is_known_it_is_said(one, other, said):
    assert str(difference(one, other)) == said
