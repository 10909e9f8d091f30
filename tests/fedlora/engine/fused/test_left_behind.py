"""Nothing of a call outlives it: neither in the model nor in later results."""

import itertools

import pytest
import torch

from fedlora.core.types import (
    EvaluateJob,
    EvaluatePlan,
    Failure,
    Update,
)
from fedlora.engine.fused import Fused
from tests.fedlora.engine.fused.harness import (
    PLAN,
    alone,
    assert_equal,
    by_client,
    engine,
    resident,
)
from tests.fedlora.engine.world import (
    SEED,
    FakeStore,
    client,
    examples,
    job,
    model,
    start,
    vector,
)


def test_results_outlive_their_slots():
    """At rank 1 a transposed row is contiguous, and a copy that is none would alias the bank."""
    store = FakeStore({k: examples(5, k) for k in range(5)})
    jobs = [job(start(resident("llama"), 1, k), PLAN, k) for k in range(5)]
    stream, seen = engine(store=store, slots=1).train(jobs), {}
    for update in stream:
        seen[update.client.id] = update, vector(update.payload).clone()
    assert all(torch.equal(vector(u.payload), copy) for u, copy in seen.values())
    storages = [
        {t.untyped_storage().data_ptr() for f in u.adapter.values() for t in (f.a, f.b)}
        for u, _ in seen.values()
    ]
    assert all(one.isdisjoint(two) for one, two in itertools.combinations(storages, 2))


def state(on):
    """Everything of a network that an engine might leave changed."""
    network = on.network
    return (
        {name: t.clone() for name, t in network.state_dict().items()},
        [(name, type(m), m.training) for name, m in network.named_modules()],
        network.config._attn_implementation,
        network.config.use_cache,
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()],
        [getattr(m, "gradient_checkpointing", None) for m in network.modules()],
    )


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was(on, layout, checkpoint):
    mine = model(on)
    store = FakeStore({k: examples(5, k) for k in range(4)}, {k: ["w1"] * 5 for k in range(4)})
    fused = Fused(tokens=60, layout=layout, checkpoint=checkpoint, reuse_memory=False)
    opened, before = fused.open(mine, store), state(mine)
    factors = start(mine)
    jobs = [job(factors, PLAN, k) for k in range(4)]
    measured = [EvaluateJob(SEED, 1, client(factors, k), factors, EvaluatePlan()) for k in range(4)]
    abandoned = opened.train(jobs)
    assert isinstance(next(abandoned), Update)
    abandoned.close()
    for work in ([], list(opened.train(jobs)), list(opened.evaluate(measured))):
        assert not any(isinstance(r, Failure) for r in work)
        after = state(mine)
        assert before[0].keys() == after[0].keys()
        assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
        assert after[1:4] == before[1:4] and after[4] == before[4]
        assert not any(after[5])
        assert not mine.parameters() and all(layer.update is None for layer in mine.layers.values())
        assert all(p.grad is None and not p.requires_grad for p in mine.network.parameters())


def test_two_streams_at_once_are_refused():
    """One network: a second stream mounted on it would train the wrong adapters."""
    store = FakeStore({k: examples(5, k) for k in range(4)})
    jobs = [job(start(resident("llama"), 2, k), PLAN, k) for k in range(4)]
    fused = engine(store=store, slots=1)
    first = fused.train(jobs)
    done = [next(first)]
    measured = EvaluateJob(SEED, 1, client(jobs[0].start), None, EvaluatePlan(generate=False))
    for second in (fused.train(jobs), fused.evaluate([measured])):
        with pytest.raises(RuntimeError, match="another stream"):
            next(second)
    updates, wanted = by_client([*done, *first]), alone(jobs, store)
    for k in range(4):
        assert_equal(updates[k], wanted[k])
