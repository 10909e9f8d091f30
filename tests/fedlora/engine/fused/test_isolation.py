"""A client's data, plan or failure changes no other client's result."""

import dataclasses
import logging

import pytest

from fedlora.core.types import (
    Factors,
    Failure,
    TrainJob,
    Update,
)
from fedlora.engine.fused.model import FusedModel
from tests.fedlora.engine.fused.harness import (
    PLAN,
    alone,
    assert_equal,
    by_client,
    engine,
    mixed,
    resident,
    trained,
)
from tests.fedlora.engine.world import (
    FakeStore,
    distance,
    example,
    examples,
    job,
    start,
)
from tests.fedlora.models.networks import VOCABULARY, same


def variant(what: str, bad: TrainJob, store: FakeStore) -> TrainJob:
    """Client 1, changed: of the same shapes unless ``what`` says otherwise."""
    plan, factors = bad.plan, dict(bad.start)
    path = next(iter(factors))
    if what == "data":
        store.held[1] = [
            example([(7 * t + 3) % VOCABULARY for t in e.input_ids.tolist()], e.prompt_tokens)
            for e in store.held[1]
        ]
    elif what == "lengths":
        store.held[1] = examples(6, 77, longest=30)
    elif what in ("nan", "inf"):
        f = factors[path]
        a = f.a.clone()
        a[0, 0] = float(what)
        factors[path] = Factors(a, f.b, f.alpha)
    elif what == "rank":
        factors = start(resident("llama"), 5, seed=1)
    elif what == "diverges":
        plan = dataclasses.replace(plan, lr=1e200, max_grad_norm=0.0)
    elif what == "lr":
        plan = dataclasses.replace(plan, lr=0.5)
    return job(factors, plan, 1)


@pytest.mark.parametrize(
    "what", ["data", "lengths", "nan", "inf", "rank", "diverges", "lr", "gone"]
)
@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_a_client_changes_no_other_clients_result(what, layout, products):
    """Sequences of different length: attention has pads, and a NaN beside them."""
    held = {k: examples(6, k, longest=9 + 5 * k) for k in range(4)}
    jobs = [
        job(start(resident("llama"), 2, k), dataclasses.replace(PLAN, dropout=0.2), k)
        for k in range(4)
    ]
    spec = {"layout": layout, "tokens": 250, "slots": 4}
    wanted = trained(jobs, FakeStore(dict(held)), **spec)
    store = FakeStore(dict(held))
    others = [jobs[0], *([] if what == "gone" else [variant(what, jobs[1], store)]), *jobs[2:]]
    results = {r.client.id: r for r in engine(store=store, **spec).train(others)}
    fixed = what in ("data", "nan", "inf", "diverges", "lr")
    for k in (0, 2, 3):
        got, want = results[k], wanted[k]
        assert isinstance(got, Update), got
        if fixed:
            assert same(got.adapter, want.adapter)
            assert got.metrics["loss"] == want.metrics["loss"]
        else:
            assert_equal(got, dataclasses.replace(want, metrics=plain(want)))
    if what in ("nan", "inf", "diverges"):
        assert isinstance(results[1], Failure) and results[1].kind == "FloatingPointError"


def plain(update: Update) -> dict[str, float]:
    return {name: x for name, x in update.metrics.items() if name != "fused"}


def test_a_client_that_raises_in_a_fused_step_changes_no_other_client(monkeypatch, caplog):
    """The rest of that step is trained one by one, and the engine says so."""
    store = FakeStore({k: examples(5, k) for k in range(6)})
    jobs = [job(start(resident("llama"), mixed, k), PLAN, k) for k in range(6)]
    wanted = alone(jobs, store)
    honest, calls = FusedModel.backward, []

    def failing(self, batch):
        calls.append(len(batch.lanes))
        losses = honest(self, batch)  # the bank holds gradients by now
        if len(calls) == 2:
            raise RuntimeError("no memory left")
        return losses

    monkeypatch.setattr(FusedModel, "backward", failing)
    fused = engine(store=store)
    with caplog.at_level(logging.WARNING):
        updates = by_client(fused.train(jobs))
    assert "no memory left" in caplog.text
    assert any("one by one" in note for note in fused.notes())
    rescued = [k for k in updates if "fused" not in updates[k].metrics]
    assert 1 <= len(rescued) == calls[1] < 6
    for k in range(6):
        assert distance(updates[k].adapter, wanted[k].adapter) <= 1e-11


@pytest.mark.parametrize("reading", [1, 2])
def test_data_that_cannot_be_read_fail_their_own_client_alone(reading):
    """The second reading is when the client's turn has come."""
    held = {k: examples(5, k) for k in range(5)}

    class Broken(FakeStore):
        reads = 0

        def examples(self, client, split):
            self.reads += client == 3
            if client == 3 and self.reads == reading:
                raise OSError("the disk is gone")
            return super().examples(client, split)

    jobs = [job(start(resident("llama"), 2, k), PLAN, k) for k in range(5)]
    wanted = alone(jobs, FakeStore(held))
    results = {r.client.id: r for r in engine(store=Broken(held)).train(jobs)}
    assert isinstance(results[3], Failure) and "the disk is gone" in results[3].message
    for k in (0, 1, 2, 4):
        assert_equal(results[k], wanted[k])
