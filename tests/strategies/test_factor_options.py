"""What mends an average of factors, as options of FedAvg and FedIT: turns, owners, ridge."""

import dataclasses

import pytest
import torch

from fedlora.algebra.linalg import exactness_gap
from fedlora.core.types import Factors, Update
from strategies.fedit import FedIT
from tests.generators import dense, setting
from tests.strategies.laws import after_rounds, close, cohort

EQUAL = setting(("T4", "T4", "T4", "T4"))
TURNED, PLAIN = FedIT(align="rotate"), FedIT()


def gap(rule: FedIT, state, updates) -> float:
    found = rule.global_update(rule.aggregate(state, updates))
    return exactness_gap(updates, rule.reference_weights(updates), found)["relative"]


def copies(rule: FedIT, state) -> list[Update]:
    """Every client sends its start in a basis of its own: as products, nobody has moved."""
    updates = []
    for c in EQUAL.clients:
        found = {}
        for path, f in rule.client_start(state, c).items():
            g = torch.Generator().manual_seed(c.id)
            q, _ = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=g, dtype=torch.float64))
            found[path] = Factors(q.T @ f.a, f.b @ q, f.alpha)
        updates.append(Update(c, found, c.num_examples))
    return updates


@pytest.mark.parametrize("rounds", [1, 2])
def test_clients_that_only_changed_their_basis_leave_the_model(rounds: int) -> None:
    """After rounds that turn A, and after those that turn B; FedIT loses most of the model."""
    state, _ = after_rounds(TURNED, EQUAL, 1, rounds)
    updates = copies(TURNED, state)
    before = dense(TURNED.global_update(state))
    for path, d in dense(TURNED.global_update(TURNED.aggregate(state, updates))).items():
        close(d, before[path])
    assert gap(TURNED, state, updates) < 1e-7
    assert gap(PLAIN, {k: t for k, t in state.items() if k != "round"}, updates) > 0.3


def test_a_strength_of_zero_is_fedit() -> None:
    rule = FedIT(align="rotate", align_strength=0.0)
    one, other = rule.init_state(EQUAL), PLAIN.init_state(EQUAL)
    for t in range(3):
        updates = cohort(PLAIN, other, EQUAL, t)
        one, other = rule.aggregate(one, updates), PLAIN.aggregate(other, updates)
    for path, f in PLAIN.global_update(other).items():
        close(rule.global_update(one)[path].a, f.a)
        close(rule.global_update(one)[path].b, f.b)


@pytest.mark.parametrize(("rounds", "still"), [(1, "a"), (2, "b")])
def test_odd_rounds_turn_by_a_and_even_ones_by_b(rounds: int, still: str) -> None:
    """A factor that nobody moved asks for no turn: the round is FedIT's."""
    state, updates = after_rounds(TURNED, EQUAL, 1, rounds)
    start = TURNED.client_start(state, EQUAL.clients[0])
    other = {"a": "b", "b": "a"}[still]
    for side, same in ((still, True), (other, False)):
        sent = [
            dataclasses.replace(
                u,
                payload={
                    p: dataclasses.replace(f, **{side: getattr(start[p], side)})
                    for p, f in u.adapter.items()
                },
            )
            for u in updates
        ]
        one, two = (rule.aggregate(state, sent) for rule in (TURNED, PLAIN))
        equal = all(
            torch.equal(one[f"global/{p}/{side}"], two[f"global/{p}/{side}"]) for p in start
        )
        assert equal == same


def test_before_anything_is_learnt_nothing_is_turned() -> None:
    """B = 0 says nothing about a basis."""
    updates = cohort(PLAIN, PLAIN.init_state(EQUAL), EQUAL, 1)
    one, two = (rule.aggregate(rule.init_state(EQUAL), updates) for rule in (TURNED, PLAIN))
    for path, f in PLAIN.global_update(two).items():
        close(TURNED.global_update(one)[path].delta(), f.delta())


def test_a_ridge_narrows_the_gap() -> None:
    state, updates = after_rounds(PLAIN, EQUAL, 1)
    gaps = [gap(PLAIN, state, updates)]
    gaps += [gap(FedIT(correct="ridge", ridge=x), state, updates) for x in (10.0, 0.1, 0.0)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.9 * gaps[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": "turn"}, r"strategy\.align='turn'"),
        ({"align_strength": 1.5}, r"strategy\.align_strength=1\.5 must lie in \[0, 1\]"),
        ({"correct": "fair"}, r"strategy\.correct='fair'"),
        ({"ridge": -1.0}, r"strategy\.ridge=-1\.0 must be >= 0"),
        ({"correct": "ridge", "heterogeneous": "covered"}, "or strategy.correct=none"),
    ],
)
def test_what_means_nothing_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedIT(**options)
