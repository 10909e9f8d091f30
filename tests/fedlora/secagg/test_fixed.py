"""Fixed-point sums: exact, unbiased, within their bound, refused where they would wrap around."""

import math

import numpy as np
import pytest

from fedlora.secagg.config import SecAgg
from fedlora.secagg.fixed import FixedPoint, uniform
from tests.planted import planted

SMALL = FixedPoint(bits=16, levels=6, range=0.5)
"""Coarse, so that an error of one step is seen."""


def summed(fixed: FixedPoint, xs: list[np.ndarray], seed: int = 0) -> np.ndarray:
    """The decoded sum of vectors."""
    total = np.zeros(xs[0].size, fixed.dtype)
    for k, x in enumerate(xs):
        total = total + fixed.encode(x, uniform(seed, 1, k, 0, x.size))[0]
    return fixed.decode(total, len(xs))


def test_rounding_is_unbiased():
    """The mean over 1,000 roundings is within 4.5 standard errors of the sum, everywhere."""
    x = [np.linspace(-0.5, 0.5, 101), np.full(101, 0.123)]
    trials = np.stack([summed(SMALL, x, seed) for seed in range(1000)])
    step = 2 * SMALL.range / (2**SMALL.levels - 1)
    error = np.abs(trials.mean(axis=0) - (x[0] + x[1]))
    assert float(error.max()) <= 4.5 * step * math.sqrt(2 / 4) / math.sqrt(1000)


@pytest.mark.parametrize("clients", [1, 5, 20])
def test_the_error_of_a_mean_has_the_size_of_the_formula(clients):
    fixed = FixedPoint(32, 22, 1.0)
    g = np.random.default_rng(clients)
    xs = [g.uniform(-1, 1, 2000) for _ in range(clients)]
    error = (summed(fixed, xs) - sum(xs)) / clients
    bound = 2 * fixed.range / (2**22 - 1) * math.sqrt(clients / 6) * 4.5 / clients
    assert float(np.abs(error).max()) <= bound
    assert float(np.sqrt((error**2).mean())) >= bound / 4.5 / 2, "the error is too small to be true"


def test_what_is_beyond_the_range_is_cut_and_counted():
    codes, cut = SMALL.encode(np.array([0.6, -0.7, 0.5, 0.0]), np.full(4, 0.999))
    assert cut == 2
    assert SMALL.decode(codes[:2], 1).tolist() == [0.5, -0.5]
    assert int(codes.max()) == 2**SMALL.levels - 1


def test_no_number_that_is_not_finite_is_summed():
    with pytest.raises(FloatingPointError, match="1 of 2 numbers"):
        SMALL.encode(np.array([0.0, math.nan]), np.zeros(2))


@pytest.mark.parametrize(("bits", "levels", "most"), [(32, 22, 1024), (16, 8, 257), (16, 15, 2)])
def test_the_largest_cohort_passes_and_one_more_is_refused(bits, levels, most):
    config = SecAgg(kind="simulated", bits=bits, levels=levels)
    assert config.capacity == most
    config.check_cohort(most)
    fixed = FixedPoint(bits, levels, 1.0)
    top = np.full(1, (most * (2**levels - 1)) % 2**bits, fixed.dtype)
    assert fixed.decode(top, most)[0] == pytest.approx(most), "the largest sum wraps around"
    with pytest.raises(ValueError, match=f"more than {most:,} clients wrap around"):
        config.check_cohort(most + 1)


def test_a_sum_of_one_is_refused():
    with pytest.raises(ValueError, match="a round has 1 client"):
        SecAgg(kind="real").check_cohort(1)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("kind", "on", "'on' is not one of"),
        ("bits", 64, "64 is not one of"),
        ("levels", 32, "must lie in 1..31"),
        ("range", 0.0, "must be > 0"),
        ("threshold", 0.4, r"must lie in \[0.5, 1\)"),
        ("degree", 3, "must be even"),
        ("sketch", "three", "'three' is not one of"),
        ("width", 0.5, "must be >= 1"),
        ("losses", {"mask": 0.1}, "'mask' is not one of"),
        ("losses", {"keys": 1.1}, "losses.keys=1.1"),
    ],
)
def test_a_mistake_is_named(key, value, says):
    with pytest.raises(ValueError, match=says):
        SecAgg(**{key: value})


@pytest.mark.parametrize("degree", [0, 4, 20])
@pytest.mark.parametrize("threshold", [0.5, 0.67, 0.9])
def test_no_two_groups_of_holders_recover_a_secret_each(degree, threshold):
    config = SecAgg(degree=degree, threshold=threshold)
    for clients in range(2, 30):
        holders, needed = config.degree_of(clients) + 1, config.shares_needed(clients)
        assert 2 * needed > holders
        assert 2 <= needed <= holders


FAULTS = {
    "rounding biased": (
        FixedPoint.encode,
        "np.floor(steps + uniform)",
        "np.floor(steps)",
        test_rounding_is_unbiased,
    ),
    "rounding twice": (
        FixedPoint.encode,
        "np.floor(steps + uniform)",
        "np.rint(steps + uniform)",
        test_rounding_is_unbiased,
    ),
    "one offset for all": (
        FixedPoint.decode,
        "summands * self.range",
        "self.range",
        test_rounding_is_unbiased,
    ),
    "capacity exceeded silently": (
        SecAgg.check_most,
        "clients > self.capacity",
        "clients > 2 * self.capacity",
        lambda: test_the_largest_cohort_passes_and_one_more_is_refused(16, 8, 257),
    ),
    "a majority for two": (
        SecAgg.shares_needed,
        "math.floor(holders * self.threshold) + 1",
        "math.floor(holders * self.threshold)",
        lambda: test_no_two_groups_of_holders_recover_a_secret_each(0, 0.5),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name):
    function, right, wrong, law = FAULTS[name]
    noticed = (AssertionError, pytest.fail.Exception)
    with planted(function, right, wrong), pytest.raises(noticed):
        law()
