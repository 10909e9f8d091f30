"""Laws of energies and ranks: sums, bounds, and independence of how an update is factored."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.algebra.linalg import spectra
from fedlora.algebra.spectrum import (
    REST,
    dense_spectra,
    effective_rank,
    energy_by_index,
    geometric,
    index_ranges,
    mean_ranks,
    range_label,
    stable_rank,
    tail,
)
from fedlora.core.types import Factors, Ranks
from tests.generators import factors, seeds, shapes, stacks
from tests.planted import planted

ranks = st.lists(st.integers(1, 300), min_size=1, max_size=5)
values = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)


def invertible(r: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.eye(r, dtype=torch.float64) + 0.3 * torch.randn(
        r, r, generator=g, dtype=torch.float64
    )


def regauged(f: Factors, seed: int) -> Factors:
    g = invertible(f.rank, seed)
    return Factors(g @ f.a, f.b @ torch.linalg.inv(g), f.alpha)


@given(ranks)
def test_ranges_are_adjacent_and_end_at_every_rank(held: list[int]) -> None:
    ranges = index_ranges(held)
    assert ranges[0][0] == 1
    assert ranges[-1][1] == max(held)
    assert [first for first, _ in ranges[1:]] == [last + 1 for _, last in ranges[:-1]]
    assert set(held) <= {last for _, last in ranges}
    assert len(ranges) <= 2 * (max(held).bit_length() + 1) + len(set(held))


@given(stacks(), ranks)
def test_energies_sum_to_the_squared_norm(given_, held: list[int]) -> None:
    adapter = {str(i): f for i, f in enumerate(given_[0])}
    squared = sum(float(f.delta().square().sum()) for f in adapter.values())
    s = spectra(adapter)
    assert sum(float(x.square().sum()) for x in s.values()) == pytest.approx(squared)
    shares = energy_by_index(s, index_ranges(held))
    assert math.fsum(shares.values()) == pytest.approx(1)
    top = min(held)
    leading = sum(float(x[:top].square().sum()) for x in s.values())
    upto = {range_label(*r) for r in index_ranges(held) if r[1] <= top}
    assert math.fsum(shares[k] for k in upto) * squared == pytest.approx(leading)
    assert shares[REST] <= 1 - math.fsum(shares[k] for k in upto) + 1e-12


@given(shapes, seeds)
def test_numbers_do_not_depend_on_the_gauge(shape: tuple[int, int], seed: int) -> None:
    f = factors(*shape, min(shape), seed)
    one, other = spectra({"w": f}), spectra({"w": regauged(f, seed)})
    ranges = index_ranges([f.rank])
    assert energy_by_index(one, ranges) == pytest.approx(energy_by_index(other, ranges), abs=1e-9)
    assert mean_ranks(one) == pytest.approx(mean_ranks(other), rel=1e-6)
    for r in range(1, f.rank + 1):
        half = Ranks({"w": r})
        assert tail(one, half) == pytest.approx(tail(other, half), abs=1e-7)


@given(shapes, seeds)
def test_factors_and_dense_updates_have_the_same_numbers(shape: tuple[int, int], seed: int) -> None:
    f = factors(*shape, min(shape), seed)
    low, full = spectra({"w": f}), dense_spectra({"w": f.delta()})
    assert mean_ranks(low) == pytest.approx(mean_ranks(full), rel=1e-6)
    ranges = index_ranges([f.rank])
    assert energy_by_index(low, ranges) == pytest.approx(energy_by_index(full, ranges), abs=1e-9)


@given(values)
def test_ranks_lie_between_one_and_the_rank(s: list[float]) -> None:
    x = torch.tensor(sorted(s, reverse=True), dtype=torch.float64)
    for rank in (effective_rank(x), stable_rank(x)):
        assert 1 - 1e-9 <= rank <= len(s) + 1e-9
    assert effective_rank(3 * x) == pytest.approx(effective_rank(x))
    assert stable_rank(3 * x) == pytest.approx(stable_rank(x))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_equal_values_have_full_rank_and_a_single_one_has_rank_one(n: int) -> None:
    same = torch.full((n,), 0.3, dtype=torch.float64)
    alone = torch.tensor([0.3] + [0.0] * (n - 1), dtype=torch.float64)
    for rank in (effective_rank, stable_rank):
        assert rank(same) == pytest.approx(n)
        assert rank(alone) == pytest.approx(1)


@given(shapes, seeds)
def test_the_tail_is_what_the_best_approximation_loses(shape: tuple[int, int], seed: int) -> None:
    f = factors(*shape, min(shape), seed)
    w = f.delta()
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    found = [tail(spectra({"w": f}), Ranks({"w": r})) for r in range(1, f.rank + 1)]
    for r, share in enumerate(found, start=1):
        gap = w - (u[:, :r] * s[:r]) @ v[:r]
        assert share == pytest.approx(float(gap.norm() / w.norm()), abs=1e-7)
    assert found[-1] == 0
    assert found == sorted(found, reverse=True)


def test_nothing_moved_has_no_energy() -> None:
    nothing = dense_spectra({"w": torch.zeros(4, 3)})
    assert energy_by_index(nothing, index_ranges([2])) == {}
    assert mean_ranks(nothing) == {}
    assert tail(nothing, Ranks({"w": 1})) == 0


def energies_alone() -> None:
    test_energies_sum_to_the_squared_norm.hypothesis.inner_test(  # type: ignore[attr-defined]
        ([factors(7, 5, r, r) for r in (4, 3, 5)], []), [2, 4]
    )


def tail_alone() -> None:
    test_the_tail_is_what_the_best_approximation_loses.hypothesis.inner_test(  # type: ignore[attr-defined]
        (7, 5), 3
    )


def equal_alone() -> None:
    test_equal_values_have_full_rank_and_a_single_one_has_rank_one(7)


def gauge_alone() -> None:
    """Of numbers that are taken from the factors themselves."""
    one = factors(7, 5, 4, 1)
    s, other = (spectra({"w": f}) for f in (one, regauged(one, 2)))
    assert mean_ranks(s) == pytest.approx(mean_ranks(other), rel=1e-6)


FAULTS = {
    "a range begins late": (
        energy_by_index,
        "x[first - 1 : last]",
        "x[first:last]",
        energies_alone,
    ),
    "values for squares": (energy_by_index, "s.double().square()", "s.double()", energies_alone),
    "the rest forgotten": (
        energy_by_index,
        "ranges[-1][1] :",
        "ranges[-1][1] + 1 :",
        energies_alone,
    ),
    "one index too many": (tail, "x[ranks[path] :]", "x[ranks[path] - 1 :]", tail_alone),
    "squared loss": (tail, "math.sqrt(lost / total)", "lost / total", tail_alone),
    "no exponential": (effective_rank, ".sum().exp()", ".sum()", equal_alone),
    "spectral norm for its square": (stable_rank, "/ top", "/ top**0.5", equal_alone),
    "a side of the product alone": (spectra, "*stack([f], [1.0])", "f.b, f.b.T", gauge_alone),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str) -> None:
    function, right, wrong, law = FAULTS[name]
    law()
    with planted(function, right, wrong), pytest.raises(AssertionError):
        law()


@given(st.floats(0.05, 0.95), st.floats(0.1, 10.0), st.integers(1, 30))
def test_constant_coverage_gives_the_sums_of_geometric_series(pi, first, rounds) -> None:
    cover = [torch.tensor([1.0, pi], dtype=torch.float64)] * rounds
    start = torch.tensor([first, first], dtype=torch.float64)
    decay = geometric(start, cover, refilled=False)[-1]
    assert decay.tolist() == pytest.approx([first, first * pi ** (rounds - 1)])
    filled = geometric(start, cover, refilled=True)[-1]
    series = first * (1 - pi**rounds) / (1 - pi)
    assert filled.tolist() == pytest.approx([first * rounds, series])
    assert series < first / (1 - pi) or pi**rounds < 1e-15


def test_an_index_that_no_client_of_round_one_covers_has_no_prediction() -> None:
    cover = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5])]
    start = torch.tensor([2.0, 0.0])
    assert geometric(start, cover, refilled=False).tolist() == [[2, 0], [2, 0]]
    assert geometric(start, cover, refilled=True)[1].isnan().tolist() == [False, True]
