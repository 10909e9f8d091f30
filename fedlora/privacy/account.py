"""Privacy accounting by the library dp-accounting (the extra ``privacy``); it enters here alone.

A run of Poisson rounds is ``T`` compositions of a Gaussian mechanism of noise multiplier ``z`` on a
sample of rate ``q``, under addition or removal of one unit: privacy loss distributions, discretized
pessimistically. Cohorts of a fixed size are accounted under replacement of one unit, by Rényi
divergences: the library has no tighter accountant for them, and it takes the multiplier as the
standard deviation over the sensitivity of that relation, ``2 C``.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from fedlora.core.checks import at_least

LIBRARY = "dp-accounting"
INTERVAL = 1e-3
"""Discretization of privacy losses, upwards: the library's own 1e-4 takes ten times as long for an
epsilon that is smaller by some 1e-5 of it."""
DIGITS = 3
"""Decimals of a calibrated multiplier, rounded up."""


@dataclass(frozen=True)
class Releases:
    """What a number of rounds has released."""

    multiplier: float
    """``z``: standard deviation of the noise in units of one unit's bound; 0: no noise."""
    rate: float
    """``q``: probability with which a unit takes part; 1: all do."""
    fixed: tuple[int, int] | None = None
    """``(N, m)``: cohorts of exactly ``m`` of ``N``, in place of ``rate``."""

    def epsilon(self, count: int, delta: float) -> float:
        """``ε`` of a number of releases at ``δ``: 0 of none, infinite without noise.

        Raises:
            ValueError: if the library is not installed.
        """
        at_least("releases", count, 0)
        if count == 0:
            return 0.0
        return _epsilon(self, count, delta, INTERVAL) if self.multiplier > 0 else math.inf


def library() -> Any | None:
    """The optional library; ``None`` if it is not (completely) installed."""
    try:
        import dp_accounting
    except ImportError:
        return None
    return dp_accounting


def required() -> Any:
    """The library.

    Raises:
        ValueError: if it is not installed.
    """
    found = library()
    if found is None:
        raise ValueError(
            f"no epsilon can be computed without {LIBRARY}: pip install 'fedlora[privacy]'"
        )
    return found


def accountant(releases: Releases) -> str:
    """The library with its version and kind of accountant, for statements."""
    return f"{LIBRARY} {version(LIBRARY)} ({'Rényi' if releases.fixed else 'PLD'})"


def calibrated(releases: Releases, count: int, epsilon: float, delta: float) -> float:
    """The least multiplier, rounded up to `DIGITS` decimals, whose ``ε`` is at most a target.

    Args:
        releases: its rate or cohorts; its multiplier is not looked at.
        count: releases, at least one.
        epsilon: target, > 0.
        delta: at which it is stated.

    Raises:
        ValueError: if the library is not installed.
    """
    step, high = 10.0**-DIGITS, 1.0
    while _at(releases, high, count, delta) > epsilon:
        high *= 2
    while high > step and _at(releases, high / 2, count, delta) <= epsilon:
        high /= 2
    low = high / 2
    while high - low > step / 2:
        middle = (low + high) / 2
        if _at(releases, middle, count, delta) <= epsilon:
            high = middle
        else:
            low = middle
    return math.ceil(high / step) * step


def gaussian_epsilon(multiplier: float, count: int, delta: float) -> float:
    """An upper bound of ``ε`` of Gaussian releases without sampling, by Rényi divergences.

    Args:
        multiplier: standard deviation over the sensitivity of the relation that is meant.
        count: adaptive releases.
        delta: at which it is stated.

    Raises:
        ValueError: if the library is not installed.
    """
    dp = required()
    found = dp.rdp.RdpAccountant()
    found.compose(dp.GaussianDpEvent(multiplier), count)
    return float(found.get_epsilon(delta))


def _at(releases: Releases, multiplier: float, count: int, delta: float) -> float:
    return Releases(multiplier, releases.rate, releases.fixed).epsilon(count, delta)


@lru_cache(maxsize=4096)
def _epsilon(releases: Releases, count: int, delta: float, interval: float) -> float:
    dp = required()
    if releases.fixed:
        total, cohort = releases.fixed
        relation = dp.NeighboringRelation.REPLACE_ONE
        found = dp.rdp.RdpAccountant(neighboring_relation=relation)
        half = dp.GaussianDpEvent(releases.multiplier / 2)  # the sensitivity of the relation: 2 C
        found.compose(dp.SampledWithoutReplacementDpEvent(total, cohort, half), count)
        return float(found.get_epsilon(delta))
    event = dp.GaussianDpEvent(releases.multiplier)
    if releases.rate < 1:
        event = dp.PoissonSampledDpEvent(releases.rate, event)
    found = dp.pld.PLDAccountant(value_discretization_interval=interval)
    found.compose(event, count)
    return float(found.get_epsilon(delta))
