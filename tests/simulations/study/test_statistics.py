"""Invariants of the statistics, judged against scipy, statsmodels and definitions."""

import math
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from simulations.study.statistics import (
    area,
    at_budget,
    cost_to_target,
    critical_difference,
    difference,
    estimate,
    holm,
    rank,
)

NUMBERS = st.floats(-100, 100).map(lambda x: round(x, 3))
SEEDED = st.dictionaries(st.integers(0, 50), NUMBERS, min_size=2, max_size=8)
P = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.floats(0, 1), max_size=8)


@given(SEEDED)
def test_the_interval_is_scipys(values):
    found = np.array(list(values.values()))
    assume(found.std() > 1e-6)
    got = estimate(values)
    low, high = stats.t.interval(0.95, len(found) - 1, found.mean(), stats.sem(found))
    assert (got.mean, got.low, got.high) == pytest.approx((found.mean(), low, high))
    assert got.seeds == len(values)


def test_one_seed_has_no_interval_and_none_no_mean():
    assert (estimate({4: 2.5}).mean, estimate({4: 2.5}).low, estimate({4: 2.5}).high) == (
        2.5, None, None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs a value"):
        estimate({})


@pytest.mark.parametrize("seeds", [3, 10])
def test_intervals_cover_what_they_claim(seeds):
    rng = np.random.default_rng(0)
    draws = rng.normal(1.5, 2.0, (4000, seeds))
    inside = [
        e.low <= 1.5 <= e.high for e in (estimate(dict(enumerate(map(float, d)))) for d in draws)
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 4000))


@given(SEEDED, st.data())
def test_the_paired_test_is_scipys(values, data):
    reference = {seed: data.draw(NUMBERS) for seed in values}
    apart = np.array([values[s] - reference[s] for s in values])
    assume(apart.std() > 1e-6)
    got = difference(values, reference)
    told = stats.ttest_rel(list(values.values()), list(reference.values()))
    assert got.p == pytest.approx(told.pvalue, abs=1e-12)
    assert (got.estimate.low, got.estimate.high) == pytest.approx(
        tuple(told.confidence_interval(0.95)), rel=1e-6, abs=1e-6
    )


def test_pairing_gains_nothing_where_there_is_no_correlation():
    """With exactly uncorrelated seeds the variances add: paired and unpaired errors are equal."""
    x, y = np.array([1.0, -1.0, 1.0, -1.0]), np.array([2.0, 2.0, -2.0, -2.0])
    assert np.corrcoef(x, y)[0, 1] == 0
    got = difference(dict(enumerate(x + 3)), dict(enumerate(y)))
    error = (got.estimate.high - got.estimate.mean) / stats.t.ppf(0.975, 3)
    assert error == pytest.approx(math.sqrt(x.var(ddof=1) / 4 + y.var(ddof=1) / 4))
    same = difference(dict(enumerate(x + 3)), dict(enumerate(x)))
    assert (same.estimate.low, same.estimate.high, same.p) == (3.0, 3.0, None)


@given(SEEDED, SEEDED, st.randoms())
def test_the_order_of_seeds_changes_nothing_and_missing_ones_are_named(values, reference, random):
    shuffled = list(values.items())
    random.shuffle(shuffled)
    got = difference(values, reference)
    assert difference(dict(shuffled), reference) == got
    assert estimate(dict(shuffled)) == estimate(values)
    if got is None:
        assert not set(values) & set(reference)
    else:
        assert got.estimate.seeds == len(set(values) & set(reference))
        assert set(got.missing) == set(values) ^ set(reference)
        turned = difference(reference, values)
        assert turned.estimate.mean == pytest.approx(-got.estimate.mean)
        assert turned.p == (None if got.p is None else pytest.approx(got.p))


def test_no_difference_has_p_1():
    assert difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert difference({0: 1.0}, {0: 0.5}).p is None


