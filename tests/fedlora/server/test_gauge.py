"""Factors of one product: what a client can choose, and what is left to it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.core.errors import RejectedUpdate
from fedlora.core.seeding import torch_generator
from fedlora.core.types import Client, Factors, LocalPlan, Ranks, TrainJob, Update
from fedlora.server.gauge import nearest, turned_back
from fedlora.server.schedule import Rounds
from fedlora.server.training_round import TrainingRound, validate
from fedlora.techniques.lora.payload import LowRankPayload
from simulations.bench import gauge
from tests.generators import factors, setting
from tests.planted import planted

CLIENT = Client(0, Ranks({"w": 3}), 9)


def trained(seed: int) -> tuple[Factors, Factors]:
    """A start and what training has made of it."""
    start, other = factors(9, 7, 3, seed), factors(9, 7, 3, seed + 1)
    return start, Factors(start.a + 0.1 * other.a, start.b + other.b, start.alpha)


def turned(f: Factors, seed: int) -> Factors:
    g = torch_generator(seed, "test-gauge")
    q: Tensor = torch.randn(3, 3, generator=g, dtype=torch.float64) + 4 * torch.eye(3).double()
    return Factors(torch.linalg.solve(q, f.a), f.b @ q, f.alpha)


def update(f: Factors) -> Update:
    return Update(CLIENT, LowRankPayload({"w": f}), 9)


def no_client_chooses(seed: int) -> None:
    start, end = trained(seed)
    want, got = nearest(end, start), nearest(turned(end, seed), start)
    assert float((want.delta() - end.delta()).norm()) < 1e-10 * float(end.delta().norm())
    for one, other in ((got.a, want.a), (got.b, want.b)):
        assert float((one - other).norm()) < 1e-9 * float(other.norm())


@given(st.integers(0, 10**6))
def test_the_product_stays_and_the_gauge_goes(seed: int) -> None:
    no_client_chooses(seed)


def test_a_client_that_did_not_move_stays() -> None:
    start, _ = trained(1)
    got = nearest(start, start)
    assert torch.allclose(got.a, start.a, atol=1e-12) and torch.allclose(got.b, start.b, atol=1e-12)


def test_frozen_factors_are_left_alone() -> None:
    start, end = trained(1)
    sent = update(Factors(start.a, end.b, end.alpha))
    plan = replace(LocalPlan(), train_a=False)
    assert turned_back(sent, LowRankPayload({"w": start}), plan) is sent


def test_a_foreign_row_space_is_rejected() -> None:
    start, end = trained(1)
    rows = torch.linalg.qr(start.a.T, mode="complete").Q.T  # the last four are orthogonal to A⁰
    foreign = update(Factors(rows[4:], end.b, end.alpha))
    with pytest.raises(RejectedUpdate, match="cannot be turned back towards the start"):
        turned_back(foreign, LowRankPayload({"w": start}), LocalPlan())


@pytest.mark.parametrize(
    ("rounds", "accepted"),
    [
        (Rounds(norm_bound="off"), True),
        (Rounds(norm_bound="off", max_update_norm=1e3), True),
        (Rounds(norm_bound="off", max_update_norm=1e3, max_factor_norm=50.0), False),
        (Rounds(norm_bound="off", max_factor_norm=50.0, rebalance=True), True),
    ],
)
def test_bounds_on_weights_do_not_see_the_gauge(rounds: Rounds, accepted: bool) -> None:
    start, end = trained(3)
    attack = update(Factors(end.a / 100, end.b * 100, end.alpha))
    job = TrainJob(0, 1, CLIENT, LowRankPayload({"w": start}), LocalPlan())
    current = TrainingRound(1, {0: job}, None, 0.0)  # type: ignore[arg-type]
    found = validate(current, {0: attack}, rounds, setting())
    assert bool(found.updates) == accepted
    if not accepted:
        assert "federation.max_factor_norm=50" in found.failures[0].message


def test_an_average_of_factors_is_ruined_by_one_and_restored() -> None:
    start, ends = gauge.cohort(0.0)
    honest = gauge.error(start, ends, 1.0, "as sent")
    assert gauge.error(start, ends, 10.0, "as sent") > 5 * honest
    assert gauge.error(start, ends, 10.0, "turned back") < 2 * honest


def test_planted_faults_are_caught() -> None:
    with planted(nearest, "torch.linalg.solve(turn.T, b.T).T", "b"), pytest.raises(AssertionError):
        no_client_chooses(1)
    with planted(nearest, "(turn @ a)", "a"), pytest.raises(AssertionError):
        no_client_chooses(1)
