"""The accounts of `privacy=example`: every client's own rate and steps, and the largest epsilon."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fedlora.core.config import build
from fedlora.core.errors import ConfigError
from fedlora.core.example_privacy import ExamplePrivacy
from fedlora.core.types import Client, LocalPlan, Ranks
from fedlora.population.sampling import Roster
from fedlora.privacy.account import Releases
from fedlora.privacy.example import ExampleLevel, ExampleLevelRun, _maximal
from fedlora.server.composes import Around
from fedlora.server.method import Setup
from fedlora.server.protection import PlannedRun
from fedlora.server.schedule import Rounds
from fedlora.techniques.spp.technique import Scaling
from strategies.base import LoRAStrategy
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from strategies.lora_a2 import LoRAA2
from strategies.splitlora import SplitLoRA
from tests.fedlora.population.test_workload import Held

PLAN = LocalPlan(batch_size=4, epochs=2)
SPEC = ExampleLevel(epsilon=0, sigma=1.0)
SIZES = (8, 16, 60, 200)


@dataclass(frozen=True)
class Trained(Held):
    def trains(self, loss: str) -> int:
        return self.num_train


def planned(per_round: int = 4, rounds: int = 3, plan: LocalPlan = PLAN) -> PlannedRun:
    clients = tuple(Client(i, Ranks({"q": 2}), n) for i, n in enumerate(SIZES))
    ids = tuple(range(len(SIZES)))
    shards = tuple(Trained(n, 10 * n) for n in SIZES)
    roster = Roster(clients, ids, {"seen": ids}, per_round, shards, 3)
    return PlannedRun(roster, plan, 5, rounds, Path("unused"))


def test_epsilon_is_that_of_the_client_that_is_told_most_about() -> None:
    run = ExampleLevelRun(SPEC, planned())
    each = [
        Releases(1.0, min(1.0, 4 / n)).epsilon(3 * 2 * math.ceil(n / 4), SPEC.delta) for n in SIZES
    ]
    assert run.epsilon(3) == max(each)
    assert run.epsilon(0) == 0
    one = ExampleLevelRun(SPEC, planned(per_round=1))
    assert one.epsilon(1) <= run.epsilon(1)
    assert one.record(2) == {"privacy/epsilon": one.epsilon(2)}


def test_only_clients_that_no_other_exceeds_are_looked_at() -> None:
    points = [(0.5, 3), (0.5, 4), (0.2, 9), (0.1, 9), (0.4, 2)]
    assert _maximal(points) == [(0.5, 4), (0.2, 9)]


def test_the_noise_is_calibrated_for_the_whole_run_and_the_budget_ends_it() -> None:
    run = ExampleLevelRun(ExampleLevel(epsilon=2.0), planned())
    assert 1.9 <= run.epsilon(3) <= 2.0
    assert not run.exhausted(2)
    assert "above 2" in run.exhausted(3)
    again = ExampleLevelRun(ExampleLevel(epsilon=2.0), planned(rounds=9))
    again.restore(run.saved())
    assert again.plan(PLAN) == run.plan(PLAN)
    with pytest.raises(ValueError, match=r"privacy\.max_epsilon=0\.01 is below"):
        ExampleLevelRun(replace(SPEC, max_epsilon=0.01), planned())


def test_the_plan_carries_the_mechanism_and_silos_draw_their_own_noise(tmp_path) -> None:
    for seeded in (True, False):
        run = ExampleLevelRun(SPEC, replace(planned(), seeded=seeded, folder=tmp_path))
        privacy = run.plan(PLAN).privacy
        assert privacy is not None
        assert (privacy.clip, privacy.sigma, privacy.seeded) == (1.0, 1.0, seeded)


def test_a_round_that_real_clients_do_again_counts_again(tmp_path) -> None:
    """They draw other noise than before; in a simulation the same bits come back."""
    for seeded in (True, False):
        where = replace(planned(), seeded=seeded, folder=tmp_path)
        run = ExampleLevelRun(SPEC, where)
        for _ in range(3):
            run.plan(PLAN)
        later = ExampleLevelRun(SPEC, where)  # after a kill
        assert later.record(2)["privacy/epsilon"] == later.epsilon(2, 0 if seeded else 1)
    assert later.epsilon(2, 1) > later.epsilon(2)


def test_noise_of_real_clients_has_more_than_32_bits_of_seed(monkeypatch) -> None:
    """Planted: torch's generator would take the low 32 bits of any seed."""
    privacy = ExamplePrivacy(1.0, 2.0, seeded=False)
    keys = {"seed": 0, "round": 1, "client": 2}
    (one,), (other,) = (privacy.noise([(50, 40)], 0, **keys) for _ in range(2))
    assert not torch.equal(one, other) and one.dtype == torch.float64
    assert float(one.std()) == pytest.approx(2.0, rel=0.1)
    monkeypatch.setattr(torch, "randn", None)
    privacy.noise([(2, 3)], 0, **keys)


