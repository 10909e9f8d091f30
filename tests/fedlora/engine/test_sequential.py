"""The sequential engine: results in order, bitwise, with no trace of what ran before."""

import dataclasses

import pytest
import torch
from omegaconf import OmegaConf

from fedlora.core.config import build
from fedlora.core.types import LocalPlan, Update
from fedlora.engine.sequential import SequentialEngine
from simulations.app.compose import load
from tests.fedlora.engine.world import FakeStore, examples, job, model, start, vector

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


def test_results_come_as_they_finish(engine):
    jobs = [job(start(engine.model), PLAN, k) for k in range(2)]
    stream = engine.train(jobs)
    assert next(stream).client.id == 0
    assert next(stream).client.id == 1


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_configured_plan_names_every_field(name):
    raw = OmegaConf.to_container(load([f"client={name}"]).client)
    plan = build(raw, LocalPlan, "client")
    assert plan.optimizer == name
    assert set(raw) - {"_target_"} == {f.name for f in dataclasses.fields(LocalPlan)}
