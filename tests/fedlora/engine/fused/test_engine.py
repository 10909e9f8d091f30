"""The fused engine against independent runs of PEFT, against the sequential engine, and alone."""

import dataclasses
import functools
import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.seeding import mask_noise
from fedlora.core.types import (
    EvaluateJob,
    EvaluatePlan,
    Evaluation,
    Factors,
    Failure,
    LocalPlan,
    TrainJob,
    Update,
)
from fedlora.engine.fused import Auto, Fused, cost
from fedlora.engine.fused.cost import CostModel, Sample
from fedlora.engine.fused.engine import AutoEngine, FusedEngine
from fedlora.engine.fused.model import FusedModel
from fedlora.engine.fused.schedule import POLICIES
from fedlora.engine.sequential import SequentialEngine
from fedlora.evaluation import metrics as evaluate
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import LoRA
from fedlora.techniques.sparse.payload import SparseDelta
from tests.fedlora.engine.peft_loop import reference
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
    vector,
)
from tests.fedlora.models.networks import VOCABULARY, same

EXACT = 1e-12
PLAN = LocalPlan(lr=3e-3, batch_size=3, dropout=0.0, steps=3)
resident = functools.cache(model)  # an engine leaves it as it found it: a law below


def engine(on="llama", store=None, kind=Fused, **spec) -> FusedEngine:
    """With a few tokens and slots, so that clients wait, come and go."""
    settings = {"tokens": 60, "slots": 4, "reuse_memory": False} | spec
    opened = kind(**settings).open(resident(on), store or FakeStore({}))
    assert isinstance(opened, FusedEngine)
    return opened


def by_client(results) -> dict[int, Update]:
    """Every client's one update."""
    found = list(results)
    assert all(isinstance(r, Update) for r in found), found
    assert len({r.client.id for r in found}) == len(found)
    return {r.client.id: r for r in found}


def trained(jobs, store, on="llama", **spec) -> dict[int, Update]:
    return by_client(engine(on, store, **spec).train(jobs))


def alone(jobs, store, on="llama") -> dict[int, Update]:
    return by_client(SequentialEngine(resident(on), store).train(jobs))


def assert_equal(got: Update, wanted: Update, tolerance: float = EXACT) -> None:
    """Results and metrics up to rounding, relative to the distance moved."""
    assert got.client == wanted.client and got.num_examples == wanted.num_examples
    assert got.adapter.keys() == wanted.adapter.keys()
    assert all(got.adapter[p].alpha == wanted.adapter[p].alpha for p in got.adapter)
    moved = max(wanted.metrics["delta_norm"], 1e-3)
    assert distance(got.adapter, wanted.adapter) <= tolerance * moved
    times = {"seconds", "cpu_seconds"}
    assert got.metrics.keys() == wanted.metrics.keys() | {"fused"}
    for name in wanted.metrics.keys() - times:
        near = pytest.approx(wanted.metrics[name], rel=tolerance, abs=tolerance)
        assert got.metrics[name] == near, name
    assert got.metrics["fused"] == 1 and all(got.metrics[t] >= 0 for t in times)


@pytest.fixture(params=["spread", "calls"])
def products(request, monkeypatch) -> str:
    """Whether rows are copied so that clients' products can be done in stacks."""
    low, high = (1, 10**9) if request.param == "spread" else (10**9, 0)
    monkeypatch.setattr("fedlora.engine.fused.batch.SPREAD_LANES", low)
    monkeypatch.setattr("fedlora.engine.fused.batch.SPREAD_NUMBERS", high)
    return request.param


# --- law 1: independent PEFT runs ----------------------------------------------------------------


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


# Adam is a chaotic system where lr / eps times the curvature is large: at lr=3e-3 and eps=1e-8 the
# sequential engine and PEFT, too, are 1e-11 apart after 20 steps.
ADAMW = LocalPlan(
    lr=5e-4, steps=20, batch_size=3, dropout=0.0, weight_decay=0.02, clip=0.05, eps=1e-4
)
SGD = dataclasses.replace(ADAMW, optimizer="sgd", lr=0.3, momentum=0.8)


