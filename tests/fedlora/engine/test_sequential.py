"""The sequential engine: one result per job, failures contained, no trace of what ran before."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from fedlora.config import build
from fedlora.engine.base import EngineSpec
from fedlora.engine.sequential import Sequential, SequentialEngine
from fedlora.types import (
    EvaluateJob,
    EvaluatePlan,
    Evaluation,
    Failure,
    LocalPlan,
    SelfPrune,
    SparseDelta,
    Update,
)
from tests.fedlora.engine.world import (
    SEED,
    FakeStore,
    client,
    example,
    examples,
    job,
    model,
    start,
    vector,
)

PLAN = LocalPlan(lr=3e-3, batch_size=3, dropout=0.3, epochs=2)


def store(n=4):
    return FakeStore({k: examples(5 + k, seed=k) for k in range(n)})


@pytest.fixture
def engine() -> SequentialEngine:
    return SequentialEngine(model(), store())


def updates(results) -> dict[int, torch.Tensor]:
    found = list(results)
    assert all(isinstance(r, Update) for r in found), found
    return {r.client.id: vector(r.payload) for r in found}


def test_results_do_not_depend_on_what_ran_before_or_in_which_order(engine):
    jobs = [job(start(engine.model, 1 + k), PLAN, k) for k in range(4)]
    together = updates(engine.train(jobs))
    backwards = updates(engine.train(jobs[::-1]))
    for k in range(4):
        alone = updates(SequentialEngine(model(), store()).train([jobs[k]]))
        assert torch.equal(together[k], alone[k])
        assert torch.equal(together[k], backwards[k])


@pytest.mark.parametrize("fault", ["diverges", "no examples", "wrong shape", "raises midway"])
def test_a_failing_client_harms_nobody(engine, monkeypatch, fault):
    factors = start(engine.model)
    jobs = [job(factors, PLAN, k) for k in range(3)]
    wanted = updates(engine.train(jobs))
    bad = jobs[1]
    if fault == "diverges":
        bad = dataclasses.replace(bad, plan=dataclasses.replace(PLAN, lr=1e200, clip=0.0))
    elif fault == "no examples":
        engine.store.held[1] = []
    elif fault == "wrong shape":
        bad = dataclasses.replace(bad, start={**factors, "nowhere": next(iter(factors.values()))})
    else:
        engine.store.held[1] = [*engine.store.held[1], example([1, 10**6, 0])]
    results = list(engine.train([jobs[0], bad, jobs[2]]))
    assert [r.client.id for r in results] == [0, 1, 2]
    failure = results[1]
    assert isinstance(failure, Failure)
    assert failure.kind and failure.message and failure.kind in failure.traceback
    for i in (0, 2):
        assert torch.equal(vector(results[i].payload), wanted[i])
    assert not engine.model.factors()
    assert all(p.grad is None for p in engine.model.network.parameters())


def test_failures_say_what_a_person_needs(engine):
    engine.store.held[1] = []
    engine.store.held[2] = [example([1, 2, 3], prompt_tokens=3)]
    factors = start(engine.model)
    plans = {
        1: PLAN,
        2: dataclasses.replace(PLAN, loss="response"),
        3: dataclasses.replace(PLAN, train_a=False, train_b=False),
    }
    found = {r.client.id: r for r in engine.train([job(factors, p, k) for k, p in plans.items()])}
    assert "client 1 has nothing to train on: 0 training examples" in found[1].message
    assert "1 training examples" in found[2].message and "loss=response" in found[2].message
    assert "train_a and train_b" in found[3].message


def test_pruning_a_sparse_update_is_refused(engine):
    path = engine.model.info.modules[0].path
    delta = SparseDelta(0, 0.0, {path: torch.zeros(0, dtype=torch.float64)})
    plan = dataclasses.replace(PLAN, self_prune=SelfPrune(0.0, 0.5, 1))
    (result,) = engine.train([job(delta, plan)])
    assert isinstance(result, Failure) and "SparseDelta" in result.message


def test_results_come_as_they_finish(engine):
    jobs = [job(start(engine.model), PLAN, k) for k in range(2)]
    stream = engine.train(jobs)
    assert next(stream).client.id == 0
    assert next(stream).client.id == 1


def test_evaluation_gives_one_result_per_job_and_leaves_nothing_mounted(engine):
    factors = start(engine.model)
    plan = EvaluatePlan(generate=False)
    engine.store.held[2] = []
    jobs = [
        EvaluateJob(SEED, 1, client(factors, k), payload, plan)
        for k, payload in [(0, None), (1, factors), (2, factors)]
    ]
    first, second, third = engine.evaluate(jobs)
    assert isinstance(first, Evaluation) and isinstance(second, Evaluation)
    assert isinstance(third, Failure) and "no examples in split 'test'" in third.message
    assert not engine.model.factors()


def test_the_configuration_opens_the_engine():
    raw = yaml.safe_load(Path("conf/engine/sequential.yaml").read_text())
    spec = build(raw, EngineSpec, "engine")  # type: ignore[type-abstract]
    before = torch.get_num_threads()
    try:
        opened = spec.open(model(), store())
        assert isinstance(opened, SequentialEngine)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match=r"engine\.threads=-1"):
        Sequential(threads=-1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_configured_plan_names_every_field(name):
    raw = yaml.safe_load(Path(f"conf/client/{name}.yaml").read_text())
    plan = build(raw, LocalPlan, "client")
    assert plan.optimizer == name
    assert set(raw) - {"_target_"} == {f.name for f in dataclasses.fields(LocalPlan)}
