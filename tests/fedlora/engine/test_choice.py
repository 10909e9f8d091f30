"""Rank indices that are chosen train as alone in the world, and all others keep every bit."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from fedlora.core.choice import IndexChoice, Indices
from fedlora.core.seeding import generator
from fedlora.core.types import Adapter, Expected, Factors, Failure, LocalPlan, TrainJob, Update
from fedlora.engine.sequential import SequentialEngine
from fedlora.models.headed import WithHead
from fedlora.server.claims import wrong_training
from fedlora.techniques.cores.payload import CorePayload
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.training import flat, loop
from fedlora.training.choice import LargestChange, index_scores
from fedlora.wire.codec import update_bytes
from fedlora.wire.messages import decode_jobs, decode_results, encode_jobs, encode_results
from tests.fedlora.engine.fused.harness import ADAMW, SGD, mixed
from tests.fedlora.engine.peft_loop import reference
from tests.fedlora.engine.test_classification import with_head
from tests.fedlora.engine.world import FakeStore, distance, examples, job, model, start
from tests.fedlora.models.classifiers import classifier
from tests.fedlora.models.classifiers import examples as labelled
from tests.fedlora.models.networks import adapter
from tests.planted import planted


@dataclass(frozen=True)
class Drawn(IndexChoice):
    """About a part of each module's rank indices, drawn from the job's seed: no probe."""

    part: float = 0.5

    def count(self, start: Adapter) -> int:
        return sum(round(self.part * f.rank) for f in start.values())

    def choose(self, job: TrainJob, probed: Adapter | None) -> Indices:
        assert probed is None
        factors = job.start.low_rank()
        assert factors is not None
        found = {}
        for path, f in factors.items():
            drawn = generator(job.seed, path, job.round, job.client.id).permutation(f.rank)
            found[path] = tuple(sorted(drawn[: round(self.part * f.rank)].tolist()))
        return found


PLANS = (
    dataclasses.replace(ADAMW, steps=6, lr=5e-4, dropout=0.2, weight_decay=0.5),
    dataclasses.replace(SGD, steps=8, lr=0.05, weight_decay=0.5, micro_batch_size=2, dropout=0.1),
    dataclasses.replace(ADAMW, steps=8, train_a=False, weight_decay=0.5),
    dataclasses.replace(ADAMW, steps=8, train_b=False, max_grad_norm=0.0, weight_decay=0.5),
)
HELD = FakeStore({k: examples(6, k) for k in range(6)})


def alone(jobs, on="gpt2", store=HELD) -> dict[int, Update]:
    found = list(SequentialEngine(model(on), store).train(jobs))
    assert all(isinstance(u, Update) for u in found), found
    return {u.client.id: u for u in found}


def with_choice(plan: LocalPlan, choice: IndexChoice | None = Drawn()) -> LocalPlan:
    return dataclasses.replace(plan, choice=choice)


def assert_still(update: Update, factors: Adapter, plan: LocalPlan) -> None:
    """All but the chosen indices of the trained factors is what it was; of these all has moved."""
    indices = update.payload.indices
    assert indices is not None
    for path, f in update.adapter.items():
        for side, dim in (("a", 0), ("b", 1)):
            before, after = getattr(factors[path], side), getattr(f, side)
            same = (before == after).movedim(dim, 0).flatten(1)
            assert not bool((before != after).movedim(dim, 0).flatten(1)[same.all(1)].any())
            moved = [i for i in range(f.rank) if not bool(same[i].all())]
            trains = plan.train_a if side == "a" else plan.train_b
            assert moved == (list(indices[path]) if trains else []), (path, side)


# --- the mechanism -------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=["adamw", "sgd", "b", "a"])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_training_is_that_of_a_plain_peft_loop(on, plan):
    """Zero gradients before clipping, and a step that is taken back where nothing was chosen."""
    factors = start(model(on), lambda i: 2 + i % 3, 1)
    update = alone([job(factors, with_choice(plan))], on)[0]
    wanted, _ = reference(on, factors, plan, HELD.held[0], client=0, indices=update.payload.indices)
    assert_still(update, factors, plan)
    assert distance(update.adapter, wanted) <= 1e-11 * distance(wanted, factors)
    assert distance(wanted, factors) > 1e-3


def test_all_indices_are_no_choice():
    for plan in PLANS:
        factors = start(model(), mixed, 1)
        free, chosen = (alone([job(factors, with_choice(plan, c))])[0] for c in (None, Drawn(1.0)))
        assert distance(free.adapter, chosen.adapter) <= 1e-13 * distance(free.adapter, factors)


def test_a_prefix_is_an_adapter_of_that_rank():
    """Where the other indices add nothing: the scale is that of all of them."""

    @dataclass(frozen=True)
    class First(IndexChoice):
        def count(self, start: Adapter) -> int:
            return 2 * len(start)

        def choose(self, job: TrainJob, probed: Adapter | None) -> Indices:
            return dict.fromkeys(job.start, (0, 1))

    plan = dataclasses.replace(PLANS[1], dropout=0.0)
    whole = {
        path: Factors(f.a, torch.cat([f.b[:, :2], 0 * f.b[:, 2:]], 1), f.alpha)
        for path, f in start(model(), 3, 1).items()
    }
    small = {p: Factors(f.a[:2], f.b[:, :2], f.alpha * 2 / 3) for p, f in whole.items()}
    first = alone([job(whole, with_choice(plan, First()))])[0].adapter
    wanted = alone([job(small, plan)])[0].adapter
    got = {p: Factors(f.a[:2], f.b[:, :2], f.alpha * 2 / 3) for p, f in first.items()}
    assert distance(got, wanted) <= 1e-11 * distance(wanted, small)


def test_a_head_trains_whatever_is_chosen():
    on = classifier("bert")
    begun = with_head(on, adapter(on.info.modules, 3))
    plan = with_choice(dataclasses.replace(ADAMW, steps=4, lr=1e-2))
    store = FakeStore({0: labelled(7)})
    (update,) = SequentialEngine(on, store).train([job(begun, plan)])
    assert isinstance(update, Update) and isinstance(update.payload, WithHead)
    for name, value in update.payload.values.items():
        assert bool((value != begun.values[name]).any())
    inner = dataclasses.replace(update, payload=update.payload.update)
    assert update.payload.indices == inner.payload.indices
    assert_still(inner, begun.update, plan)
    assert update.payload.check(update.client, Expected(update.client, begun, plan)) == ""


# --- the probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["a", "b", "ab"])
def test_a_probe_decides_by_the_change_of_each_product(train):
    """By plain outer products of what a client without a choice has trained in one epoch."""
    plan = dataclasses.replace(PLANS[0], train_a="a" in train, train_b="b" in train, batch_size=2)
    factors = start(model(), lambda i: 2 + i % 3, 1)
    epoch = dataclasses.replace(plan, epochs=1, steps=0)
    probed = alone([job(factors, epoch)])[0]
    scores = []
    for path, f in factors.items():
        g = probed.adapter[path]
        for i in range(f.rank):
            moved = torch.outer(g.b[:, i], g.a[i]) - torch.outer(f.b[:, i], f.a[i])
            scores.append((f.scale * float(moved.norm()), path, i))
        assert torch.allclose(
            index_scores(f, g), torch.tensor([s for s, p, _ in scores if p == path]).double()
        )
    best = sorted(scores, reverse=True)[:5]
    update = alone([job(factors, with_choice(plan, LargestChange(5)))])[0]
    assert update.payload.indices == {
        path: tuple(sorted(i for _, p, i in best if p == path)) for path in factors
    }

    # Its cost is the client's, and its result is dropped.
    other = alone([job(factors, plan)])[0]
    for name in ("steps", "tokens"):
        assert update.metrics[name] == other.metrics[name] + probed.metrics[name]
        assert update.metrics[f"probe_{name}"] == probed.metrics[name]
    assert update.metrics["seconds"] > update.metrics["probe_seconds"] > 0
    assert update.metrics["examples"] == other.metrics["examples"]
    wanted, _ = reference(
        "gpt2", factors, plan, HELD.held[0], client=0, indices=update.payload.indices
    )
    assert distance(update.adapter, wanted) <= 1e-11 * distance(wanted, factors)


def test_of_equal_scores_the_first_and_all_if_there_are_fewer():
    factors = start(model(), 2, 1)
    asked = job(factors, with_choice(PLANS[0], LargestChange(3)))
    first, *others = LargestChange(3).choose(asked, factors).items()
    assert first[1] == (0, 1) and others[0][1] == (0,) and not any(at for _, at in others[1:])
    everything = LargestChange(10**6)
    assert everything.count(factors) == 2 * len(factors)
    assert set(everything.choose(asked, factors).values()) == {(0, 1)}
    with pytest.raises(ValueError, match="budget=0"):
        LargestChange(0)


@pytest.mark.parametrize("begun", [SparseDelta(1, 0.5, {}), CorePayload({}, 1.0, 1)])
def test_what_has_no_rank_indices_is_a_failed_client(begun):
    asked = dataclasses.replace(job(start(model(), 2, 1), with_choice(PLANS[0])), start=begun)
    (failed,) = SequentialEngine(model(), HELD).train([asked])
    assert isinstance(failed, Failure) and "cannot choose rank indices" in failed.message


def test_tokens_of_the_probe_are_no_lie():
    """The server bounds what a client says by what it can have done."""

    class Tokens:
        def supervised(self, client, split, loss):
            import numpy as np

            return np.array([5, 5, 5, 5])

    plan = LocalPlan(batch_size=2, epochs=1)
    for choice, most in ((None, 20), (LargestChange(2), 40), (Drawn(), 20)):
        asked = job(start(model(), 2, 1), with_choice(plan, choice))
        said = {"examples": 4.0, "tokens": float(most)}
        assert wrong_training(asked, said, Tokens()) == ""
        assert "tokens" in wrong_training(asked, {**said, "tokens": most + 1.0}, Tokens())


# --- what travels --------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["float64", "float32", "bfloat16"])
def test_indices_travel_with_the_update(wire):
    plan = with_choice(PLANS[2], LargestChange(4))
    on = model()
    asked = [job(start(on, 3, k), plan, k) for k in range(2)]
    asked = [
        dataclasses.replace(j, start=LowRankPayload.from_header(j.start.header(), floats(j.start)))
        for j in asked
    ]
    received = decode_jobs(encode_jobs(asked, worker="{}", source="s", wire=wire)).jobs
    assert all(j.plan == plan for j in received)
    done = list(SequentialEngine(on, HELD).train(received))
    content = encode_results(done, wire=wire, jobs=received)
    begun = {j.client.id: j.start for j in asked}
    arrived = decode_results(content, {j.client.id: j.client for j in asked}, begun, wire=wire)
    for got, sent in zip(arrived, sorted(done, key=lambda u: u.client.id), strict=True):
        assert isinstance(got, Update)
        assert got.payload.indices == sent.payload.indices
        expected = Expected(got.client, begun[got.client.id], plan)
        assert got.payload.check(got.client, expected) == ""


def floats(payload):
    return {name: t.float() for name, t in payload.tensors()}


@pytest.mark.parametrize("wire", [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_bytes_are_those_of_the_chosen_rows_and_their_names(wire):
    """beyond.md, 8.2: r_i m of a B-round, r_i n of an A-round, and 2 bytes an index."""
    name, size = wire
    on = model()
    d_in = {m.path: m.d_in for m in on.info.modules}
    d_out = {m.path: m.d_out for m in on.info.modules}
    for plan in PLANS:
        update = alone([job(start(on, 3, 1), with_choice(plan, LargestChange(7)))])[0]
        indices = update.payload.indices
        rows = sum(
            len(at) * (d_in[p] * plan.train_a + d_out[p] * plan.train_b)
            for p, at in indices.items()
        )
        assert update_bytes(update.payload, plan, name) == size * rows + 2 * 7
    f = Factors(torch.zeros(2**16 + 1, 1), torch.zeros(1, 2**16 + 1), 1.0)
    assert LowRankPayload({"w": f}, {"w": (0, 2**16)}).index_bytes() == 8


def test_updates_that_do_not_fit_are_refused():
    plan = with_choice(PLANS[2], LargestChange(4))
    on = model()
    asked = job(start(on, 3, 1), plan)
    update = alone([asked])[0]
    sent, expected = update.payload, Expected(asked.client, asked.start, plan)
    first = next(path for path, at in sent.indices.items() if at)
    at = sent.indices[first]

    def wrong(factors, indices):
        return LowRankPayload(factors, indices).check(asked.client, expected)

    assert sent.check(asked.client, expected) == ""
    assert "does not name" in wrong(sent, None)
    assert "expected" in wrong(sent, {**sent.indices, first: (*at, 3)})
    assert "expected" in wrong(sent, {**sent.indices, first: at + at[-1:]})
    assert "expected" in wrong(sent, {**sent.indices, first: (-1,)})
    assert "3 rank indices, 4 were" in wrong(sent, {**sent.indices, first: at[1:]})
    assert "rank indices: " in wrong(sent, {"w": (0,)})
    for path, g in sent.items():
        for i in set(range(3)) - set(sent.indices[path]):
            b = g.b.clone()
            b[0, i] += 1e-3
            moved = {**sent, path: dataclasses.replace(g, b=b)}
            assert "has not chosen" in wrong(moved, sent.indices)
    free = Expected(asked.client, asked.start, PLANS[2])
    assert "names rank indices" in sent.check(asked.client, free)
    header = sent.header()
    for bad in ("012", [True], [0.5], None, [[0]]):
        with pytest.raises(ValueError, match="whole numbers"):
            LowRankPayload.from_header({**header, "indices": {first: bad}}, dict(sent.tensors()))


# --- faults --------------------------------------------------------------------------------------

FAULTS = [
    # Decoupled decay or an L2 term moves what was not chosen; moments of it; a norm with it.
    (loop.Stepper.__init__, "else ChosenScalars(buffers, masks)", "else None"),
    (flat.ChosenScalars.scatter, "0, at, part", "0, at.flip(0), part"),
    (flat.ChosenScalars.gather, "whole.grad, 0, at", "whole.grad, 0, at.flip(0)"),
    (flat.FlatParameters.masks, "(update.a, 0), (update.b, 1)", "(update.a, 0), (update.b, 0)"),
    (flat.FlatParameters.masks, ".zero_()", ""),
]


@pytest.mark.parametrize("plan", PLANS[:2], ids=["adamw", "sgd"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0].__qualname__}: {f[2]}")
def test_faults_are_noticed(fault, plan):
    with planted(*fault), pytest.raises((AssertionError, IndexError, RuntimeError)):
        test_training_is_that_of_a_plain_peft_loop("gpt2", plan)


DECIDES = [
    (
        index_scores,
        "start.scale * ",
        "",
    ),
    (index_scores, "b0.square().sum(0) * of_a.square().sum(1)", "0"),
    (index_scores, "+ 2 * (of_b", "- 2 * (of_b"),
    (LargestChange.choose, "descending=True", "descending=False"),
    (LargestChange.probe, "epochs=1, steps=0", "epochs=2, steps=0"),
]


@pytest.mark.parametrize("fault", DECIDES, ids=lambda f: f"{f[0].__qualname__}: {f[2]}")
def test_faults_of_the_decision_are_noticed(fault):
    def all_of_it():
        for train in ("a", "b", "ab"):
            test_a_probe_decides_by_the_change_of_each_product(train)

    with planted(*fault), pytest.raises(AssertionError):
        all_of_it()
