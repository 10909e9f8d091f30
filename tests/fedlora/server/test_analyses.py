"""Analyses of rounds of real methods, against the same numbers from dense matrices."""

import math

import pytest
import torch
from torch import Tensor

from fedlora.core.types import Setting, Update
from fedlora.server.analyses import Analyses, added, drift_record
from fedlora.techniques.switchlora.technique import SwitchTraining
from strategies.alternate import Alternate
from strategies.base import LoRAStrategy
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.lora_a2 import LoRAA2
from strategies.rebase import Rebase
from strategies.spp import SPP
from strategies.switchlora import DENSE, SwitchLoRA
from tests.generators import as_payload, dense
from tests.strategies.laws import SINGLE, after_rounds, population_for, reached

FACTORED = {
    "fedit": FedIT(),
    "flexlora": FlexLoRA(),
    "heterolora": HeteroLoRA(),
    "rolora": Alternate(),
    "lora_a2": LoRAA2(),
}
SWITCHING = SwitchTraining(interval=10.0, ratio=10.0)
MOVED = {
    "flora": Rebase(),
    "fedex": Rebase(hold="mean"),
    "switchlora": SwitchLoRA(mode=DENSE, switching=SWITCHING, steps=3, horizon=40),
}
ALL = Analyses(spectrum="all", lost=True, drift=True)


def third_round(
    rule: LoRAStrategy, of: Analyses = ALL
) -> tuple[dict[str, float], Setting, dict[str, Tensor], list[Update], list[dict[str, Tensor]]]:
    """Its record, and what it is of: the dense global update and the clients' dense changes."""
    population = population_for(rule)
    state, updates = after_rounds(rule, population, seed=1, rounds=2)
    starts = {u.client.id: as_payload(rule.client_start(state, u.client)) for u in updates}
    after = rule.aggregate(state, updates)
    record = of.record(rule, after, population, 3, updates, starts)
    moves = []
    for u in updates:
        before, end = dense(starts[u.client.id]), reached(rule, state, u)
        moves.append({p: w - before[p] for p, w in end.items()})
    return record, population, dense(rule.global_update(after)), updates, moves


def flat(x: dict[str, Tensor]) -> Tensor:
    return torch.cat([x[p].double().reshape(-1) for p in sorted(x)])


@pytest.mark.parametrize("name", [*FACTORED, *MOVED])
def test_norms_and_cosines_are_those_of_the_weights(name: str) -> None:
    rule = (FACTORED | MOVED)[name]
    record, _, _, updates, moves = third_round(rule)
    p = torch.tensor(rule.reference_weights(updates), dtype=torch.float64)
    xs = torch.stack([flat(x) for x in moves])
    mean = (p / p.sum()) @ xs
    cosines = xs @ mean / (xs.norm(dim=1) * mean.norm())
    assert record["drift/norm"] == pytest.approx(float(xs.norm(dim=1).mean()))
    assert record["drift/norm_std"] == pytest.approx(float(xs.norm(dim=1).std(correction=0)))
    assert record["drift/cosine"] == pytest.approx(float(cosines.mean()), abs=1e-9)
    assert record["drift/cosine_std"] == pytest.approx(float(cosines.std(correction=0)), abs=1e-9)
    own = [i for i, u in enumerate(updates) if u.client.tier == "T4"]
    assert record["tier/T4/drift_norm"] == pytest.approx(float(xs[own].norm(dim=1).mean()))
    assert record["tier/T4/drift_cosine"] == pytest.approx(float(cosines[own].mean()), abs=1e-9)


@pytest.mark.parametrize("name", [*FACTORED, *MOVED])
def test_energies_and_ranks_are_those_of_the_weights(name: str) -> None:
    record, population, model, _, _ = third_round((FACTORED | MOVED)[name])
    shares = {k: v for k, v in record.items() if k.startswith("spectrum/energy_")}
    assert math.fsum(shares.values()) == pytest.approx(1)
    s = {p: torch.linalg.svdvals(w.double()) for p, w in model.items()}
    total = sum(float(x.square().sum()) for x in s.values())
    first = sum(float(x[0].square()) for x in s.values())
    assert record["spectrum/energy_1"] == pytest.approx(first / total, rel=1e-6)
    stable = [float(x.square().sum() / x[0].square()) for x in s.values()]
    assert record["spectrum/stable_rank"] == pytest.approx(sum(stable) / len(stable), rel=1e-6)
    for client in population.clients:
        tail = sum(float(s[p][r:].square().sum()) for p, r in client.ranks.items())
        found = record[f"tier/{client.tier}/truncation_error"]
        assert found == pytest.approx(math.sqrt(tail / total), abs=1e-6)


