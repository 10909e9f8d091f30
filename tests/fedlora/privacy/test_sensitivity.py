"""One client moves a release by no more than the clip over the expected cohort, whatever it sends.

Brute force: every method whose round is a sum, clients of unequal rank that did not move, hardly
moved, moved by exactly the clip and a million times too far; each of them is taken out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from fedlora.algebra import summand
from fedlora.algebra.state import State
from fedlora.algebra.summand import Summands
from fedlora.core.types import Client, Update
from fedlora.privacy.client import Release
from fedlora.privacy.noise import Noise
from fedlora.server.combine import combine, zero_summand
from fedlora.server.postprocess import Moment, Postprocessor
from fedlora.techniques.switchlora.technique import SwitchTraining
from strategies.alternate import Alternate
from strategies.base import LoRAStrategy
from strategies.fedavg import FedAvg
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from strategies.fedsb import FedSB
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.lora_a2 import LoRAA2
from strategies.rebase import Rebase
from strategies.slora import SLoRA
from strategies.spp import SPP
from strategies.switchlora import SwitchLoRA
from tests.generators import as_payload, dense, trained
from tests.strategies.laws import PLAN, added, after_rounds, answer, assert_same, population_for

COHORT = 6.0
NOW = Moment(seed=3, round=2)
LINEAR: dict[str, LoRAStrategy] = {
    "fedavg": FedAvg(weights="uniform"),
    "fedit": FedIT(),  # its weights by examples do not count
    "flexlora": FlexLoRA(residual="carry", weights="uniform"),
    "fedsvd": FlexLoRA(residual="carry", weights="uniform", train="b"),
    "heterolora": HeteroLoRA(average="change", weights="uniform", prune=False),
    "ffa": Alternate(weights="uniform"),
    "rolora": Alternate(schedule="ba", weights="uniform"),
    "flora": Rebase(weights="uniform"),
    "fedsa": FedSA(weights="uniform", weighting="all"),
    "fedsb": FedSB(weights="uniform"),
    "lora_a2": LoRAA2(weights="uniform"),
    "slora": SLoRA(weights="uniform", aggregator=FedIT(weights="uniform")),
    "spp": SPP(weights="uniform"),
    "switchlora": SwitchLoRA(weights="uniform", switching=SwitchTraining(), steps=3, horizon=40),
}
SIZES = (0.0, 1e-9, 1.0, 1.0, 1e6, 3.0)
"""How far the clients of a round move, in units of the third one's training."""


@dataclass(frozen=True)
class Seen(Postprocessor):
    """Keeps what is released."""

    released: list[tuple[Summands, float]] = field(default_factory=list)

    def whole(self, total: Summands, weight: float, now: Moment) -> Summands:
        self.released.append((total, weight))
        return total


def a_round(method: LoRAStrategy, rounds: int) -> tuple[State, list[Update]]:
    population = population_for(method)
    state, updates = after_rounds(method, population, 1, rounds)
    moved = []
    for u, size in zip(updates, SIZES, strict=True):
        start = as_payload(method.client_start(state, u.client))
        end = trained(start, 1000 + u.client.id, size)
        moved.append(replace(u, payload=answer(start, end, method.plan(state, u.client, PLAN))))
    return state, moved


def released(
    method: LoRAStrategy, state: State, updates: Sequence[Update], clip: float
) -> tuple[Summands, float, State]:
    """What a round releases of these clients without noise, its denominator, and the next state."""
    seen, ranks = Seen(), population_for(method).clients[0].ranks
    release = Release(2, clip, 0.0, COHORT, Noise(3))
    after = combine(
        method,
        state,
        updates,
        NOW,
        starts={u.client.id: as_payload(method.client_start(state, u.client)) for u in updates},
        postprocessors=[seen, release],
        zero=lambda: zero_summand(method, state, Client(0, ranks, 5)),
    )
    (found,) = seen.released
    return *found, after.state


def distance(one: Summands, other: Summands) -> float:
    return math.hypot(
        *(float((summand.dense(x) - summand.dense(other[n])).norm()) for n, x in one.items())
    )


@pytest.mark.parametrize("name", LINEAR)
def test_one_client_moves_a_release_by_at_most_the_clip(name: str) -> None:
    method = LINEAR[name]
    for rounds in (0, 1) if name in ("rolora", "switchlora", "spp", "lora_a2") else (1,):
        state, updates = a_round(method, rounds)
        clip = summand.norm(added(method, state, updates)[2])
        assert clip > 0
        whole, weight, after = released(method, state, updates, clip)
        assert weight == COHORT
        for k in range(len(updates)):
            rest = [u for i, u in enumerate(updates) if i != k]
            less, other, without = released(method, state, rest, clip)
            assert other == weight
            assert distance(whole, less) <= clip * (1 + 1e-6), f"client {k}"
            if name in ("flexlora", "flora"):
                models = [dense(method.global_update(s)) for s in (after, without)]
                moved = math.hypot(
                    *(float((models[0][p] - w).norm()) for p, w in models[1].items())
                )
                assert moved <= clip / COHORT * (1 + 1e-6), f"client {k} on the weights"


@pytest.mark.parametrize("name", LINEAR)
def test_without_noise_and_clip_the_bits_are_those_of_the_sum(name: str) -> None:
    method = LINEAR[name]
    state, updates = a_round(method, 1)
    starts = {u.client.id: as_payload(method.client_start(state, u.client)) for u in updates}
    alike = replace(method, weights="uniform")
    plain = combine(
        alike, state, updates, NOW, starts=starts, postprocessors=[Postprocessor()]
    ).state
    _, _, private = released(method, state, updates, math.inf)
    assert plain.keys() == private.keys()
    assert all(torch.equal(t, private[n]) for n, t in plain.items())


@pytest.mark.parametrize("name", LINEAR)
def test_an_empty_round_releases_noise_alone_and_without_it_nothing_moves(name: str) -> None:
    method = LINEAR[name]
    state, updates = a_round(method, 1)
    nothing, weight, after = released(method, state, [], 1.0)
    assert weight == COHORT
    assert all(not summand.dense(x).any() for x in nothing.values())
    before, now = (as_payload(method.global_update(s)) for s in (state, after))
    if name in ("fedit", "fedavg", "ffa", "rolora", "fedsb"):
        assert_same(before, now, "an empty round")
    noisy = Release(2, 1.0, 0.5, COHORT, Noise(3))
    moved = combine(
        method,
        state,
        [],
        NOW,
        starts={},
        postprocessors=[noisy],
        zero=lambda: zero_summand(method, state, updates[0].client),
    ).state
    assert any(not torch.equal(t, after[n]) for n, t in moved.items())


def test_the_clip_is_one_norm_over_all_modules() -> None:
    parts = {"a": torch.full((3,), 4.0), "b": torch.full((2, 2), -1.0)}
    release = Release(1, 2.0, 0.0, 5.0, Noise(0))
    client = Client(4, next(iter(population_for(LINEAR["fedit"]).clients)).ranks, 1)
    found = release.each(parts, client, NOW)
    assert summand.norm(found) <= 2.0
    assert summand.norm(found) == pytest.approx(2.0, rel=2e-6)
    assert release.norms == {4: pytest.approx(math.sqrt(3 * 16 + 4))}
    short = summand.scaled(parts, 0.1)
    assert release.each(short, client, NOW) is short