def mixed(i):
    return 1 + i % 3


POPULATIONS = {
    "llama": (
        Case(ADAMW, mixed),
        Case(dataclasses.replace(ADAMW, lr=2e-3, schedule="cosine", steps=23), mixed, n=4),
        Case(dataclasses.replace(SGD, clip=0.0, loss="response", batch_size=1), 4),
        Case(dataclasses.replace(ADAMW, batch_size=4, micro_batch_size=3, warmup=0.2), 3),
        Case(dataclasses.replace(ADAMW, dropout=0.3, schedule="constant"), mixed, n=5),
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


# --- the sequential engine is the specification --------------------------------------------------


PLANS = st.builds(
    LocalPlan,
    optimizer=st.sampled_from(["adamw", "sgd"]),
    lr=st.sampled_from([1e-3, 3e-4]),
    eps=st.just(1e-4),
    momentum=st.sampled_from([0.0, 0.8]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    warmup=st.sampled_from([0.0, 0.5]),
    epochs=st.integers(1, 2),
    steps=st.integers(0, 4),
    batch_size=st.integers(1, 4),
    micro_batch_size=st.integers(0, 3),
    max_examples=st.sampled_from([0, 2]),
    clip=st.sampled_from([0.0, 0.1]),
    dropout=st.sampled_from([0.0, 0.25, 1.0]),
    loss=st.sampled_from(["full", "response"]),
    train_a=st.booleans(),
    technique=st.sampled_from([LoRA(), LoRA(), LoRA(SelfPrune(0.3, 0.5, 1))]),
)


@st.composite
def populations(draw):
    """Jobs and data: some clients alike, some with one-token sequences, some without modules."""
    on, few = (
        draw(st.sampled_from(["llama", "gpt2"])),
        draw(st.lists(PLANS, min_size=1, max_size=3)),
    )
    held, jobs = {}, []
    for k in range(draw(st.integers(1, 6))):
        longest = draw(st.sampled_from([4, 8, 31]))
        held[k] = examples(draw(st.integers(1, 5)), draw(st.integers(0, 9)), longest)
        if draw(st.booleans()):
            held[k].append(example([1, draw(st.integers(0, VOCABULARY - 1))]))
        begin = start(resident(on), draw(st.sampled_from([1, 3, mixed])), seed=k)
        begin = {p: f for i, (p, f) in enumerate(begin.items()) if draw(st.booleans()) or i == k}
        jobs.append(job(begin, draw(st.sampled_from(few)), k))
    return on, FakeStore(held), jobs


@settings(max_examples=30)
@given(
    population=populations(),
    tokens=st.integers(1, 200),
    slots=st.integers(1, 7),
    policy=st.sampled_from(sorted(POLICIES)),
    layout=st.sampled_from(["ragged", "padded"]),
    spread=st.booleans(),
)
def test_rows_are_those_of_the_sequential_engine_whatever_the_schedule(
    population, tokens, slots, policy, layout, spread
):
    on, store, jobs = population
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora.engine.fused.batch.SPREAD_LANES", 1 if spread else 10**9)
        spec = {"tokens": tokens, "slots": slots, "policy": policy, "layout": layout}
        updates = trained(jobs, store, on, **spec)
    wanted = alone(jobs, store, on)
    assert updates.keys() == wanted.keys()
    for k in wanted:  # Adam's first steps are ill-conditioned where a gradient is close to its eps
        assert_equal(updates[k], wanted[k], tolerance=1e-11)


def test_logits_that_are_not_the_embeddings_alone_are_trained_as_they_are():
    """Soft capping: then the loss cannot go through the output embedding in chunks."""
    on = model("llama")
    honest = on.network.forward

    def capped(*args, **kwargs):
        out = honest(*args, **kwargs)
        out.logits = torch.tanh(out.logits / 0.1)
        return out

    on.network.forward = capped
    store = FakeStore({k: examples(5, k) for k in range(3)})
    jobs = [job(start(on, 2, k), SGD, k) for k in range(3)]
    updates = by_client(Fused(tokens=60, reuse_memory=False).open(on, store).train(jobs))
    for k, wanted in by_client(SequentialEngine(on, store).train(jobs)).items():
        assert_equal(updates[k], wanted)
        assert abs(wanted.metrics["loss"] - alone([jobs[k]], store)[k].metrics["loss"]) > 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("frozen", ["train_a", "train_b"])
def test_a_cohort_that_freezes_one_factor_is_fused(frozen, dropout, products):
    """All alike, so that their products are done in stacks, and no layer keeps its input."""
    store = FakeStore({k: examples(5, k) for k in range(5)})
    plan = dataclasses.replace(SGD, steps=4, dropout=dropout, **{frozen: False})
    jobs = [job(start(resident("llama"), 2, k), plan, k) for k in range(5)]
    wanted, updates = alone(jobs, store), trained(jobs, store, slots=5)
    for k in wanted:
        assert_equal(updates[k], wanted[k])


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_self_pruning_shrinks_the_same_clients(on, layout):
    prune = SelfPrune(5.0, 0.5, 1)
    plain_ = dataclasses.replace(SGD, steps=6, lr=0.02, clip=0.0, technique=LoRA(prune))
    plans = [plain_] * 4
    plans[1] = dataclasses.replace(
        plans[1], technique=LoRA(SelfPrune(0.0, 0.5, 1)), weight_decay=0.0
    )
    plans[2] = dataclasses.replace(plans[2], train_a=False, micro_batch_size=1)
    store = FakeStore({k: examples(6, k) for k in range(4)})
    jobs = [job(start(resident(on), 4, seed=k), plan, k) for k, plan in enumerate(plans)]
    jobs[3] = job(
        {p: Factors(f.a, 0 * f.b, f.alpha) for p, f in jobs[3].start.items()}, plans[3], 3
    )
    wanted, updates = alone(jobs, store, on), trained(jobs, store, on, layout=layout)
    for k in wanted:
        assert_equal(updates[k], wanted[k])
    assert set(updates[0].client.ranks.values()) == {2}
    assert set(updates[3].client.ranks.values()) == {4}  # a tail of zero cannot shrink


@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_losses_in_float32_are_those_of_the_sequential_engine(layout, products):
    on = model("llama")
    on.network.float()
    store = FakeStore({k: examples(7, k) for k in range(6)})
    jobs = [job(start(on, mixed, k), dataclasses.replace(ADAMW, dropout=0.1), k) for k in range(6)]
    spec = Fused(tokens=60, slots=5, layout=layout, reuse_memory=False)
    updates = by_client(spec.open(on, store).train(jobs))
    wanted = by_client(SequentialEngine(on, store).train(jobs))
    for k in range(6):
        for name in ("loss", "loss_first", "loss_last"):
            assert updates[k].metrics[name] == pytest.approx(wanted[k].metrics[name], rel=1e-5)


@pytest.mark.parametrize("how", ["bf16 base", "autocast"])
def test_bfloat16_stays_within_its_own_noise(how, products):
    on = model("llama")
    on.network.float()
    plan = dataclasses.replace(ADAMW, steps=8, lr=2e-3, clip=1.0)
    store = FakeStore({k: examples(7, k) for k in range(5)})
    jobs = [job(start(on, mixed, k), plan, k) for k in range(5)]
    exact = by_client(SequentialEngine(on, store).train(jobs))
    if how == "autocast":
        half = dataclasses.replace(plan, autocast="bf16")
        jobs = [dataclasses.replace(j, plan=half) for j in jobs]
    else:
        on.network.bfloat16()
    rough = by_client(SequentialEngine(on, store).train(jobs))
    fused = Fused(tokens=60, slots=5, reuse_memory=False).open(on, store)
    updates = by_client(fused.train(jobs))
    assert not any("failed" in note for note in fused.notes())
    for k in range(5):
        loss, own = updates[k].metrics["loss"], rough[k].metrics["loss"]
        assert updates[k].metrics["fused"] == 1
        assert loss != exact[k].metrics["loss"]
        assert loss == pytest.approx(own, rel=2e-2)
        assert updates[k].adapter["model.layers.0.mlp.up_proj"].a.dtype == torch.float32


def test_plans_of_both_precisions_are_trained_in_one_call():
    on = model("llama")
    on.network.float()
    store = FakeStore({k: examples(4, k) for k in range(4)})
    plans = [dataclasses.replace(PLAN, autocast=("none", "bf16")[k % 2]) for k in range(4)]
    jobs = [job(start(on, 2, k), plan, k) for k, plan in enumerate(plans)]
    updates = by_client(Fused(tokens=99, reuse_memory=False).open(on, store).train(jobs))
    wanted = by_client(SequentialEngine(on, store).train(jobs))
    for k in range(4):
        near = pytest.approx(wanted[k].metrics["loss"], rel=2e-2 if k % 2 else 1e-5)
        assert updates[k].metrics["loss"] == near


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_checkpointing_changes_nothing_but_memory(on, layout):
    """The masks of a forward are the same when it is computed again."""
    plan = dataclasses.replace(ADAMW, dropout=0.4, steps=6, micro_batch_size=2)
    store = FakeStore({k: examples(6, k) for k in range(5)})
    jobs = [job(start(resident(on), mixed, k), plan, k) for k in range(5)]
    kept = trained(jobs, store, on, layout=layout)
    again = trained(jobs, store, on, layout=layout, checkpoint=True)
    for k in kept:
        assert distance(again[k].adapter, kept[k].adapter) <= EXACT * kept[k].metrics["delta_norm"]
        assert again[k].metrics["loss"] == pytest.approx(kept[k].metrics["loss"], rel=EXACT)


def test_a_planted_pad_with_a_loss_is_noticed(monkeypatch):
    """mLoRA's public code trains on pads: a client's loss depends on whom it is batched with."""
    from fedlora.engine.fused import model as fused_model

    honest = fused_model.padded_batch

    def faulty(lanes, hidden):
        good = honest(lanes, hidden)
        pads = sorted(set(range(good.rows)) - set(good.batch.positions.tolist()))[:1]
        if not pads:
            return good
        width = good.batch.inputs.shape[1]
        sizes = [len(lane.examples) * width for lane in good.lanes]
        owner = next(k for k in range(len(sizes)) if pads[0] < sum(sizes[: k + 1]))
        batch = dataclasses.replace(
            good.batch,
            positions=torch.cat([good.batch.positions, torch.tensor(pads)]),
            targets=torch.cat([good.batch.targets, torch.tensor([0])]),
        )
        return dataclasses.replace(
            good,
            batch=batch,
            owners=torch.cat([good.owners, torch.tensor([owner])]),
            weights=torch.cat([good.weights, torch.tensor([1 / good.lanes[owner].tokens])]),
        )

    store = FakeStore({k: examples(6, k) for k in range(3)})
    jobs = [job(start(resident("llama"), 2, k), PLAN, k) for k in range(3)]
    wanted = alone(jobs, store)
    monkeypatch.setattr(fused_model, "padded_batch", faulty)
    updates = trained(jobs, store, layout="padded")
    assert all(
        distance(updates[k].adapter, wanted[k].adapter) > 1e-3 * wanted[k].metrics["delta_norm"]
        for k in wanted
    )


# --- isolation -----------------------------------------------------------------------------------


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
        plan = dataclasses.replace(plan, lr=1e200, clip=0.0)
    elif what == "lr":
        plan = dataclasses.replace(plan, lr=0.5)
    return job(factors, plan, 1)


@pytest.mark.parametrize(
    "what", ["data", "lengths", "nan", "inf", "rank", "diverges", "lr", "gone"]
)
@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_a_client_changes_nobody_elses_result(what, layout, products):
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


def test_who_raises_in_a_fused_step_costs_nobody_anything(monkeypatch, caplog):
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


def test_a_measurement_that_fails_is_no_reason_to_fail_a_round(monkeypatch):
    """A model that passes some tokens of a layer only (experts) can be trained one by one."""
    monkeypatch.setattr(
        FusedEngine, "cost_model", lambda self, chain: (_ for _ in ()).throw(ValueError("4 rows"))
    )
    store = FakeStore({k: examples(5, k) for k in range(3)})
    jobs = [job(start(resident("llama"), 2, k), PLAN, k) for k in range(3)]
    fused = engine(store=store, tokens=0)
    updates, wanted = by_client(fused.train(jobs)), alone(jobs, store)
    assert all(same(updates[k].adapter, wanted[k].adapter) for k in range(3))
    assert any("4 rows" in note for note in fused.notes())


# --- what an engine leaves behind ----------------------------------------------------------------


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
    """One network: whoever mounts on top of another stream would train the wrong adapters."""
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


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_texts_do_not_depend_on_how_activations_are_kept(on, monkeypatch):
    """Blocks that are computed again drop the cache of generated keys: evaluation is none."""
    texts, honest = [], evaluate.greedy
    monkeypatch.setattr(evaluate, "greedy", lambda *a: texts.append(honest(*a)) or texts[-1])
    mine = model(on)
    for name, p in mine.network.named_parameters():
        if name.endswith("bias"):  # GPT-2's would make one token the favourite everywhere
            p.data.zero_()
        elif "wte" in name or "wpe" in name:
            p.data.mul_(25)
    store = FakeStore({0: examples(6, 3, 20)}, {0: ["w1 w2 w3"] * 6})
    factors = LowRankPayload(
        {p: Factors(3 * f.a, 3 * f.b, f.alpha) for p, f in start(mine, 2, 9).items()}
    )
    plan = EvaluatePlan(max_new_tokens=6)
    jobs = [EvaluateJob(SEED, 1, client(factors), factors, plan)]
    for checkpoint in (False, True):
        spec = Fused(tokens=99, checkpoint=checkpoint, reuse_memory=False)
        assert isinstance(next(spec.open(mine, store).evaluate(jobs)), Evaluation)
    assert len(set(texts[0])) > 1
    assert texts[0] == texts[1]


# --- configuration, notes, choices ---------------------------------------------------------------


def test_a_budget_below_one_sequence_runs_it_alone_and_says_so():
    store = FakeStore({k: examples(4, k) for k in range(3)})
    jobs = [job(start(resident("llama"), 2, k), PLAN, k) for k in range(3)]
    fused, wanted = engine(store=store, tokens=1), alone(jobs, store)
    updates = by_client(fused.train(jobs))
    assert fused.notes() == (
        "fused, ragged, 1 tokens per step",
        "forward passes larger than a step run alone",
    )
    for k in range(3):
        assert_equal(updates[k], wanted[k])


def test_sparse_updates_are_trained_by_the_sequential_engine_which_is_said():
    on = resident("llama")
    masks = {m.path: mask_noise(5, m.path, m.d_out, m.d_in) < 0.2 for m in on.info.modules}
    delta = SparseDelta(
        5, 0.2, {p: torch.zeros(int(m.sum()), dtype=torch.float64) for p, m in masks.items()}
    )
    store = FakeStore({k: examples(4, k) for k in range(3)})
    jobs = [job(delta, PLAN, 0), job(start(on), PLAN, 1), job(delta, PLAN, 2)]
    fused, wanted = engine(store=store), alone(jobs, store)
    updates = by_client(fused.train(jobs))
    assert "sparse updates one by one" in fused.notes()
    for k in (0, 2):
        assert torch.equal(vector(updates[k].payload), vector(wanted[k].payload))
        assert "fused" not in updates[k].metrics
    assert_equal(updates[1], wanted[1])
    (measured,) = fused.evaluate(
        [EvaluateJob(SEED, 1, client(delta), delta, EvaluatePlan(generate=False))]
    )
    assert isinstance(measured, Evaluation)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", -1),
        ("tokens", -1),
        ("slots", -2),
        ("policy", "fastest"),
        ("layout", "packed"),
        ("memory", 0.0),
        ("memory", 1.5),
    ],
)
def test_impossible_settings_are_refused_by_name(key, value):
    for kind in (Fused, Auto):
        with pytest.raises(ValueError, match=rf"engine\.{key}"):
            kind(**{key: value})


@pytest.mark.parametrize("kind", [Fused, Auto])
def test_a_model_that_cannot_run_ragged_is_padded_with_a_note_or_refused(kind, monkeypatch):
    name = "fedlora.engine.fused.engine.why_not_ragged"
    monkeypatch.setattr(name, lambda model: "Odd attends in a way of its own")
    with pytest.raises(ValueError, match=r"engine\.layout=ragged: Odd attends in a way of its own"):
        engine(kind=kind, layout="ragged")
    assert engine(kind=kind).notes() == ("padded, for Odd attends in a way of its own",)
    assert engine(kind=kind, layout="padded").notes() == ()


def test_checkpointing_that_the_model_cannot_do_is_refused_at_once():
    on = model("llama")
    on.network.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match=r"engine\.checkpoint=true: LlamaForCausalLM"):
        Fused(tokens=60, checkpoint=True, reuse_memory=False).open(on, FakeStore({}))


