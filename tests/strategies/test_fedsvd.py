"""FedSVD, FlexLoRA whose clients train B alone: what its SVD changes and what it does not."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fedlora.algebra.init import orthonormal
from fedlora.algebra.server_optimizer import FedAvgM
from fedlora.core.types import LocalPlan
from fedlora.server.method import Setup
from strategies.flexlora import FlexLoRA, on_rows
from tests.generators import dense, factors, setting
from tests.strategies.laws import after_rounds, close

EQUAL = setting(("T4", "T4", "T4"))
RULE = FlexLoRA(train="b")


def first_rows(rule: FlexLoRA, rounds: int) -> dict[str, Tensor]:
    """``A`` of the clients' starts after some rounds."""
    state, _ = after_rounds(rule, EQUAL, 1, rounds)
    return {p: f.a for p, f in rule.client_start(state, EQUAL.clients[0]).items()}


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_is_orthonormal_and_its_rows_span_what_they_did(rounds: int) -> None:
    """FSVD-2, FSVD-3: B has full column rank here."""
    before = first_rows(RULE, 0)
    for path, a in first_rows(RULE, rounds).items():
        close(a @ a.T, torch.eye(len(a), dtype=a.dtype), 1e-10)
        basis = orthonormal(before[path].double())
        close(a @ basis.T @ basis, a.double(), 1e-9)


def test_a_new_pair_has_the_product_of_the_old_one() -> None:
    """FSVD-1: the start of a round is the model that the round before ended with."""
    for rounds in (1, 2):
        state, _ = after_rounds(RULE, EQUAL, 1, rounds)
        start = RULE.client_start(state, EQUAL.clients[0])
        for path, d in dense(RULE.global_update(state)).items():
            close(start[path].delta(), d, 1e-11)


def test_between_two_svds_a_stays() -> None:
    rule = dataclasses.replace(RULE, period=3)
    rows = [first_rows(rule, t) for t in range(7)]
    for path in rows[0]:
        for t in range(1, 7):
            same = torch.equal(rows[t][path].double(), rows[t - 1][path].double())
            assert same == (t % 3 != 0), f"round {t}"


def test_a_product_is_held_on_given_rows() -> None:
    """Whatever the rows are, orthonormal or not; rows without a part in it get zero columns."""
    rows = factors(9, 7, 4, seed=1).a
    b = factors(9, 7, 3, seed=2).b
    turn = torch.eye(3, 4, dtype=torch.float64) + 0.3 * torch.ones(3, 4, dtype=torch.float64)
    turn[:, 3] = 0
    found = on_rows(b, turn @ rows, rows)
    close(found.dense(), b @ turn @ rows)
    assert torch.equal(found.v, rows)
    assert float(found.s[3]) < 1e-12
    close(found.u[:, :3].norm(dim=0), torch.ones(3, dtype=torch.float64))


def test_what_cannot_be_held_is_refused() -> None:
    with pytest.raises(ValueError, match=r"svd_split=a: .*choose strategy.svd_split=b"):
        FlexLoRA(train="b", svd_split="a")
    for options in ({"train": "both"}, {"train": "b", "server_optimizer": FedAvgM()}):
        with pytest.raises(ValueError, match=r"period=2 keeps the A .*choose strategy.period=1"):
            FlexLoRA(period=2, **options)
    with pytest.raises(ValueError, match=r"strategy\.period=0 must be >= 1"):
        FlexLoRA(period=0)
    for name in ("train_a", "train_b"):
        with pytest.raises(ValueError, match="says that clients train B; leave both true"):
            RULE.check(Setup(LocalPlan(**{name: False})))
        FlexLoRA().check(Setup(LocalPlan(**{name: False})))
