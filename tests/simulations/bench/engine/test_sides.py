"""All sides of the engine benchmark train the same thing, before anybody asks how fast."""

from dataclasses import replace

import numpy as np
import pytest

from fedlora.core.types import LocalPlan
from fedlora.engine.fused import Fused
from simulations.bench.engine.cases import (
    Case,
    Draw,
    Memory,
    World,
    fed,
    real_tokens,
    sample,
    steps,
)
from simulations.bench.engine.hosts import Group, hosts
from simulations.bench.engine.measure import (
    TOLERANCE,
    cohort_of,
    differences,
)
from simulations.bench.engine.sides import (
    ENGINES,
    REFERENCES,
    open_side,
)

PLAN = LocalPlan(lr=2e-3, batch_size=2, dropout=0.0)
CASE = Case("test", "llama32x2", 5, PLAN, Draw(4, 20), Draw(2, 5, median=3), ranks=(1, 2, 5))
CASES = {
    "unequal": CASE,
    "response": replace(CASE, plan=replace(PLAN, loss="response")),
    "steps": replace(CASE, plan=replace(PLAN, steps=4, batch_size=3)),
    "no clipping": replace(CASE, plan=replace(PLAN, max_grad_norm=0.0, weight_decay=0.1)),
}


def outcomes(side, case):
    world = World(case)
    return list(open_side(side, world).train(world.jobs))


@pytest.mark.parametrize(
    "side",
    [pytest.param("trainer", marks=pytest.mark.slow), "sequential", "padded", "ragged"],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_trains_what_the_peft_loop_trains(side, case):
    engine = ENGINES.get(side)
    if isinstance(engine, Fused):
        engine = replace(engine, tokens=64)  # several steps
    world = World(case)
    found = list(open_side(engine or side, world).train(world.jobs))
    loss, adapter = differences(world.jobs, found, outcomes("peft loop", case))
    assert sorted(o.client for o in found) == list(range(case.clients))
    assert all(o.losses for o in found)
    assert loss <= TOLERANCE["float32"][0]
    assert adapter <= TOLERANCE["float32"][1]


def test_a_side_that_trains_something_else_is_seen():
    other = replace(CASE, plan=replace(PLAN, lr=PLAN.lr * 1.2))
    jobs = World(CASE).jobs
    _, adapter = differences(jobs, outcomes("peft loop", other), outcomes("peft loop", CASE))
    assert adapter > TOLERANCE["float32"][1]


@pytest.mark.slow
def test_two_processes_deal_the_clients_and_change_nothing():
    world = World(CASE)
    cohort = cohort_of(world)
    with hosts(CASE, {"sequential": 2}) as opened:
        run = Group(opened["sequential"]).train(cohort.jobs, cohort.weights)
    alone = {o.client: o for o in outcomes("sequential", CASE)}
    assert sorted(o.client for o in run.outcomes) == list(range(CASE.clients))
    for outcome in run.outcomes:
        assert np.array_equal(outcome.row, alone[outcome.client].row)


@pytest.mark.slow
def test_a_process_that_cannot_open_its_side_says_why():
    broken = replace(CASE, network="llama32xtwo")
    with pytest.raises(RuntimeError, match="invalid literal"), hosts(broken, {"sequential": 1}):
        pass


def test_every_side_has_a_name():
    assert not set(REFERENCES) & set(ENGINES)


def test_more_clients_keep_the_data_of_the_first_ones():
    few, many = (Memory(replace(CASE, clients=k), 256) for k in (2, 5))
    for client in range(2):
        pairs = zip(few.examples(client, "train"), many.examples(client, "train"), strict=True)
        assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in pairs)


def test_work_is_counted_as_the_steps_have_it():
    world = World(CASES["steps"])
    for job in world.jobs:
        chosen = steps(job, world.store)
        assert len(chosen) == 4
        assert real_tokens(job, world.store) == sum(len(e.input_ids) - 1 for b in chosen for e in b)
        assert all(f.supervised == f.tokens for batch in fed(job, world.store) for f in batch)


def test_a_sample_stands_for_all():
    world = World(replace(CASE, clients=40))
    weights = [real_tokens(j, world.store) for j in world.jobs]
    chosen = sample(world.jobs, weights, 10)
    assert len({j.client.id for j in chosen}) == 10
    part = [real_tokens(j, world.store) for j in chosen]
    assert np.mean(part) == pytest.approx(np.mean(weights), rel=0.1)
    assert sample(world.jobs, weights, 0) == world.jobs
