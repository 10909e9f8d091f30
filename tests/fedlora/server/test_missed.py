"""Who knows the results of which rounds, and what is counted as sent."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.types import Client, LocalPlan, Ranks, TrainJob, Update
from fedlora.server.missed import (
    NOTHING,
    changed_bytes,
    first_seen,
    next_seen,
    seeded_bytes,
    seen_by,
)
from fedlora.techniques.lora.payload import LowRankPayload
from strategies.fedit import FedIT
from tests.generators import setting

CLIENTS = 5
rounds = st.lists(st.sets(st.integers(0, CLIENTS + 1)), max_size=6)


def update(client: int) -> Update:
    return Update(Client(client, Ranks({"w": 1}), 1), LowRankPayload({}), 1)


@given(history=rounds)
def test_a_client_knows_what_preceded_its_last_round(history: list[set[int]]) -> None:
    """Clients outside the population know what follows from the seed."""
    state = first_seen(CLIENTS)
    for took_part in history:
        before = {k: t.clone() for k, t in state.items()}
        after = next_seen(state, [update(c) for c in sorted(took_part)])
        assert all(torch.equal(t, before[k]) for k, t in state.items())
        state = after
    assert int(state["round"]) == len(history)
    for client in range(CLIENTS + 2):
        last = max((t for t, c in enumerate(history) if client in c), default=0)
        assert seen_by(state, client) == (last if client < CLIENTS else 0)


def test_of_a_run_that_began_elsewhere_clients_know_nothing() -> None:
    state = first_seen(CLIENTS, NOTHING)
    assert [seen_by(state, c) for c in range(CLIENTS)] == [NOTHING] * CLIENTS


def test_factors_that_changed_are_counted_in_the_wires_format() -> None:
    population = setting()
    client = population.clients[3]
    rule = FedIT(heterogeneous="covered")
    start = LowRankPayload(rule.client_start(rule.init_state(population), client))
    of_a = sum(m.d_in * client.ranks[m.path] for m in population.modules)
    of_b = sum(m.d_out * client.ranks[m.path] for m in population.modules)
    assert changed_bytes(start, "a", "float32") == 4 * of_a
    assert changed_bytes(start, {"b"}, "bfloat16") == 2 * of_b
    assert changed_bytes(start, "ab", "float64") == 8 * (of_a + of_b)
    assert changed_bytes(start, "", "float32") == 0
    job = TrainJob(population.seed, 1, client, start, LocalPlan(train_a=False))
    assert seeded_bytes(job, "float32") == 4 * of_a
    assert seeded_bytes(replace(job, seed=population.seed + 1), "float32") == 0
    assert seeded_bytes(replace(job, plan=LocalPlan()), "float32") == 0
