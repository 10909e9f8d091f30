"""The sequential engine is the specification: whatever the plan, schedule, layout and precision."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.types import Factors, LocalPlan
from fedlora.engine.fused import Fused
from fedlora.engine.fused.schedule import POLICIES
from fedlora.engine.sequential import SequentialEngine
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import LoRA
from tests.fedlora.engine.fused.harness import (
    ADAMW,
    EXACT,
    PLAN,
    SGD,
    alone,
    assert_equal,
    by_client,
    mixed,
    resident,
    trained,
)
from tests.fedlora.engine.world import (
    FakeStore,
    conversation,
    distance,
    example,
    examples,
    job,
    model,
    start,
)
from tests.fedlora.models.networks import VOCABULARY

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
    group_by_length=st.booleans(),
    max_examples=st.sampled_from([0, 2]),
    max_grad_norm=st.sampled_from([0.0, 0.1]),
    dropout=st.sampled_from([0.0, 0.25, 1.0]),
    loss=st.sampled_from(["full", "response"]),
    train_a=st.booleans(),
    technique=st.sampled_from([LoRA(), LoRA(), LoRA(SelfPrune(0.3, 0.5, 1))]),
)


@st.composite
def populations(draw):
    """Jobs and data: some clients alike, some with one-token sequences or several answers, some
    without modules."""
    on, few = (
        draw(st.sampled_from(["llama", "gpt2"])),
        draw(st.lists(PLANS, min_size=1, max_size=3)),
    )
    held, jobs = {}, []
    for k in range(draw(st.integers(1, 6))):
        longest = draw(st.sampled_from([4, 8, 31]))
        held[k] = examples(draw(st.integers(1, 5)), draw(st.integers(0, 9)), longest)
        if draw(st.booleans()):
            held[k] = [conversation(e, k) for e in held[k]]
        if draw(st.booleans()):
            held[k].append(example([1, draw(st.integers(0, VOCABULARY - 1))]))
        begin = start(resident(on), draw(st.sampled_from([1, 3, mixed])), seed=k)
        some = {p: f for i, (p, f) in enumerate(begin.items()) if draw(st.booleans()) or i == k}
        jobs.append(job(LowRankPayload(some), draw(st.sampled_from(few)), k))
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
    plain_ = dataclasses.replace(SGD, steps=6, lr=0.02, max_grad_norm=0.0, technique=LoRA(prune))
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
    plan = dataclasses.replace(ADAMW, steps=8, lr=2e-3, max_grad_norm=1.0)
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

    def faulty(lanes, hidden, labelled):
        good = honest(lanes, hidden, labelled)
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
