"""Between accepted and averaged: with postprocessors off nothing changes, on they see summands."""

import dataclasses
import math

import pytest
import torch

from fedlora.algebra import summand
from fedlora.algebra.state import State
from fedlora.algebra.summand import Summands
from fedlora.core.errors import RunError
from fedlora.core.payload import Payload
from fedlora.core.types import Client, Update
from fedlora.server.combine import combine
from fedlora.server.postprocess import Bound, Moment, Postprocessor
from strategies.base import LoRAStrategy
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.spp import SPP
from tests.generators import dense, setting
from tests.strategies.laws import DOUBLE, added, after_rounds, assert_close

NOW = Moment(seed=3, round=2)
SUMMING = [
    FedIT(),
    FlexLoRA(residual="carry"),
    HeteroLoRA(average="change", weights="uniform", prune=False),
    SPP(),
]


@dataclasses.dataclass(frozen=True)
class Doubled(Postprocessor):
    """Twice every change, and half the sum."""

    def each(self, summands: Summands, client: Client, now: Moment) -> Summands:
        assert now == NOW
        return summand.scaled(summands, 2.0)

    def whole(self, total: Summands, weight: float, now: Moment) -> Summands:
        return summand.scaled(total, 0.5)


def a_round(method: LoRAStrategy) -> tuple[State, list[Update], dict[int, Payload]]:
    state, updates = after_rounds(method, setting(), 1)
    return state, updates, {u.client.id: method.client_start(state, u.client) for u in updates}


@pytest.mark.parametrize("method", [*SUMMING, FlexLoRA(), HeteroLoRA()])
def test_without_postprocessors_the_method_aggregates(method: LoRAStrategy) -> None:
    state, updates, starts = a_round(method)
    want = method.aggregate(state, updates)
    got = combine(method, state, updates, NOW, starts=starts)
    assert all(torch.equal(t, want[name]) for name, t in got.items())


@pytest.mark.parametrize("method", SUMMING)
@pytest.mark.parametrize("postprocessors", [[Postprocessor()], [Bound(1e9)], [Doubled()]])
def test_what_changes_no_sum_changes_no_state(
    method: LoRAStrategy, postprocessors: list[Postprocessor]
) -> None:
    state, updates, starts = a_round(method)
    want = method.aggregate(state, updates)
    got = combine(method, state, updates, NOW, starts=starts, postprocessors=postprocessors)
    one, other = (dense(method.global_update(s)) for s in (got, want))
    assert_close(one, other, DOUBLE, "postprocessed")


@pytest.mark.parametrize("method", SUMMING)
def test_bound_shortens_long_changes_alone(method: LoRAStrategy) -> None:
    state, updates, _ = a_round(method)
    terms = added(method, state, updates)
    norms = sorted(summand.norm(x) for x in terms)
    bound = Bound((norms[0] + norms[-1]) / 2)
    for u, x in zip(updates, terms, strict=True):
        got, n = bound.each(x, u.client, NOW), summand.norm(x)
        assert summand.norm(got) == pytest.approx(min(n, bound.norm), rel=1e-10)
        assert (got is x) == (n <= bound.norm)


def test_bound_bounds_what_one_round_moves() -> None:
    method = FlexLoRA(residual="carry", weights="uniform")
    state, updates, starts = a_round(method)
    after = combine(method, state, updates, NOW, starts=starts, postprocessors=[Bound(0.01)])
    before, now = (dense(method.global_update(s)) for s in (state, after))
    moved = math.hypot(*(float((now[p] - d).norm()) for p, d in before.items()))
    assert 0 < moved <= 0.01 * (1 + 1e-9)


def test_a_method_that_needs_updates_is_refused_with_a_way_out() -> None:
    method = FlexLoRA()
    state, updates, starts = a_round(method)
    with pytest.raises(RunError, match=r"residual=drop.*choose strategy.residual=carry"):
        combine(method, state, updates, NOW, starts=starts, postprocessors=[Bound()])
