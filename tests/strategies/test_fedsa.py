"""FedSA-LoRA: only A travels, B stays with its client, and each client has a model of its own."""

import dataclasses

import pytest
import torch

from fedlora.algebra.linalg import average, normalize
from fedlora.core.types import Factors, LocalPlan, Update
from fedlora.server.method import Setup
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from strategies.slora import SLoRA
from tests.generators import (
    as_payload,
    dense,
    setting,
    single_module_setting,
    trained,
    vector_updates,
)
from tests.strategies.laws import (
    PLAN,
    assert_same,
    close,
    cohort,
    job,
    kept_by,
    population_for,
)


def averaged(updates: list[Update], ranks: tuple[int, ...]) -> tuple[FedSA, dict, dict]:
    rule, population = FedSA(), single_module_setting(6, 5, ranks, alpha=4.0)
    state = rule.init_state(population)
    kept = {u.client.id: {"w/b": u.adapter["w"].b} for u in updates}
    return rule, rule.aggregate(state, updates), kept


def test_each_client_goes_on_from_its_own_b_and_the_common_a() -> None:
    """After rounds in which it did not take part, too."""
    rule, population = FedSA(), population_for(FedSA())
    state = rule.init_state(population)
    first = cohort(rule, state, population, 1)
    kept = kept_by(rule, state, first)
    state = rule.aggregate(state, first)
    state = rule.aggregate(state, cohort(rule, state, population, 2)[1:])
    for update in first:
        start = rule.client_start(state, update.client, kept[update.client.id])
        for path, f in start.items():
            assert torch.equal(f.b, update.adapter[path].b)
            assert torch.equal(f.a, state[f"global/{path}/a"][: f.rank])
        own = rule.personal_update(state, update.client, kept[update.client.id])
        assert_same(as_payload(own), as_payload(start), "its own model")


def test_a_client_that_never_trained_uses_the_base_model() -> None:
    rule, population = FedSA(), population_for(FedSA())
    state = rule.init_state(population)
    state = rule.aggregate(state, cohort(rule, state, population, 1))
    for client in population.clients:
        assert not any(d.any() for d in dense(rule.personal_update(state, client)).values())


def test_with_one_b_for_all_the_average_is_exact() -> None:
    """FEDSA-1."""
    shared = vector_updates((2, 2, 2))
    b = shared[0].adapter["w"].b
    updates = [
        dataclasses.replace(u, payload={"w": dataclasses.replace(u.adapter["w"], b=b)})
        for u in shared
    ]
    rule, state, kept = averaged(updates, (2, 2, 2))
    weights = normalize([u.num_examples for u in updates])
    mean = sum(w * u.adapter["w"].delta() for w, u in zip(weights, updates, strict=True))
    for u in updates:
        own = rule.client_start(state, u.client, kept[u.client.id])
        close(own["w"].delta(), mean)


def test_the_mean_of_the_personal_models_is_fedits_product() -> None:
    """FEDSA-2: hence no model of all clients is better than FedIT's."""
    updates = vector_updates((2, 2, 2))
    rule, state, kept = averaged(updates, (2, 2, 2))
    weights = normalize([u.num_examples for u in updates])
    own = [rule.client_start(state, u.client, kept[u.client.id])["w"].delta() for u in updates]
    mean = sum(w * d for w, d in zip(weights, own, strict=True))
    close(mean, average([u.adapter["w"] for u in updates], weights).delta())


def test_rows_are_averaged_over_their_owners() -> None:
    """FEDSA-3: a row of one owner is that owner's; a row of none stays."""
    updates = vector_updates((1, 2, 4))
    rule, state, _ = averaged(updates, (1, 2, 4, 5))
    a, (one, two, four) = state["global/w/a"], (u.adapter["w"].a for u in updates)
    close(a[0], (10 * one[0] + 20 * two[0] + 30 * four[0]) / 60)
    close(a[1], (20 * two[1] + 30 * four[1]) / 50)
    close(a[2:4], four[2:4])
    first = rule.init_state(single_module_setting(6, 5, (1, 2, 4, 5), alpha=4.0))["global/w/a"]
    assert torch.equal(a[4].float(), first[4])


@pytest.mark.parametrize("weighting", ["covered", "all"])
def test_at_equal_ranks_a_is_fedits(weighting: str) -> None:
    population = setting(("T4", "T4", "T4"))
    rule, fedit = FedSA(weighting=weighting), FedIT()
    state, other = rule.init_state(population), fedit.init_state(population)
    for t in range(2):
        updates = cohort(fedit, other, population, t)
        state, other = rule.aggregate(state, updates), fedit.aggregate(other, updates)
    for path, f in fedit.global_update(other).items():
        close(state[f"global/{path}/a"], f.a)


def test_traffic_is_a_alone() -> None:
    """Nothing down in round 1, whose A follows from the seed."""
    rule, population = FedSA(), population_for(FedSA())
    state = rule.init_state(population)
    updates = cohort(rule, state, population, 1)
    after = rule.aggregate(state, updates)
    for u in updates:
        of_a = sum(m.d_in * u.client.ranks[m.path] for m in population.modules)
        assert rule.bytes_up(state, u, PLAN, "float32") == 4 * of_a
        assert rule.bytes_up(state, u, PLAN, "bfloat16") == 2 * of_a
        assert rule.bytes_down(state, job(rule, state, u.client), "float32") == 0
        assert rule.bytes_down(after, job(rule, after, u.client), "float32") == 4 * of_a


def test_what_is_kept_is_b_alone() -> None:
    rule, population = FedSA(), population_for(FedSA())
    state = rule.init_state(population)
    client = population.clients[0]
    start = as_payload(rule.client_start(state, client))
    update = Update(client, trained(start, 1), client.num_examples)
    kept = rule.kept(state, client, None, start, update)
    assert kept.keys() == {f"{m.path}/b" for m in population.modules}
    scalars = sum(t.numel() for t in kept.values())
    assert scalars == sum(m.d_out * client.ranks[m.path] for m in population.modules)


def test_a_frozen_factor_and_other_methods_are_refused() -> None:
    for plan in (LocalPlan(train_a=False), LocalPlan(train_b=False)):
        with pytest.raises(ValueError, match="train both, or use strategy=fedit"):
            FedSA().check(Setup(plan))
    with pytest.raises(ValueError, match="aggregator=FedSA leaves B with each client"):
        SLoRA(aggregator=FedSA()).check(Setup(PLAN))
    with pytest.raises(ValueError, match=r"strategy\.weighting='owners'"):
        FedSA(weighting="owners")


def test_one_b_for_all_clients_gives_them_what_none_has_trained() -> None:
    """The leak of released code: each client would go on from the B of the one before it."""
    updates = vector_updates((2, 2, 2))
    rule, state, kept = averaged(updates, (2, 2, 2))
    right = rule.client_start(state, updates[0].client, kept[0])["w"]
    leaked = Factors(right.a, kept[2]["w/b"], right.alpha)
    error = float((leaked.delta() - right.delta()).norm() / right.delta().norm())
    assert error > 0.5
