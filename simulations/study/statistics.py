"""Statistics of a study: pure functions of numbers, over seeds and over cells.

Intervals are Student's over seeds, differences are taken seed by seed against a reference
(paired t-test), p-values of a family are adjusted by Holm's step-down rule (Holm 1979), methods are
ranked within blocks with Nemenyi's critical difference (Demsar 2006, JMLR 7, equation for CD). What
cannot be said is None, never a number: one seed has no interval, and a pair that lacks a run has no
difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Confidence level of all intervals; 1 - LEVEL is the significance of critical differences."""
By = Mapping[int, float]
"""A number of each seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval."""

    mean: float
    low: float | None
    """None for one seed."""
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Difference:
    """A method less the reference, over the seeds that both have."""

    estimate: Estimate
    p: float | None
    """Two-sided, of the paired t-test; None for one pair, and for constant differences but 0."""
    missing: tuple[int, ...]
    """Seeds that only one of the two has."""


@dataclass(frozen=True)
class Ranking:
    """Mean ranks over blocks, 1 being the best."""

    ranks: Mapping[str, float]
    critical: float | None
    """Mean ranks closer than this do not differ; None for fewer than two methods or blocks."""
    p: float | None
    """P-value of Friedman's test; None below three methods or two blocks, or if all tie."""
    blocks: int
    left_out: int
    """Blocks in which a method is missing."""


def estimate(values: By, level: float = LEVEL) -> Estimate:
    """Mean and Student's interval.

    Raises:
        ValueError: if there is no value.
    """
    if not values:
        raise ValueError("a mean needs a value")
    found = np.array([values[seed] for seed in sorted(values)], dtype=np.float64)
    mean = float(found.mean())
    if found.size < 2:
        return Estimate(mean, None, None, found.size)
    error = float(found.std(ddof=1)) / math.sqrt(found.size)
    half = float(stats.t.ppf((1 + level) / 2, found.size - 1)) * error
    return Estimate(mean, mean - half, mean + half, found.size)


def difference(values: By, reference: By, level: float = LEVEL) -> Difference | None:
    """Values less the reference, seed by seed; None if no seed has both."""
    both = values.keys() & reference.keys()
    missing = tuple(sorted(values.keys() ^ reference.keys()))
    if not both:
        return None
    apart = {seed: values[seed] - reference[seed] for seed in both}
    return Difference(estimate(apart, level), _p_value([apart[s] for s in sorted(both)]), missing)


def _p_value(apart: Sequence[float]) -> float | None:
    """Two-sided p-value of a mean of 0."""
    if not any(apart):
        return 1.0
    if len(apart) < 2 or len(set(apart)) == 1:
        return None
    return float(stats.ttest_1samp(apart, 0.0).pvalue)


def holm(p: Mapping[str, float | None]) -> dict[str, float | None]:
    """P-values of a family, adjusted: ``max_{j <= i} min(1, (m - j + 1) p_(j))`` for the i-th
    smallest of m. A None stays None and is not counted."""
    ordered = sorted((value, name) for name, value in p.items() if value is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p)
    largest = 0.0
    for i, (value, name) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - i) * value))
        adjusted[name] = largest
    return adjusted


def rank(
    methods: Sequence[str], blocks: Sequence[Mapping[str, float]], higher_is_better: bool
) -> Ranking | None:
    """Mean ranks of methods, equal values sharing theirs; None if no block has all methods.

    Args:
        methods: all of them.
        blocks: a number of each method, such as those of one setting and seed.
        higher_is_better: whether rank 1 is the largest number.
    """
    whole = [[block[m] for m in methods] for block in blocks if set(methods) <= block.keys()]
    if not whole:
        return None
    sign = -1.0 if higher_is_better else 1.0
    values = sign * np.array(whole, dtype=np.float64)  # blocks x methods
    ranks = stats.rankdata(values, axis=1).mean(axis=0)
    n, k = values.shape
    p = None
    if k > 2 and n > 1 and any(len(set(row)) > 1 for row in whole):
        p = float(stats.friedmanchisquare(*values.T).pvalue)
    critical = critical_difference(k, n) if k > 1 and n > 1 else None
    mean_ranks = {m: float(r) for m, r in zip(methods, ranks, strict=True)}
    return Ranking(mean_ranks, critical, p, n, len(blocks) - n)


def critical_difference(methods: int, blocks: int, level: float = LEVEL) -> float:
    """Nemenyi's: ``q sqrt(k (k + 1) / 6 n)``, q the studentized range's quantile over sqrt 2."""
    q = _studentized_range(methods, level) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


@cache
def _studentized_range(methods: int, level: float) -> float:
    """Quantile of the range of so many normal variables; half a second of integration."""
    return float(stats.studentized_range.ppf(level, methods, np.inf))


# --- curves: a quality over rounds, bytes or seconds ----------------------------------------------


def at_budget(cost: Sequence[float], quality: Sequence[float], budget: float) -> float | None:
    """The quality of the last evaluation within a budget; None if there is none.

    Args:
        cost: of the evaluations in their order, not falling.
        quality: of the same evaluations.
        budget: in the unit of the cost.
    """
    within = [q for c, q in zip(cost, quality, strict=True) if c <= budget]
    return within[-1] if within else None


def area(cost: Sequence[float], quality: Sequence[float]) -> float | None:
    """The mean height of a curve by the trapezoidal rule, in the unit of the quality; None for
    fewer than two evaluations of different cost."""
    if len(cost) < 2 or cost[-1] <= cost[0]:
        return None
    return float(np.trapezoid(quality, cost) / (cost[-1] - cost[0]))


def cost_to_target(
    cost: Sequence[float], quality: Sequence[float], target: float, higher_is_better: bool
) -> float | None:
    """The cost of the first evaluation that reaches a target; None if none does."""
    for c, q in zip(cost, quality, strict=True):
        if (q >= target) if higher_is_better else (q <= target):
            return c
    return None
