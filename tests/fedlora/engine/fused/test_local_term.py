"""A local term in the fused engine is that of the sequential one."""

import dataclasses

import pytest
import torch

from fedlora.core.types import Factors
from fedlora.techniques.lora.corrected import CorrectedPayload
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.training.terms import Correction, FedProx
from tests.fedlora.engine.fused.harness import (
    ADAMW,
    SGD,
    alone,
    assert_equal,
    mixed,
    resident,
    trained,
)
from tests.fedlora.engine.world import FakeStore, distance, examples, job, start, vector

PLANS = (
    dataclasses.replace(ADAMW, steps=6, lr=1e-3),
    dataclasses.replace(SGD, steps=6, lr=0.05, dropout=0.2),
    dataclasses.replace(SGD, steps=6, lr=0.05, train_a=False),
    dataclasses.replace(ADAMW, steps=6, train_b=False, micro_batch_size=2),
    dataclasses.replace(ADAMW, steps=6, max_grad_norm=0.0),
)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("metric", ["factor", "product"])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_clients_are_those_of_the_sequential_engine(on, metric, layout, products):
    """Unequal ranks, frozen factors, clients with and without a term in one step."""
    store = FakeStore({k: examples(6, k) for k in range(6)})
    plans = [dataclasses.replace(plan, term=FedProx(2.0, metric)) for plan in PLANS]
    jobs = [job(start(resident(on), mixed, k), plan, k) for k, plan in enumerate(plans)]
    jobs.append(job(start(resident(on), mixed, 5), PLANS[0], 5))
    wanted, updates = alone(jobs, store, on), trained(jobs, store, on, layout=layout)
    for k in wanted:
        assert_equal(updates[k], wanted[k])


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_corrections_are_those_of_the_sequential_engine(on, layout, products):
    """Each client's own, with and without a proximal term, beside a client without."""
    store = FakeStore({k: examples(6, k) for k in range(6)})
    plans = [
        dataclasses.replace(plan, term=Correction(2.0 * (k % 2))) for k, plan in enumerate(PLANS)
    ]

    def corrected(k):
        factors = start(resident(on), mixed, k)
        drawn = start(resident(on), mixed, 100 + k)
        g = {p: Factors(0.1 * f.a, 0.1 * f.b, f.alpha) for p, f in drawn.items()}
        return CorrectedPayload(factors, g)

    jobs = [job(corrected(k), plan, k) for k, plan in enumerate(plans)]
    jobs.append(job(start(resident(on), mixed, 5), PLANS[0], 5))
    wanted, updates = alone(jobs, store, on), trained(jobs, store, on, layout=layout)
    for k in wanted:
        assert type(updates[k].payload) is type(wanted[k].payload) is LowRankPayload
        assert_equal(updates[k], wanted[k])
    free = alone([job(corrected(0), dataclasses.replace(plans[0], term=None), 0)], store, on)
    assert distance(free[0].adapter, wanted[0].adapter) > 1e-3


def test_clients_of_one_start_are_pulled_to_it_and_leave_it_alone(products):
    """Their start is one row in memory for all of them."""
    store = FakeStore({k: examples(6, k) for k in range(5)})
    factors = start(resident("llama"), 2, 1)
    before = vector(factors).clone()
    plan = dataclasses.replace(SGD, steps=8, lr=0.02, max_grad_norm=0.0, term=FedProx(20.0))
    free = dataclasses.replace(plan, term=None)
    pulled, wanted, far = (
        run([job(factors, p, k) for k in range(5)], store)
        for run, p in ((trained, plan), (alone, plan), (trained, free))
    )
    for k in range(5):  # rounding is that of the factors, and the client hardly moves
        assert_equal(pulled[k], wanted[k], tolerance=1e-11)
        assert distance(pulled[k].adapter, factors) < 0.7 * distance(far[k].adapter, factors)
    assert torch.equal(vector(factors), before)


@pytest.mark.parametrize("metric", ["factor", "product"])
def test_no_weight_is_no_term(metric, products):
    store = FakeStore({k: examples(6, k) for k in range(4)})
    plans = [PLANS[0], dataclasses.replace(PLANS[0], term=FedProx(0.0, metric))]
    none, zero = (
        trained([job(start(resident("llama"), mixed, k), plan, k) for k in range(4)], store)
        for plan in plans
    )
    for k in range(4):
        assert torch.equal(vector(none[k].payload), vector(zero[k].payload))
