"""The exactness gap of models over moved bases."""

import pytest
import torch

from fedlora.algebra.linalg import exactness_gap
from fedlora.server.round_metrics import diagnosis, moved_gap
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.switchlora.technique import SwitchTraining
from strategies.base import LoRAStrategy
from strategies.fedit import FedIT
from strategies.rebase import Rebase
from strategies.switchlora import ALTERNATE, DENSE, PRODUCT, SwitchLoRA
from tests.generators import as_payload, dense
from tests.strategies.laws import SINGLE, after_rounds, cohort, population_for, reached

GAP = "aggregate/exactness_gap_relative"
SWITCH = [
    SwitchLoRA(mode=mode, switching=SwitchTraining(interval=10.0, ratio=10.0), steps=3, horizon=40)
    for mode in (ALTERNATE, PRODUCT, DENSE)
]
EXACT = [Rebase(), Rebase(own_a=True), Rebase(hold="mean"), Rebase(hold="svd"), *SWITCH]
NAMES = ["flora", "own_a", "fedex", "svd", ALTERNATE, PRODUCT, DENSE]


def one_round(rule: LoRAStrategy, spoil: float = 0.0) -> dict[str, float]:
    """What is recorded of the third round, in the precision of a run."""
    population = population_for(rule)
    state, updates = after_rounds(rule, population, seed=1, rounds=2, precision=SINGLE)
    starts = {u.client.id: as_payload(rule.client_start(state, u.client)) for u in updates}
    after = {
        k: t + spoil if k.startswith("shift/") and k.endswith("/d") else t
        for k, t in rule.aggregate(state, updates).items()
    }
    return dict(diagnosis(rule, after, population, updates, starts))


@pytest.mark.parametrize("rule", EXACT, ids=NAMES)
def test_exact_methods_have_no_gap_but_rounding(rule: LoRAStrategy) -> None:
    record = one_round(rule)
    assert record["aggregate/update_norm"] > 1
    assert record[GAP] < 1e-6
    assert record["aggregate/exactness_gap"] == pytest.approx(
        record[GAP] * record["aggregate/update_norm"]
    )


def test_a_base_that_is_not_the_average_shows() -> None:
    assert one_round(Rebase(), spoil=0.5)[GAP] > 1e-2


def test_what_florist_drops_is_its_gap() -> None:
    """``<= √(1 - τ)`` of the first round's mean, and not nothing."""
    rule = Rebase(energy=0.9)
    population = population_for(rule)
    state = rule.init_state(population)
    updates = cohort(rule, state, population, seed=1, precision=SINGLE)
    starts = {u.client.id: as_payload(rule.client_start(state, u.client)) for u in updates}
    after = rule.aggregate(state, updates)
    record = diagnosis(rule, after, population, updates, starts)
    assert 0.01 < record[GAP] <= 0.1**0.5


def test_the_gap_is_measured_as_that_of_factors() -> None:
    """On a base that has not moved, it is the gap of the same factors."""
    rule = FedIT()
    population = population_for(rule)
    state, updates = after_rounds(rule, population, seed=1)
    model, weights = rule.global_update(state), rule.reference_weights(updates)
    zero = {m.path: torch.zeros(m.d_out, m.d_in) for m in population.modules}
    starts = {u.client.id: Rebased(zero, dict(u.adapter)) for u in updates}
    found = moved_gap(Rebased(zero, dict(model)), updates, starts, weights)
    wanted = exactness_gap(updates, weights, model)
    assert found == pytest.approx(wanted, rel=1e-9)
    assert found["relative"] > 0.1


def test_the_gap_is_the_distance_to_the_mean_of_what_clients_reached() -> None:
    rule = Rebase(hold="mean")
    population = population_for(rule)
    state, updates = after_rounds(rule, population, seed=1)
    starts = {u.client.id: as_payload(rule.client_start(state, u.client)) for u in updates}
    weights = rule.reference_weights(updates)
    found = moved_gap(as_payload(rule.global_update(state)), updates, starts, weights)
    mean: dict[str, torch.Tensor] = {}
    for u, w in zip(updates, weights, strict=True):
        for path, d in reached(rule, state, u).items():
            mean[path] = mean.get(path, torch.zeros(())) + w / sum(weights) * d
    model = dense(rule.global_update(state))
    gap = torch.stack([(model[p] - d).norm() for p, d in mean.items()]).norm()
    norm = torch.stack([d.norm() for d in mean.values()]).norm()
    assert found["gap"] == pytest.approx(float(gap), rel=1e-9)
    assert found["norm"] == pytest.approx(float(norm), rel=1e-9)