@pytest.mark.parametrize("name", ["fedit", "flexlora", "heterolora"])
def test_no_method_gives_a_tier_more_than_the_best_of_its_rank(name: str) -> None:
    record, population, _, _, _ = third_round(FACTORED[name])
    for tier in {c.tier for c in population.clients}:
        least = record[f"tier/{tier}/truncation_error"]
        assert record[f"tier/{tier}/lost"] >= least - 1e-6


def test_flexlora_loses_the_tail_and_no_more() -> None:
    record, population, _, _, _ = third_round(FlexLoRA())
    for tier in {c.tier for c in population.clients}:
        assert record[f"tier/{tier}/lost"] == pytest.approx(
            record[f"tier/{tier}/truncation_error"], abs=1e-6
        )
    assert record["tier/T1/lost"] > record["tier/T4/lost"]


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_clients_that_get_the_whole_base_lose_nothing(name: str) -> None:
    record, _, _, _, _ = third_round(MOVED[name])
    assert {v for k, v in record.items() if k.endswith("/lost")} == {0.0}


def test_clients_that_do_the_same_agree() -> None:
    rule = FedIT()
    population = population_for(rule, ("T3", "T3"))
    state, updates = after_rounds(rule, population, seed=1)
    starts = {u.client.id: as_payload(rule.client_start(state, u.client)) for u in updates}
    one = updates[0]
    twins = [one, Update(updates[1].client, one.payload, updates[1].num_examples, {})]
    record = drift_record(twins, starts, [1.0, 3.0])
    assert record["drift/cosine"] == pytest.approx(1)
    assert record["drift/norm_std"] == pytest.approx(0, abs=1e-9)
    assert record["drift/diversity"] == pytest.approx(1)


@pytest.mark.parametrize("rule", [SPP(), FedSA()], ids=["spp", "fedsa"])
def test_a_method_without_such_a_model_has_no_numbers_of_it(rule: LoRAStrategy) -> None:
    record, *_ = third_round(rule)
    assert not [k for k in record if "spectrum" in k or "lost" in k or "truncation" in k]
    assert ("drift/norm" in record) == isinstance(rule, FedSA)


def test_what_costs_is_off_by_default_and_all_can_be() -> None:
    few, *_ = third_round(FlexLoRA(), Analyses())
    assert {k.split("/")[0] for k in few} == {"spectrum", "tier"}
    assert not [k for k in few if "lost" in k or "drift" in k]
    assert third_round(Rebase(), Analyses())[0] == {}
    assert third_round(FlexLoRA(), Analyses(spectrum="none"))[0] == {}
    assert third_round(FlexLoRA(), Analyses(every=2))[0] == {}
    assert third_round(FlexLoRA(), Analyses(every=3))[0] == few


def test_single_precision_is_enough() -> None:
    rule = FlexLoRA()
    population = population_for(rule)
    wide, *_ = third_round(rule)
    state, updates = after_rounds(rule, population, seed=1, rounds=2, precision=SINGLE)
    starts = {u.client.id: as_payload(rule.client_start(state, u.client)) for u in updates}
    narrow = ALL.record(rule, rule.aggregate(state, updates), population, 3, updates, starts)
    assert narrow == pytest.approx(wide, rel=1e-4, abs=1e-4)


def test_factors_over_a_moved_base_are_added_to_it() -> None:
    rule = Rebase(hold="mean")
    state, updates = after_rounds(rule, population_for(rule), seed=1)
    start = as_payload(rule.client_start(state, updates[0].client))
    found = added(start)
    assert found is not None
    for path, w in dense(start).items():
        assert torch.allclose(torch.as_tensor(found[path]).double(), w, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [({"spectrum": "some"}, "spectrum='some' is not one of"), ({"every": 0}, "every=0 must be")],
)
def test_impossible_values_are_refused(words: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Analyses(**words)  # type: ignore[arg-type]
