"""P15: pruning of ranks and its regulariser."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.techniques.lora.self_pruning import (
    SelfPrune,
    keep,
    penalty,
    prune_adapter,
    score,
    should_prune,
    shrunk_rank,
    tail_product,
)
from tests.generators import factors, vector_factors

PRUNE = SelfPrune(weight=0.5, gamma=0.7, min_rank=2)


def test_vectors() -> None:
    f = vector_factors(2, 3)
    assert float(tail_product(f.a, f.b, 2)) == pytest.approx(2.80838951504, rel=1e-11)
    assert float(tail_product(f.a, f.b, 1)) == pytest.approx(5.48899376076, rel=1e-11)


@given(st.integers(1, 400), st.floats(0, 1))
def test_the_tail_is_never_empty_above_rank_one(rank: int, gamma: float) -> None:
    k = keep(rank, gamma)
    assert 1 <= k <= max(1, rank - 1)
    assert k == 1 or k <= gamma * rank + 1e-6


def test_keep_means_the_number_it_names() -> None:
    assert [keep(r, 0.99) for r in (1, 2, 3, 8, 30, 200)] == [1, 1, 2, 7, 29, 198]
    assert keep(100, 0.29) == 29


@given(st.integers(1, 60), st.floats(0, 1), st.integers(1, 20))
def test_ranks_never_grow_and_stop_at_the_minimum(rank: int, gamma: float, low: int) -> None:
    prune = SelfPrune(weight=0.0, gamma=gamma, min_rank=low)
    r = rank
    for _ in range(70):
        smaller = shrunk_rank(r, prune)
        assert min(low, rank) <= smaller <= r
        r = smaller


def test_the_gradient_is_on_the_tail_alone() -> None:
    f = factors(6, 5, 4, seed=1)
    a, b = f.a.requires_grad_(), f.b.requires_grad_()
    penalty([(a, b)], PRUNE).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert bool((a.grad[:2] == 0).all()), "head of A"
    assert bool((b.grad[:, :2] == 0).all()), "head of B"
    assert bool((a.grad[2:] != 0).all())
    assert bool((b.grad[:, 2:] != 0).all())


def test_the_gradient_is_finite_where_every_run_starts() -> None:
    a = factors(6, 5, 4, seed=1).a.requires_grad_()
    b = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    value = penalty([(a, b)], PRUNE)
    value.backward()
    assert float(value.detach()) == 0
    for grad in (a.grad, b.grad):
        assert grad is not None
        assert bool(torch.isfinite(grad).all())


def test_rank_one_has_no_tail() -> None:
    f = factors(6, 5, 1, seed=1)
    assert score({"w": f}, PRUNE) == 0
    assert prune_adapter({"w": f}, PRUNE)["w"].rank == 1


def test_the_score_is_a_sum_over_modules() -> None:
    one, two = factors(6, 5, 4, seed=1), factors(9, 7, 3, seed=2)
    total = score({"x": one, "y": two}, PRUNE)
    assert total == pytest.approx(score({"x": one}, PRUNE) + score({"y": two}, PRUNE))


def test_only_a_smaller_tail_is_pruned() -> None:
    assert should_prune(on_arrival=2.0, after=1.9)
    assert not should_prune(on_arrival=2.0, after=2.0)
    assert not should_prune(on_arrival=0.0, after=0.0), "round 1: B = 0 arrives"


def test_pruning_leaves_the_effect_of_the_head() -> None:
    f = factors(6, 5, 4, seed=1)
    cut = prune_adapter({"w": f}, PRUNE)["w"]
    assert cut.rank == 2
    torch.testing.assert_close(cut.delta(), f.scale * f.b[:, :2] @ f.a[:2])
