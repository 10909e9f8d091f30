"""Clients whose bases have moved train together with those who stand on the same one."""

import dataclasses

import pytest
import torch

from fedlora.core.types import Client, LocalPlan, Ranks, Setting, TrainJob
from fedlora.engine.sequential import SequentialEngine
from fedlora.techniques.rebased.payload import Rebased
from strategies.rebase import Rebase
from tests.fedlora.engine.fused.harness import PLAN, alone, assert_equal, resident, trained
from tests.fedlora.engine.world import FakeStore, examples, job, start
from tests.fedlora.models.networks import logits

SGD = LocalPlan(optimizer="sgd", lr=0.1, batch_size=3, dropout=0.0, steps=3)


def moved(on, seed: int, version: str = "") -> Rebased:
    """Factors over a base that differs from the model's own by random numbers."""
    g = torch.Generator().manual_seed(seed)
    shift = {
        m.path: 0.1 * torch.randn(m.d_out, m.d_in, generator=g, dtype=torch.float64)
        for m in on.info.modules
    }
    return Rebased(shift, start(on, 2, seed), version)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
@pytest.mark.parametrize("plan", [PLAN, SGD, dataclasses.replace(SGD, train_a=False, dropout=0.3)])
def test_every_client_trains_on_its_own_base(on, layout, plan):
    """Two moved bases and the model's own in one cohort; every other client shares one."""
    model = resident(on)
    before = logits(model.network)
    one, two, plain = moved(model, 1), moved(model, 2), start(model, 2, 3)
    store = FakeStore({k: examples(5, k) for k in range(6)})
    jobs = [job(begin, plan, k) for k, begin in enumerate([one, two, plain, one, two, plain])]
    wanted, updates = alone(jobs, store, on), trained(jobs, store, on, layout=layout)
    assert updates.keys() == wanted.keys()
    for k in wanted:
        assert_equal(updates[k], wanted[k], tolerance=1e-11)
        assert type(updates[k].payload) is type(wanted[k].payload)
        assert updates[k].metrics["fused"] == 1.0
    assert torch.equal(logits(model.network), before), "the model's own base has not moved"


@pytest.mark.parametrize("on", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "rule", [Rebase(), Rebase(hold="mean"), Rebase(hold="svd")], ids=["flora", "fedex", "svd"]
)
def test_starts_of_unequal_ranks_train_alike_on_both_engines(on, rule):
    """A base for each rank, if factors are held; float64."""
    model = resident(on)
    clients = tuple(
        Client(k, Ranks({m.path: 1 + k % 3 for m in model.info.modules}), 5) for k in range(6)
    )
    state = rule.init_state(Setting(model.info.modules, 1000, 6.0, clients, 3))
    state = {k: t.double() if t.dtype == torch.float32 else t for k, t in state.items()}
    store = FakeStore({k: examples(5, k) for k in range(6)})
    for t in range(2):
        jobs = [TrainJob(11, t, c, rule.client_start(state, c), SGD) for c in clients]
        wanted, updates = alone(jobs, store, on), trained(jobs, store, on)
        for k in wanted:
            assert_equal(updates[k], wanted[k])
        state = rule.aggregate(state, [wanted[k] for k in sorted(wanted)])
    bases = {j.start.base().version for j in jobs}
    assert len(bases) == (1 if rule.hold == "none" else 3)


def test_one_by_one_each_base_is_mounted_once(monkeypatch):
    """Clients on several bases come in any order, and every base's weights are made once."""
    model = resident("llama")
    bases = [moved(model, seed) for seed in (1, 2, 3)]
    store = FakeStore({k: examples(3, k) for k in range(9)})
    jobs = [job(bases[k % 3], SGD, k) for k in range(9)]
    made, right = [], type(model).kept

    def kept(self, kind, key, make, most):
        return right(self, kind, key, lambda: made.append(key) or make(), most)

    monkeypatch.setattr(type(model), "kept", kept)
    assert {r.client.id for r in SequentialEngine(model, store).train(jobs)} == set(range(9))
    assert len(made) == len(set(made)) <= 3


def test_a_version_names_equal_tensors():
    model = resident("llama")
    one, same, other = moved(model, 1), moved(model, 1), moved(model, 2)
    assert one.base().version == same.base().version != other.base().version
    assert moved(model, 1, "round 3").base().version == "round 3"


def test_the_weights_of_a_version_are_added_once():
    """Bit by bit ``W + shift``, however many clients stand on it; another version displaces it."""
    model = resident("llama")
    one, same, other = moved(model, 1), moved(model, 1), moved(model, 2)
    first = model.moved(one.base())
    for path, layer in model.layers.items():
        assert torch.equal(first[path], layer.base.weight + one.shift[path])
    assert model.moved(same.base()) is first
    model.moved(other.base())
    assert model.moved(one.base()) is not first
