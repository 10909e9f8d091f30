"""What every engine owes: one result per job, and a failure that stays with its client."""

import dataclasses
import logging
import re

import pytest
import torch
from omegaconf import OmegaConf

from fedlora.core.config import build
from fedlora.core.types import (
    EvaluateJob,
    EvaluatePlan,
    Evaluation,
    Factors,
    Failure,
    LocalPlan,
    Update,
)
from fedlora.engine.base import Engine, EngineSpec
from fedlora.engine.fused import Auto, Fused
from fedlora.engine.sequential import Sequential, SequentialEngine
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import LoRA
from fedlora.techniques.sparse.payload import SparseDelta
from simulations.app.compose import load
from tests.fedlora.engine.world import (
    SEED,
    FakeStore,
    client,
    distance,
    example,
    examples,
    job,
    model,
    start,
)

PLAN = LocalPlan(lr=3e-4, batch_size=3, dropout=0.3, epochs=2)
ENGINES = {
    "sequential": Sequential(reuse_memory=False),
    "ragged": Fused(tokens=90, slots=3, layout="ragged", reuse_memory=False),
    "padded": Fused(tokens=90, slots=3, layout="padded", reuse_memory=False),
    "auto": Auto(tokens=90, slots=3, layout="ragged", reuse_memory=False),
}


@pytest.fixture(params=ENGINES)
def engine(request) -> Engine:
    held = {k: examples(5 + k, seed=k) for k in range(6)}
    return ENGINES[request.param].open(model(), FakeStore(held, {k: ["w1"] * 11 for k in held}))


def updates(results) -> dict[int, Update]:
    found = {r.client.id: r for r in results}
    assert all(isinstance(r, Update) for r in found.values()), found
    return found


FAULTS = {
    "diverges": "loss is nan|not finite",
    "no examples": "client 1 has nothing to train on: 0 training examples",
    "nothing supervised": "client 1 has nothing to train on: 1 training examples.*loss=response",
    "unknown module": "'nowhere', which is not an adapted module",
    "wrong shape": r"transformer.h.0.attn.c_attn: A \(2, 15\)",
    "rank beyond the layer": r"transformer.h.0.attn.c_attn: rank 17 is not in 1\.\.16",
    "unknown token": "",
    "negative token": "",
    "empty adapter": "client 1 was sent an empty adapter",
}


def spoiled(fault: str, engine: Engine, factors):
    """Client 1's job with something wrong with it."""
    plan, store = PLAN, engine.store
    path, f = next(iter(factors.items()))
    if fault == "diverges":
        plan = dataclasses.replace(PLAN, lr=1e200, max_grad_norm=0.0)
    elif fault == "no examples":
        store.held[1] = []
    elif fault == "nothing supervised":
        store.held[1] = [example([1, 2, 3], prompt_tokens=3)]
        plan = dataclasses.replace(PLAN, loss="response")
    elif fault == "unknown token":
        store.held[1] = [*store.held[1], example([1, 10**6, 0])]
    elif fault == "negative token":
        store.held[1] = [*store.held[1], example([1, -3, 0])]
    elif fault == "unknown module":
        factors = LowRankPayload({**factors, "nowhere": f})
    elif fault == "wrong shape":
        factors = LowRankPayload({**factors, path: Factors(f.a[:, 1:], f.b, f.alpha)})
    elif fault == "rank beyond the layer":
        a, b = torch.ones(17, f.a.shape[1]), torch.ones(f.b.shape[0], 17)
        factors = LowRankPayload({**factors, path: Factors(a.double(), b.double(), f.alpha)})
    else:
        factors = LowRankPayload({})
    return dataclasses.replace(job(factors or LowRankPayload({path: f}), plan, 1), start=factors)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_client_harms_nobody_and_says_why(engine, fault, caplog):
    factors = start(engine.model)
    jobs = [job(factors, PLAN, k) for k in range(4)]
    wanted = updates(engine.train([jobs[0], jobs[2], jobs[3]]))
    bad = spoiled(fault, engine, factors)
    with caplog.at_level(logging.WARNING):
        results = {r.client.id: r for r in engine.train([jobs[0], bad, *jobs[2:]])}
    assert sorted(results) == [0, 1, 2, 3]
    failure = results.pop(1)
    assert isinstance(failure, Failure)
    assert failure.kind and failure.message and failure.kind in failure.traceback
    assert re.search(FAULTS[fault], failure.message), failure.message
    for k, update in updates(results.values()).items():
        close = 1e-12 * update.metrics["delta_norm"]
        assert distance(update.adapter, wanted[k].adapter) <= close
    assert not caplog.records  # no fused step had to fail first
    assert not engine.model.parameters()
    assert all(p.grad is None for p in engine.model.network.parameters())


def test_pruning_a_sparse_update_is_refused(engine):
    path = engine.model.info.modules[0].path
    delta = SparseDelta(0, 0.0, {path: torch.zeros(0, dtype=torch.float64)})
    plan = dataclasses.replace(PLAN, technique=LoRA(SelfPrune(0.0, 0.5, 1)))
    (result,) = engine.train([job(delta, plan)])
    assert isinstance(result, Failure) and "SparseDelta" in result.message


def test_evaluation_gives_one_result_per_job_and_leaves_nothing_mounted(engine):
    factors = start(engine.model)
    plan = EvaluatePlan(max_new_tokens=3)
    engine.store.held[2] = []
    engine.store.held[4] = [*engine.store.held[4], example([1, 10**6, 0])]
    payloads = [
        None,
        factors,
        factors,
        LowRankPayload({**factors, "nowhere": next(iter(factors.values()))}),
        factors,
        factors,
    ]
    jobs = [EvaluateJob(SEED, 1, client(factors, k), p, plan) for k, p in enumerate(payloads)]
    found = {r.client.id: r for r in engine.evaluate(jobs)}
    assert sorted(found) == list(range(6))
    assert all(isinstance(found[k], Evaluation) for k in (0, 1, 5)), found
    assert all(isinstance(found[k], Failure) for k in (2, 3, 4))
    assert "no examples in split 'test'" in found[2].message
    assert "'nowhere'" in found[3].message
    assert not engine.model.parameters()


def test_nothing_to_do_is_done(engine):
    assert list(engine.train([])) == [] and list(engine.evaluate([])) == []


@pytest.mark.parametrize("name", ["sequential", "fused", "auto"])
def test_the_configuration_opens_the_engine(name):
    raw = OmegaConf.to_container(load([f"engine={name}"]).engine)
    spec = build(raw, EngineSpec, "engine")  # type: ignore[type-abstract]
    assert set(raw) - {"_target_"} == {f.name for f in dataclasses.fields(spec)}
    before = torch.get_num_threads()
    try:
        opened = spec.open(model(), FakeStore({}))
        assert isinstance(opened, SequentialEngine) == (name == "sequential")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match=r"engine\.threads=-1"):
        dataclasses.replace(spec, threads=-1)
