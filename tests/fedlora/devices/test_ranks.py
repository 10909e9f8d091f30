"""Ranks by device: the largest step of the ladder that memory and time allow."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.types import Module, Ranks
from fedlora.devices.ranks import ByDevice, Demand, largest
from fedlora.devices.table import Device
from fedlora.devices.time import Visit
from fedlora.population.ranks import RankDistribution, module_ranks
from fedlora.population.sampling import Population, enroll
from tests.fedlora.devices.worlds import Plain, sevens
from tests.fedlora.population.test_workload import Held

MODULES = (Module("q_proj", "attention", 40, 30), Module("up_proj", "mlp", 20, 25))
RULE = ByDevice(top=16, share=0.5, slack=0.8)
LADDER = {t.name: module_ranks(t, MODULES, clamp=True) for t in RULE.resolve(MODULES, 1000)}


def fits(ranks: Ranks, device: Device, demand: Demand, deadline: float) -> bool:
    cost = Plain()
    sent = cost.adapter(ranks) * 4
    seconds = Visit(0, device, sent, sent, cost.work(ranks).of(demand.lengths)).seconds
    memory = cost.memory(ranks, demand.tokens_at_once)
    return memory <= 0.5 * device.memory and seconds <= 0.8 * deadline


@given(st.floats(10, 6000), st.floats(1, 1e4), st.floats(1, 500), st.booleans())
def test_the_chosen_rank_fits_and_the_next_step_does_not(memory, speed, deadline, timed):
    device = Device(speed, memory, up=1e3, down=1e3)
    demand, limit = Demand(50, sevens(4)), deadline if timed else math.inf
    chosen = largest(demand, device, Plain(), LADDER, RULE, deadline=limit)
    names = list(LADDER)
    at = -1 if chosen is None else names.index(chosen)
    assert at < 0 or fits(LADDER[names[at]], device, demand, limit)
    assert at + 1 == len(names) or not fits(LADDER[names[at + 1]], device, demand, limit)


@pytest.mark.parametrize(("top", "names"), [
    (16, ["r1", "r2", "r4", "r8", "r16"]), (12, ["r1", "r2", "r4", "r8", "r12"]),
    (1, ["r1"]), (999, ["r1", "r2", "r4", "r8", "r16", "r30"]),
])  # fmt: skip
def test_the_ladder_doubles_up_to_the_top_or_the_largest_module(top, names):
    tiers = ByDevice(top=top).resolve(MODULES, 1000)
    assert [t.name for t in tiers] == names
    assert [t.attention for t in tiers] == [int(n[1:]) for n in names]


def test_a_client_whose_device_cannot_train_is_evaluated_at_the_smallest_rank_of_the_others():
    held = [Held(4, 40, id=i) for i in range(6)]
    assigned = ["r4", None, "r8", "r4", None, "r8"]
    population = Population(fraction=1.0, unseen_fraction=0.0)
    roster = enroll(population, RULE, held, MODULES, 1000, 3, assigned=assigned)
    assert roster.trainable == (0, 2, 3, 5)
    assert [c.tier for c in roster.clients] == ["r4", "", "r8", "r4", "", "r8"]
    assert roster.clients[1].ranks == roster.clients[0].ranks
    assert roster.groups["seen"] == roster.trainable


def test_what_the_devices_decide_is_not_set():
    with pytest.raises(ValueError, match=r"ranks.variant='code' has no effect"):
        ByDevice(variant="code")
    assert isinstance(RULE, RankDistribution)
    assert np.isclose(sum(t.fraction for t in RULE.resolve(MODULES, 1000)), 1.0)
