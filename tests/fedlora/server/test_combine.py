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
from fedlora.robust.bound import Bound as RobustBound
from fedlora.robust.coordinate import Median, Trimmed
from fedlora.robust.geometric import Geometric
from fedlora.robust.krum import Krum
from fedlora.robust.rule import Rule
from fedlora.server.combine import combine, unusable
from fedlora.server.ownership import owned_elements
from fedlora.server.postprocess import Bound, Moment, Postprocessor
from strategies.base import LoRAStrategy
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.spp import SPP
from tests.generators import as_payload, dense, setting
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
    starts = {u.client.id: as_payload(method.client_start(state, u.client)) for u in updates}
    return state, updates, starts


@pytest.mark.parametrize("method", [*SUMMING, FlexLoRA(), HeteroLoRA()])
def test_without_postprocessors_the_method_aggregates(method: LoRAStrategy) -> None:
    state, updates, starts = a_round(method)
    want = method.aggregate(state, updates)
    got = combine(method, state, updates, NOW, starts=starts).state
    assert all(torch.equal(t, want[name]) for name, t in got.items())


@pytest.mark.parametrize("method", SUMMING)
@pytest.mark.parametrize("postprocessors", [[Postprocessor()], [Bound(1e9)], [Doubled()]])
def test_what_changes_no_sum_changes_no_state(
    method: LoRAStrategy, postprocessors: list[Postprocessor]
) -> None:
    state, updates, starts = a_round(method)
    want = method.aggregate(state, updates)
    got = combine(method, state, updates, NOW, starts=starts, postprocessors=postprocessors).state
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
    after = combine(method, state, updates, NOW, starts=starts, postprocessors=[Bound(0.01)]).state
    before, now = (dense(method.global_update(s)) for s in (state, after))
    moved = math.hypot(*(float((now[p] - d).norm()) for p, d in before.items()))
    assert 0 < moved <= 0.01 * (1 + 1e-9)


def test_a_method_that_needs_updates_is_refused_with_a_way_out() -> None:
    method = FlexLoRA()
    state, updates, starts = a_round(method)
    with pytest.raises(RunError, match=r"residual=drop.*choose strategy.residual=carry"):
        combine(method, state, updates, NOW, starts=starts, postprocessors=[Bound()])


# --- robust rules -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SUMMING)
def test_trimming_nothing_is_the_uniform_mean_of_owners(method: LoRAStrategy) -> None:
    """Of products and at equal ranks the rule is the method's own mean with equal weights."""
    state, updates, starts = a_round(method)
    got = combine(method, state, updates, NOW, starts=starts, rule=Trimmed(0.0))
    assert set(got.influence) == {u.client.id for u in updates}
    if not isinstance(method, FlexLoRA):
        return
    weight = [1.0] * len(updates)
    want = method.absorb(state, summand.total(added(method, state, updates), weight), len(updates))
    one, other = (dense(method.global_update(s)) for s in (got.state, want))
    assert_close(one, other, DOUBLE, "trimmed")


def test_clients_own_the_rank_indices_that_they_have() -> None:
    method = HeteroLoRA(average="change", weights="uniform", prune=False)
    state, updates, starts = a_round(method)
    for update, owned in zip(updates, owned_elements(method, state, updates, starts), strict=True):
        for path, f in update.adapter.items():
            largest = state[f"global/{path}/a0"].shape[0]
            if f.rank == largest:
                assert f"{path}/a" not in owned and f"{path}/b" not in owned
                continue
            assert bool(owned[f"{path}/a"][: f.rank].all() & ~owned[f"{path}/a"][f.rank :].any())
            assert bool(
                owned[f"{path}/b"][:, : f.rank].all() & ~owned[f"{path}/b"][:, f.rank :].any()
            )


@pytest.mark.parametrize("method", [FedIT(), FlexLoRA(residual="carry")])
def test_products_and_common_ranks_are_owned_as_a_whole(method: LoRAStrategy) -> None:
    state, updates, starts = a_round(method)
    assert not any(owned_elements(method, state, updates, starts))


@pytest.mark.parametrize("method", SUMMING)
@pytest.mark.parametrize("rule", [RobustBound(), Median(), Krum(0.1), Geometric()])
def test_rules_give_states_that_go_on(method: LoRAStrategy, rule: Rule) -> None:
    state, updates, starts = a_round(method)
    got = combine(method, state, updates, NOW, starts=starts, rule=rule)
    assert not unusable(method, got.state)
    assert got.state.keys() == state.keys()
    assert math.isclose(sum(got.influence.values()), 1)


def test_a_cohort_too_small_for_its_rule_ends_the_run() -> None:
    state, updates, starts = a_round(FedIT())
    with pytest.raises(RunError, match=r"round 2: robust=Krum needs at least 9"):
        combine(FedIT(), state, updates, NOW, starts=starts, rule=Krum(0.4))
