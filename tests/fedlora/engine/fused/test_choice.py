"""Rank indices that are chosen in common forward passes are those of the sequential engine."""

import dataclasses

import pytest
import torch

from fedlora.core.types import Failure
from fedlora.engine import choice
from fedlora.engine.fused import trainer
from fedlora.engine.fused.bank import Layout
from fedlora.engine.sequential import Sequential
from fedlora.techniques.rebased.payload import Rebased
from fedlora.training.choice import LargestChange
from fedlora.training.terms import FedProx
from tests.fedlora.engine.fused.harness import alone, assert_equal, engine, mixed, resident, trained
from tests.fedlora.engine.fused.test_classification import fused as fused_classifier
from tests.fedlora.engine.test_choice import PLANS, Drawn, assert_still, with_choice
from tests.fedlora.engine.test_classification import with_head
from tests.fedlora.engine.world import FakeStore, examples, job, start, vector
from tests.fedlora.models.classifiers import classifier
from tests.fedlora.models.classifiers import examples as labelled
from tests.fedlora.models.networks import adapter
from tests.planted import planted

STORE = FakeStore({k: examples(6, k) for k in range(7)})
CHOICES = (LargestChange(5), Drawn(), LargestChange(20), LargestChange(3))
JOBS = [
    *(with_choice(plan, chosen) for plan, chosen in zip(PLANS, CHOICES, strict=True)),
    dataclasses.replace(with_choice(PLANS[1], LargestChange(9)), term=FedProx(2.0, "product")),
    PLANS[0],
]


def jobs(on):
    return [job(start(resident(on), mixed, k), plan, k) for k, plan in enumerate(JOBS)]


def assert_alike(got, wanted, plans=JOBS):
    for k, update in wanted.items():
        assert got[k].payload.indices == update.payload.indices
        spent = {"probe_seconds": got[k].metrics.get("probe_seconds", 0.0)}
        timed = dataclasses.replace(update, metrics={**update.metrics, **spent})
        if plans[k].choice is None or not isinstance(plans[k].choice, LargestChange):
            timed = update
        assert_equal(got[k], timed)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_clients_are_those_of_the_sequential_engine(on, layout, products):
    """Unequal ranks, choices of several kinds, a local term, and a client that trains all."""
    asked = jobs(on)
    got, wanted = trained(asked, STORE, on, layout=layout), alone(asked, STORE, on)
    assert_alike(got, wanted)
    for j in asked:
        if j.plan.choice is not None:
            assert_still(got[j.client.id], j.start, j.plan)


def test_clients_of_one_start_choose_each_for_itself():
    factors = start(resident("llama"), 3, 1)
    before = vector(factors).clone()
    plans = [with_choice(PLANS[0], LargestChange(4 + k)) for k in range(6)]
    asked = [job(factors, plan, k) for k, plan in enumerate(plans)]
    got = trained(asked, STORE)
    assert_alike(got, alone(asked, STORE), plans)
    assert torch.equal(vector(factors), before)
    assert len({str(u.payload.indices) for u in got.values()}) == 6
    for k in range(6):
        assert sum(map(len, got[k].payload.indices.values())) == 4 + k


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_classifiers_with_a_head_choose_alike(family):
    on = classifier(family)
    store = FakeStore({k: labelled(7, seed=k) for k in range(3)})
    plan = dataclasses.replace(with_choice(PLANS[0], LargestChange(6)), dropout=0.1)
    asked = [job(with_head(on, adapter(on.info.modules, 3, seed=k)), plan, k) for k in range(3)]
    got = {u.client.id: u for u in fused_classifier().open(on, store).train(asked)}
    wanted = {u.client.id: u for u in Sequential().open(on, store).train(asked)}
    for k, update in wanted.items():
        assert got[k].metrics["fused"] == 1
        assert got[k].payload.indices == update.payload.indices
        begun, moved = asked[k].start.values, update.payload.values
        assert all(bool((moved[n] != t).any()) for n, t in begun.items())
        assert float((vector(got[k].payload) - vector(update.payload)).norm()) < 1e-11


def test_clients_of_a_moved_base_choose_alike():
    on = resident("llama")
    g = torch.Generator().manual_seed(1)
    shift = {m.path: 0.01 * torch.randn(m.d_out, m.d_in, generator=g) for m in on.info.modules}
    shift = {path: t.double() for path, t in shift.items()}
    plan = with_choice(PLANS[1], LargestChange(6))
    asked = [job(start(on, 3, k), plan, k) for k in range(3)]
    asked = [dataclasses.replace(j, start=Rebased(shift, j.start)) for j in asked]
    got = trained(asked, STORE)
    assert_alike(got, alone(asked, STORE), [plan] * 3)
    for j in asked:
        assert_still(got[j.client.id], j.start.factors, plan)


def test_one_client_that_cannot_choose_costs_itself_alone():
    asked = jobs("llama")
    asked[0] = dataclasses.replace(asked[0], client=dataclasses.replace(asked[0].client, id=6))
    store = FakeStore({**STORE.held, 6: []})
    found = {r.client.id: r for r in engine("llama", store).train(asked)}
    assert isinstance(found.pop(6), Failure)
    assert_alike(found, alone(asked[1:], store))


FAULTS = [
    (trainer.Resident._masks, "chosen is None", "True"),
    (Layout.mask, "(0, at, True)", "(0, at * 0, True)"),
    (Layout.mask, "for factor in pair", "for factor in pair[:1]"),
    (choice.decided, "Chosen(indices, spent)", "Chosen(indices, {})"),
    (choice.decided, "replace(job, chosen", "replace(job, plan=probe_of(job).plan, chosen"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0].__qualname__}: {f[2]}")
def test_faults_are_noticed(fault):
    asked = jobs("gpt2")[:2]
    wanted = alone(asked, STORE, "gpt2")
    with planted(*fault), pytest.raises(AssertionError):
        assert_alike(trained(asked, STORE, "gpt2"), wanted)


def test_a_head_left_out_of_the_choice_is_noticed():
    with (
        planted(Layout.mask, "found[self.head_at :] = True", "pass"),
        pytest.raises(AssertionError),
    ):
        test_classifiers_with_a_head_choose_alike("bert")