def test_what_is_claimed() -> None:
    said = " ".join(ExampleLevelRun(SPEC, planned()).statement(dict))
    for part in ("8 to 200 examples", "delta 1e-05", "3 rounds", "Not covered", "0.25 clips"):
        assert part in said
    (nothing,) = ExampleLevelRun(replace(SPEC, sigma=0.0), planned()).statement(dict)
    assert "no guarantee" in nothing


def test_every_real_client_is_told_its_own_epsilon() -> None:
    """The largest of them is the run's; a simulation of many clients does not list them."""
    where = planned()
    clients = tuple(replace(c, tier=f"silo{c.id}") for c in where.roster.clients)
    where = replace(where, roster=replace(where.roster, clients=clients), seeded=False)
    run = ExampleLevelRun(SPEC, where)
    (line,) = (s for s in run.statement(dict) if "epsilon of each" in s)
    each = {
        f"silo{i}": Releases(1.0, min(1.0, 4 / n)).epsilon(3 * 2 * math.ceil(n / 4), SPEC.delta)
        for i, n in enumerate(SIZES)
    }
    for (name, epsilon), n in zip(each.items(), SIZES, strict=True):
        assert f"{name} {epsilon:.4g} ({n} examples, 3 rounds)" in line
    assert max(each.values()) == run.epsilon(3)
    assert len(set(each.values())) == len(SIZES)
    seeded = ExampleLevelRun(SPEC, replace(where, seeded=True)).statement(dict)
    assert not any("epsilon of each" in s for s in seeded)


@pytest.mark.parametrize(
    ("strategy", "setup", "why"),
    [
        (FedIT(), Setup(replace(PLAN, max_examples=3)), "client.max_examples=0"),
        (FedIT(), Setup(replace(PLAN, group_by_length=True)), "group_by_length=false"),
        (FedIT(), Setup(PLAN, head="averaged"), "model.head=frozen"),
        (FedIT(), Setup(replace(PLAN, technique=Scaling())), "of LoRA"),
        (LoRAA2(), Setup(PLAN), "choose by their examples"),
        (SplitLoRA(aggregator=FedIT()), Setup(PLAN), "sends activations"),
    ],
)
def test_what_would_break_the_claim_is_refused(
    strategy: LoRAStrategy, setup: Setup, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        SPEC.check(Around(strategy, setup, Rounds()))


def test_any_average_goes_with_it() -> None:
    assert not SPEC.on_summands
    SPEC.check(Around(FlexLoRA(), Setup(PLAN), Rounds()))


def test_two_ways_to_say_the_noise_are_refused() -> None:
    node = {"_target_": "fedlora.privacy.example.ExampleLevel", "epsilon": 1, "sigma": 1}
    with pytest.raises(ConfigError, match="set one of them to 0"):
        build(node, ExampleLevel, "privacy")
