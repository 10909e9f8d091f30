"""The common initialisation: shared, nested, bounded, a function of the seed and the module."""

import math

import pytest
import torch

from fedlora.algebra.init import initial_a, initial_factors
from fedlora.core.types import Module
from tests.generators import ALPHA, MODULES, setting

WIDE = Module("w", "mlp", d_out=200, d_in=300)


def test_smaller_ranks_are_prefixes() -> None:
    whole = initial_a(7, WIDE, 200)
    for r in (1, 2, 3, 8, 15, 17, 64, 199):
        assert torch.equal(initial_a(7, WIDE, r), whole[:r])


def test_the_distribution_depends_on_the_fan_in_alone() -> None:
    a = initial_a(7, WIDE, 200)
    bound = 1 / math.sqrt(300)
    assert a.dtype == torch.float32
    assert float(a.abs().max()) <= bound
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert abs(float(a.mean())) < 0.01 * bound


def test_seeds_and_modules_differ() -> None:
    a = initial_a(7, WIDE, 4)
    assert not torch.equal(a, initial_a(8, WIDE, 4))
    assert not torch.equal(a, initial_a(7, Module("v", "mlp", 200, 300), 4))


def test_impossible_ranks_are_refused() -> None:
    for r in (0, 201):
        with pytest.raises(ValueError, match=f"rank {r} of w is not in 1..200"):
            initial_a(7, WIDE, r)


def test_b_is_zero() -> None:
    population = setting()
    found = initial_factors(population, population.max_ranks)
    assert list(found) == [m.path for m in MODULES]
    for m in MODULES:
        f = found[m.path]
        assert f.rank == population.max_ranks[m.path]
        assert f.alpha == ALPHA
        assert not bool(f.delta().any())
