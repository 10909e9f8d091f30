"""Local training: nothing that a client trains reaches another, and it goes on from its own."""

import pytest
import torch

from fedlora.server.method import Setup
from strategies.local import Local
from strategies.slora import SLoRA
from tests.generators import as_payload
from tests.strategies.laws import (
    DOUBLE,
    PLAN,
    SINGLE,
    Precision,
    assert_same,
    cohort,
    job,
    population_for,
)


@pytest.mark.parametrize("precision", [DOUBLE, SINGLE], ids=["float64", "float32"])
def test_nothing_is_shared_and_nothing_is_lost(precision: Precision) -> None:
    strategy = Local()
    population = population_for(strategy)
    state = strategy.init_state(population)
    updates = cohort(strategy, state, population, 1, precision)
    after = strategy.aggregate(state, updates)
    assert after.keys() == state.keys()
    assert all(torch.equal(t, after[name]) for name, t in state.items())
    for update in updates:
        client, start = update.client, as_payload(strategy.client_start(state, update.client))
        kept = strategy.kept(state, client, None, start, update)
        assert_same(strategy.client_start(after, client, kept), update.payload, "its next start")
        assert_same(strategy.personal_update(after, client, kept), update.payload, "its own model")
        assert_same(strategy.personal_update(after, client), start, "a client that never trained")
        assert strategy.bytes_up(state, update, PLAN, "float32") == 0
        assert strategy.bytes_down(state, job(strategy, state, client), "float32") == 0


def test_all_clients_start_from_one_initialisation() -> None:
    strategy = Local()
    population = population_for(strategy)
    state = strategy.init_state(population)
    whole = strategy.global_update(state)
    for client in population.clients:
        for path, f in strategy.client_start(state, client).items():
            assert torch.equal(f.a, whole[path].a[: client.ranks[path]])
            assert not f.b.any()


def test_it_is_no_aggregator_of_another_method() -> None:
    with pytest.raises(ValueError, match="aggregator=Local averages nothing"):
        SLoRA(aggregator=Local()).check(Setup(PLAN))
