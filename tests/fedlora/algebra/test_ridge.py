"""The ridge correction of an averaged B: what it reaches, and what it cannot."""

import itertools

import pytest
import torch

from fedlora.algebra import ridge
from fedlora.algebra.linalg import average
from fedlora.algebra.ridge import corrected
from fedlora.core.types import Factors
from tests.generators import factors, weighted_delta
from tests.strategies.laws import close

P = [0.1, 0.2, 0.3, 0.4]
HELD = [factors(9, 7, 3, seed) for seed in range(4)]
MEAN, D = average(HELD, P), weighted_delta(HELD, P)
STRENGTHS = (100.0, 10.0, 1.0, 0.1, 0.01, 0.0)


def fixed(strength: float, held=HELD, p=P) -> Factors:
    return ridge.corrected(average(held, p), held, p, strength)


def gap(f: Factors) -> float:
    return float((f.delta() - D).norm())


def the_least_gap_is_reached_without_a_penalty() -> None:
    """FAIR-1."""
    outside = torch.eye(7, dtype=torch.float64) - torch.linalg.pinv(MEAN.a) @ MEAN.a
    assert gap(fixed(0.0)) == pytest.approx(float((D @ outside).norm()), rel=1e-12)


def the_gap_falls_with_the_penalty() -> None:
    """FAIR-2: and is never wider than that of the plain average."""
    gaps = [gap(MEAN), *(gap(fixed(x)) for x in STRENGTHS)]
    assert all(x > y for x, y in itertools.pairwise(gaps)), gaps


def the_objective_is_stationary() -> None:
    """FAIR-4, with the penalty as a multiple of ``tr(A Aᵀ) / r``."""
    s = MEAN.scale
    for x in STRENGTHS:
        f = fixed(x)
        penalty = x * float((MEAN.a @ MEAN.a.T).trace()) / 3
        left = (f.b @ MEAN.a - D / s) @ MEAN.a.T + penalty * (f.b - MEAN.b)
        assert float(left.norm()) < 1e-11 * float(D.norm())


def alpha_and_units_do_not_matter() -> None:
    """``A`` times c and ``B`` over c, or another alpha: the same products."""
    for c, alpha in ((10.0, 12.0), (0.1, 3.0)):
        held = [Factors(c * f.a, f.b / c, alpha) for f in HELD]
        got = fixed(0.3, held)
        close(got.delta() * (MEAN.alpha / alpha), fixed(0.3).delta())


INVARIANTS = [
    the_least_gap_is_reached_without_a_penalty,
    the_gap_falls_with_the_penalty,
    the_objective_is_stationary,
    alpha_and_units_do_not_matter,
]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda f: f.__name__)
def test_invariants(invariant):
    invariant()


def without_the_scale(mean, held, p, strength):
    """``D`` in place of ``D / s``."""
    right = corrected(mean, held, p, strength)
    return Factors(mean.a, mean.b + mean.scale * (right.b - mean.b), mean.alpha)


def absolute_penalty(mean, held, p, strength):
    unit = float((mean.a @ mean.a.T).trace()) / mean.rank
    return corrected(mean, held, p, strength / unit)


def unweighted(mean, held, p, strength):
    return corrected(mean, held, [1 / len(p)] * len(p), strength)


def not_corrected(mean, held, p, strength):
    return mean


@pytest.mark.parametrize(
    "wrong",
    [without_the_scale, absolute_penalty, unweighted, not_corrected],
    ids=lambda f: f.__name__,
)
def test_a_planted_fault_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(ridge, "corrected", wrong)
    caught = []
    for invariant in INVARIANTS:
        try:
            invariant()
        except AssertionError:
            caught.append(invariant.__name__)
    assert caught


def test_nothing_is_corrected_where_the_average_is_exact():
    """One client, or one factor that all share; dependent rows of A do no harm."""
    lone = HELD[0]
    assert torch.equal(corrected(lone, [lone], [1.0], 0.1).b, lone.b)
    one_a = [Factors(lone.a, f.b, f.alpha) for f in HELD]
    one_b = [Factors(f.a, lone.b, f.alpha) for f in HELD]
    for held in (one_a, one_b):
        close(fixed(0.0, held).b, average(held, P).b, 1e-12)
    twice = [Factors(f.a[[0, 0, 1]], f.b, f.alpha) for f in HELD]
    assert bool(torch.isfinite(fixed(0.0, twice).b).all())