def costs(step_seconds: float, token_seconds: float) -> CostModel:
    samples = (Sample(256, 2, 256, step_seconds + 256 * token_seconds, 1.0),)
    return CostModel(step_seconds, token_seconds, 0.0, 0.0, 0.0, 0.0, 1.0, samples)


@pytest.mark.parametrize(
    ("predicted", "layout", "fuses"),
    [
        (costs(1.0, 1e-9), "padded", True),  # steps cost, tokens do not
        (costs(1e-9, 1.0), "padded", False),  # padding costs, steps do not
        (costs(1e-9, 1.0), "ragged", True),
    ],
)
def test_auto_fuses_where_that_is_predicted_to_be_faster(monkeypatch, predicted, layout, fuses):
    monkeypatch.setattr(AutoEngine, "cost_model", lambda self, chain: predicted)
    store = FakeStore({k: examples(4, k, longest=5 + 6 * k) for k in range(4)})
    jobs = [job(start(resident("llama"), 2, k), PLAN, k) for k in range(4)]
    fused = engine(store=store, kind=Auto, layout=layout, tokens=0, slots=0)
    updates, wanted = by_client(fused.train(jobs)), alone(jobs, store)
    assert all(("fused" in u.metrics) == fuses for u in updates.values())
    assert fused.notes() == (
        (f"fused, {layout}, 256 tokens per step",) if fuses else ("sequential",)
    )
    for k in range(4):
        assert distance(updates[k].adapter, wanted[k].adapter) <= 1e-11


def test_what_is_not_configured_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setattr("fedlora.engine.fused.cost.cache_root", lambda: tmp_path)
    few = functools.partial(cost.tuned, candidates=(16, 64))
    monkeypatch.setattr("fedlora.engine.fused.probe.tuned", few)
    store = FakeStore({k: examples(4, k) for k in range(4)})
    jobs = [job(start(resident("llama"), 2, k), PLAN, k) for k in range(4)]
    first = by_client(engine(store=store, tokens=0, slots=0).train(jobs))
    files = {f: f.read_text() for f in tmp_path.rglob("*.json")}
    again = by_client(engine(store=store, tokens=0, slots=0).train(jobs))
    assert len(files) == 1
    assert {f: f.read_text() for f in tmp_path.rglob("*.json")} == files
    assert all(same(first[k].adapter, again[k].adapter) for k in range(4))
    for k, wanted in alone(jobs, store).items():
        assert_equal(first[k], wanted)