@given(P)
def test_holm_is_the_closed_bonferroni_test_monotone_and_never_smaller(p):
    """The adjusted p-value is the largest that Bonferroni's rule gives a set of hypotheses which
    has this one (Marcus, Peritz and Gabriel 1976)."""
    got = holm(p)
    assert list(got) == list(p)
    sets = list(chain(*(combinations(p, size) for size in range(1, len(p) + 1))))
    bonferroni = {some: min(1.0, len(some) * min(p[name] for name in some)) for some in sets}
    for name, value in got.items():
        assert value == pytest.approx(max(b for some, b in bonferroni.items() if name in some))
    ordered = [got[name] for name in sorted(p, key=p.__getitem__)]
    assert ordered == sorted(ordered)
    assert all(p[name] <= got[name] <= 1 for name in p)
    assert holm(dict(reversed(p.items()))) == got
    assert holm(p | {"none": None}) == got | {"none": None}


@pytest.mark.slow
def test_holm_is_that_of_statsmodels():
    from statsmodels.stats.multitest import multipletests  # half a minute of import

    p = np.random.default_rng(0).uniform(0, 0.1, 12)
    judged = multipletests(p, method="holm")[1]
    assert list(holm({str(i): float(x) for i, x in enumerate(p)}).values()) == pytest.approx(judged)


BLOCKS = st.integers(2, 4).flatmap(
    lambda k: st.lists(st.lists(NUMBERS, min_size=k, max_size=k), min_size=1, max_size=6)
)


@given(BLOCKS, st.booleans())
def test_ranks_sum_up_turn_with_the_direction_and_ignore_scale(values, higher):
    k = len(values[0])
    names = [f"m{i}" for i in range(k)]
    blocks = [dict(zip(names, row, strict=True)) for row in values]
    got = rank(names, blocks, higher)
    assert sum(got.ranks.values()) == pytest.approx(k * (k + 1) / 2)
    turned = rank(names, blocks, not higher)
    assert turned.ranks == pytest.approx({n: k + 1 - r for n, r in got.ranks.items()})
    scaled = [{n: 8 * v for n, v in block.items()} for block in blocks]
    assert rank(names, scaled, higher) == got
    gap = rank(names, [*blocks, {names[0]: 1.0}], higher)
    assert (gap.ranks, gap.left_out, gap.blocks) == (got.ranks, 1, len(blocks))
    if k > 2 and len(values) > 1 and any(len(set(row)) > 1 for row in values):
        assert got.p == pytest.approx(stats.friedmanchisquare(*zip(*values, strict=True)).pvalue)


def test_critical_differences_are_those_of_demsar():
    """Demsar (2006), table 5(a): q for 2, 5 and 10 classifiers at 0.05; his example has CD 1.25."""
    for methods, q in ((2, 1.960), (5, 2.728), (10, 3.164)):
        scale = math.sqrt(methods * (methods + 1) / 6)
        assert critical_difference(methods, 1) / scale == pytest.approx(q, abs=1.5e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert rank(["a", "b"], [{"a": 1.0}], True) is None
    assert rank(["a", "b"], [{"a": 1.0, "b": 2.0}], True).critical is None


CURVE = st.lists(st.tuples(st.floats(0.1, 5), NUMBERS), min_size=1, max_size=8).map(
    lambda steps: (list(np.cumsum([c for c, _ in steps])), [q for _, q in steps])
)


@given(CURVE, st.floats(0, 40), NUMBERS, st.booleans())
def test_budgets_areas_and_targets(curve, budget, target, higher):
    cost, quality = curve
    got = at_budget(cost, quality, budget)
    assert (got is None) == (budget < cost[0])
    assert at_budget(cost, quality, cost[-1]) == quality[-1]
    spent = cost_to_target(cost, quality, target, higher)
    reaches = [(q >= target) if higher else (q <= target) for q in quality]
    assert (spent is None) == (not any(reaches))
    if spent is not None:
        assert reaches[cost.index(spent)] and not any(reaches[: cost.index(spent)])
    mean = area(cost, quality)
    if len(cost) == 1:
        assert mean is None
    else:
        assert min(quality) - 1e-9 <= mean <= max(quality) + 1e-9
        assert area([3 * c for c in cost], quality) == pytest.approx(mean)
        assert area(cost, [2.0] * len(cost)) == pytest.approx(2.0)
