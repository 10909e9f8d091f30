"""FedAvg and FedIT: one rule, two files, and the gap that both have."""

import dataclasses

import pytest
import torch

from fedlora.algebra.linalg import (
    average,
    exactness_gap,
    normalize,
)
from fedlora.algebra.server_optimizer import FedAdam, FedAvgM
from fedlora.core.types import Ranks
from strategies.fedavg import FedAvg
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from tests.generators import (
    VECTOR_EXAMPLES,
    dense,
    setting,
    single_module_setting,
    vector_updates,
    weighted_delta,
)
from tests.strategies.laws import after_rounds, close, cohort

RULES = (FedAvg, FedIT)


@pytest.mark.parametrize("rule", RULES)
def test_v2_the_gap_of_factor_averages(rule: type[FedAvg | FedIT]) -> None:
    population = single_module_setting(6, 5, (2, 2, 2), alpha=4.0)
    updates = vector_updates((2, 2, 2))
    state = rule().aggregate(rule().init_state(population), updates)
    found = rule().global_update(state)
    assert float(found["w"].delta().norm()) == pytest.approx(2.46166941035, rel=1e-11)
    gap = exactness_gap(updates, VECTOR_EXAMPLES, found)
    assert gap["gap"] == pytest.approx(1.53511236412, rel=1e-11)


def test_both_rules_are_the_same() -> None:
    population = setting()
    state, updates = after_rounds(FedAvg(), population, seed=1)
    one, other = FedAvg().aggregate(state, updates), FedIT().aggregate(state, updates)
    assert list(one) == list(other)
    assert all(torch.equal(t, other[key]) for key, t in one.items())


@pytest.mark.parametrize("rule", RULES)
def test_uniform_weights(rule: type[FedAvg | FedIT]) -> None:
    population = setting()
    state, updates = after_rounds(rule(), population, seed=1)
    found = rule().global_update(rule(weights="uniform").aggregate(state, updates))
    for path, f in found.items():
        want = average([u.adapter[path] for u in updates], normalize([1.0] * len(updates)))
        close(f.delta(), want.delta())


@pytest.mark.parametrize("rule", RULES)
def test_unequal_ranks_train_the_smallest_or_are_refused(rule: type[FedAvg | FedIT]) -> None:
    population = setting()
    state = rule().init_state(population)
    for c in population.clients:
        e = rule().enlist(state, c)
        assert e.ranks == population.min_ranks
        assert dataclasses.replace(e, ranks=c.ranks) == c
    with pytest.raises(ValueError, match="these hold ranks 1 and 2; rank 2; ranks 2 and 5"):
        rule(heterogeneous="refuse").init_state(population)
    rule(heterogeneous="refuse").init_state(setting(("T2", "T2")))
    with pytest.raises(ValueError, match=r"strategy\.heterogeneous='pad'"):
        rule(heterogeneous="pad")


@pytest.mark.parametrize("rule", RULES)
def test_the_global_update_is_the_same_at_any_larger_rank(rule: type[FedAvg | FedIT]) -> None:
    population = setting()
    state, _ = after_rounds(rule(), population, seed=2)
    exact = dense(rule().global_update(state))
    for ranks in population.rank_patterns:
        at = rule().global_update(state, ranks)
        assert Ranks({p: f.rank for p, f in at.items()}) == ranks
        for path, d in dense(at).items():
            close(d, exact[path])


@pytest.mark.parametrize("rule", RULES)
def test_server_momentum_of_zero_is_plain_averaging(rule: type[FedAvg | FedIT]) -> None:
    population = setting()
    plain, other = rule(), rule(server_optimizer=FedAvgM(lr=1.0, momentum=0.0))
    left, right = plain.init_state(population), other.init_state(population)
    for t in range(3):
        updates = cohort(plain, left, population, seed=t)
        left, right = plain.aggregate(left, updates), other.aggregate(right, updates)
    one, two = plain.global_update(left), other.global_update(right)
    for path, f in one.items():
        close(two[path].a, f.a)
        close(two[path].b, f.b)


def test_server_adam_has_memory() -> None:
    population, rule = setting(), FedAvg(server_optimizer=FedAdam())
    state, updates = after_rounds(rule, population, seed=1)
    assert any(key.startswith("server/first/") for key in state)
    after = rule.aggregate(state, updates)
    moved = {
        p: (f.b - rule.global_update(state)[p].b) for p, f in rule.global_update(after).items()
    }
    assert all(float(m.abs().max()) < 0.0135 for m in moved.values()), (
        "two steps in: at most 1.35 lr"
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_given_update_is_continued_from(rule: type[FedAvg | FedIT]) -> None:
    population = setting()
    state = rule(server_optimizer=FedAvgM()).init_state(population)
    delta = {p: d.double() for p, d in dense(rule().global_update(state)).items()}
    g = torch.Generator().manual_seed(1)
    delta = {p: torch.randn(d.shape, generator=g, dtype=torch.float64) for p, d in delta.items()}
    after = rule(server_optimizer=FedAvgM()).adopt(state, delta)
    for path, f in rule().global_update(after).items():
        error = float((f.delta() - delta[path]).square().sum())
        tail = torch.linalg.svdvals(delta[path])[f.rank :].square().sum()
        assert error == pytest.approx(float(tail), rel=1e-12)


def test_with_one_client_fedit_is_flexlora() -> None:
    population = setting(("T2",))
    rules = FedIT(), FlexLoRA()
    updates = cohort(rules[0], rules[0].init_state(population), population, seed=3)
    one, two = (
        dense(r.global_update(r.aggregate(r.init_state(population), updates))) for r in rules
    )
    for path, d in one.items():
        close(two[path], d)
        close(d, weighted_delta([u.adapter[path] for u in updates], [1.0]))


@pytest.mark.parametrize("rule", RULES)
def test_the_gap_is_measured_against_what_the_method_weights_by(
    rule: type[FedAvg | FedIT],
) -> None:
    """With one A for all the average of factors is exact, in the method's own weights only."""
    population = single_module_setting(6, 5, (2, 2, 2), alpha=4.0)
    shared = vector_updates((2, 2, 2))
    a = shared[0].adapter["w"].a
    updates = [
        dataclasses.replace(u, payload={"w": dataclasses.replace(u.adapter["w"], a=a)})
        for u in shared
    ]
    for weights, want in (("examples", list(VECTOR_EXAMPLES)), ("uniform", [1, 1, 1])):
        method = rule(weights=weights)
        reference = method.reference_weights(updates)
        assert reference == want
        found = method.global_update(method.aggregate(method.init_state(population), updates))
        assert exactness_gap(updates, reference, found)["relative"] < 1e-7
        other = (1, 1, 1) if weights == "examples" else VECTOR_EXAMPLES
        assert exactness_gap(updates, other, found)["relative"] > 0.1
