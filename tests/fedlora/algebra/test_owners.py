"""Averages over clients of unequal rank: every index by those who have it."""

import pytest
import torch

from fedlora.algebra import factor_average
from fedlora.algebra.factor_average import covered_average, first_of
from fedlora.algebra.linalg import average
from fedlora.algebra.owners import mean_change
from fedlora.core.types import Factors
from strategies.fedit import FedIT
from tests.generators import factors, setting, single_module_setting, vector_updates
from tests.strategies.laws import close, cohort

RANKS, P, TOP = (1, 2, 2, 4), [0.1, 0.2, 0.3, 0.4], 5
OLD = factors(9, 7, TOP, 1)
SENT = [factors(9, 7, r, 10 + k) for k, r in enumerate(RANKS)]
MINE = {0: (0, 1, 2, 3), 1: (1, 2, 3), 2: (3,), 3: (3,), 4: ()}
"""Rank index -> the clients that have it."""


def result() -> Factors:
    return factor_average.covered_average(OLD, SENT, P)


def index_is_its_owners_mean() -> None:
    """RBLA, in the units of the largest rank, in which products have one scale."""
    got = result()
    for i, owners in MINE.items():
        total = sum(P[k] for k in owners)
        for name in ("a", "b") if owners else ():
            want = sum(
                P[k] / total * (TOP / RANKS[k]) ** 0.5 * row(SENT[k], name, i) for k in owners
            )
            close(row(got, name, i), want, 1e-12, f"{name}{i}")


def the_index_of_one_owner_is_that_owners() -> None:
    """RBLA-3, as a product with its scale."""
    got, (a, b) = result(), (SENT[3].a, SENT[3].b)
    for i in (2, 3):
        mine = SENT[3].scale * torch.outer(b[:, i], a[i])
        close(got.scale * torch.outer(got.b[:, i], got.a[i]), mine)


def the_index_of_no_owner_stays() -> None:
    got = result()
    assert torch.equal(got.a[4], OLD.a[4])
    assert torch.equal(got.b[:, 4], OLD.b[:, 4])


INVARIANTS = [
    index_is_its_owners_mean,
    the_index_of_one_owner_is_that_owners,
    the_index_of_no_owner_stays,
]


def row(f: Factors, name: str, i: int) -> torch.Tensor:
    return f.a[i] if name == "a" else f.b[:, i]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda f: f.__name__)
def test_invariants(invariant):
    invariant()


def stale_slice(old, sent, p):
    """After its first slice a client's B begins at its rank: higher columns are lost."""
    right, start = covered_average(old, sent, p), old.b.clone()
    start[:, :1] = right.b[:, :1]
    return Factors(right.a, start, old.alpha)


def zero_padded(old, sent, p):
    a, b = torch.zeros_like(old.a), torch.zeros_like(old.b)
    for f, w in zip(sent, p, strict=True):
        root = (old.rank / f.rank) ** 0.5
        a[: f.rank] += w * root * f.a
        b[:, : f.rank] += w * root * f.b
    return Factors(a, b, old.alpha)


def one_scale_for_all(old, sent, p):
    bare = [Factors(f.a * (f.rank / old.rank) ** 0.5, f.b, f.alpha) for f in sent]
    return covered_average(old, bare, p)


def every_owner_counts_alike(old, sent, p):
    return covered_average(old, sent, [1 / len(p)] * len(p))


@pytest.mark.parametrize(
    "wrong",
    [stale_slice, zero_padded, one_scale_for_all, every_owner_counts_alike],
    ids=lambda f: f.__name__,
)
def test_a_planted_fault_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(factor_average, "covered_average", wrong)
    caught = []
    for invariant in INVARIANTS:
        try:
            invariant()
        except AssertionError:
            caught.append(invariant.__name__)
    assert caught


def test_at_equal_ranks_owners_are_all_clients():
    """RBLA-1: both weightings, and whole rounds of the strategy with a server optimizer."""
    sent = [factors(9, 7, TOP, 20 + k) for k in range(4)]
    want = average(sent, P)
    got = covered_average(OLD, sent, P)
    close(got.a, want.a)
    close(got.b, want.b)
    changes = [f.a - OLD.a for f in sent]
    close(mean_change(changes, P, TOP, "all"), mean_change(changes, P, TOP))
    population = setting(("T4", "T4", "T4"))
    plain, covered = FedIT(), FedIT(heterogeneous="covered")
    one, other = plain.init_state(population), covered.init_state(population)
    for t in range(2):
        updates = cohort(plain, one, population, t)
        one, other = plain.aggregate(one, updates), covered.aggregate(other, updates)
    for path, f in plain.global_update(one).items():
        close(covered.global_update(other)[path].a, f.a)
        close(covered.global_update(other)[path].b, f.b)


def test_a_prefix_has_the_same_products_at_its_own_scale():
    for r in range(1, TOP + 1):
        f = first_of(OLD, r)
        assert f.rank == r
        close(f.delta(), OLD.scale * OLD.b[:, :r] @ OLD.a[:r])
    with pytest.raises(ValueError, match="rank 6 exceeds the global rank 5"):
        first_of(OLD, 6)


def test_idle_clients_leave_the_model_at_unequal_ranks():
    """Changes are averaged: nothing is multiplied by the share of its owners."""
    idle = [first_of(OLD, r) for r in RANKS]
    got = covered_average(OLD, idle, P)
    assert torch.equal(got.a, OLD.a)
    assert torch.equal(got.b, OLD.b)


def test_a_lone_client_of_a_cohort_moves_its_own_indices_alone():
    population = single_module_setting(6, 5, (1, 2, 4), alpha=4.0)
    rule = FedIT(heterogeneous="covered")
    state = {k: t.double() for k, t in rule.init_state(population).items()}
    update = vector_updates((2, 2, 2))[0]
    after = rule.aggregate(state, [update])
    got, f = rule.global_update(after)["w"], update.adapter["w"]
    close(first_of(got, 2).delta(), f.delta())
    assert torch.equal(got.a[2:], state["global/w/a"][2:])
