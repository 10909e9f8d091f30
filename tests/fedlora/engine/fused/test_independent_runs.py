"""The fused engine against independent runs of PEFT."""

import dataclasses
import functools

import pytest

from fedlora.core.types import (
    LocalPlan,
)
from tests.fedlora.engine.fused.harness import (
    ADAMW,
    EXACT,
    SGD,
    mixed,
    resident,
    trained,
)
from tests.fedlora.engine.peft_loop import reference
from tests.fedlora.engine.world import (
    FakeStore,
    distance,
    examples,
    job,
    start,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One client of a population."""

    plan: LocalPlan
    rank: object = 2
    n: int = 7
    longest: int = 12
    every: int = 1
    """Its adapter has every so-manieth module."""

    def start(self, on: str, id: int):
        factors = start(resident(on), self.rank, seed=id)
        return {p: factors[p] for p in list(factors)[:: self.every]}

    def held(self, id: int):
        return examples(self.n, seed=id, longest=self.longest)


POPULATIONS = {
    "llama": (
        Case(ADAMW, mixed),
        Case(dataclasses.replace(ADAMW, lr=2e-3, schedule="cosine", steps=23), mixed, n=4),
        Case(dataclasses.replace(SGD, max_grad_norm=0.0, loss="response", batch_size=1), 4),
        Case(dataclasses.replace(ADAMW, batch_size=4, micro_batch_size=3, warmup=0.2), 3),
        Case(dataclasses.replace(ADAMW, dropout=0.3, schedule="constant"), mixed, n=6),
        Case(dataclasses.replace(SGD, train_a=False, dropout=0.2), 3),
        Case(dataclasses.replace(ADAMW, train_b=False, loss="response"), 3, longest=30),
        Case(dataclasses.replace(SGD, micro_batch_size=1), 1, every=3),
    ),
    "gpt2": (
        Case(dataclasses.replace(ADAMW, dropout=0.3), mixed),
        Case(dataclasses.replace(ADAMW, dropout=0.3, loss="response", epochs=9, steps=0), mixed),
        Case(dataclasses.replace(SGD, micro_batch_size=2, steps=21), 4, n=9, longest=25),
        Case(dataclasses.replace(ADAMW, weight_decay=0.0), 2, every=2),
    ),
}


@functools.cache
def independent(on: str):
    """What PEFT makes of each client of a population."""
    return [
        reference(on, case.start(on, k), case.plan, case.held(k), client=k)
        for k, case in enumerate(POPULATIONS[on])
    ]


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("on", POPULATIONS)
def test_clients_are_those_of_independent_peft_runs(on, layout, products):
    population = POPULATIONS[on]
    store = FakeStore({k: case.held(k) for k, case in enumerate(population)})
    jobs = [job(case.start(on, k), case.plan, k) for k, case in enumerate(population)]
    updates = trained(jobs, store, on, layout=layout)
    for k, (wanted, losses) in enumerate(independent(on)):
        assert len(losses) >= 20
        moved, metrics = distance(wanted, jobs[k].start), updates[k].metrics
        assert moved > 1e-2
        assert distance(updates[k].adapter, wanted) <= EXACT * moved, population[k]
        assert metrics["steps"] == len(losses)
        assert metrics["loss_first"] == pytest.approx(losses[0], rel=EXACT)
        assert metrics["loss_last"] == pytest.approx(losses[-1], rel=EXACT)
