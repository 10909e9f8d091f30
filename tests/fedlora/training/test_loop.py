"""The optimisation loop against an independent one of PEFT and PyTorch, and its own laws."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.rates import learning_rates
from fedlora.core.types import Factors, LocalPlan, Update
from fedlora.engine.client import LoRAClient
from fedlora.models.forward import supervised_logits
from fedlora.techniques.lora import self_pruning as selfprune
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import LoRA
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.training import loop
from fedlora.training.flat import FlatParameters
from tests.fedlora.engine.peft_loop import padded, reference
from tests.fedlora.engine.world import (
    NETWORKS,
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

LAWS = settings(derandomize=True, deadline=None, max_examples=15)
ADAMW = LocalPlan(
    lr=3e-3, epochs=5, batch_size=3, dropout=0.0, weight_decay=0.02, max_grad_norm=0.05
)
SGD = dataclasses.replace(ADAMW, optimizer="sgd", lr=0.3, momentum=0.8)
HELD = examples(7)


def train(plan, *, on="gpt2", rank=2, held=HELD, **kwargs) -> Update:
    resident = model(on)
    work = job(start(resident, rank), plan, **kwargs)
    return LoRAClient(resident, FakeStore({0: held}), work.client, SEED).train(work)


# --- against an independent implementation --------------------------------------------------------


CASES = {
    "adamw": ("gpt2", ADAMW),
    "adamw llama": ("llama", ADAMW),
    "adamw cosine response": ("gpt2", {"schedule": "cosine", "loss": "response"}),
    "adamw accumulation": ("llama", {"micro_batch_size": 2}),
    "adamw dropout": ("gpt2", {"dropout": 0.3}),
    "adamw no clip": ("llama", {"max_grad_norm": 0.0}),
    "sgd": ("gpt2", SGD),
    "sgd constant accumulation": ("llama", (SGD, {"schedule": "constant", "micro_batch_size": 1})),
    "sgd dropout response": ("llama", (SGD, {"dropout": 0.2, "loss": "response"})),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_a_plain_loop_of_peft_and_pytorch(case):
    name, plan = CASES[case]
    if isinstance(plan, dict):
        plan = dataclasses.replace(ADAMW, **plan)
    elif isinstance(plan, tuple):
        plan = dataclasses.replace(plan[0], **plan[1])
    factors = start(model(name), lambda i: 1 + i % 3)
    update = train(plan, on=name, rank=lambda i: 1 + i % 3)
    wanted, losses = reference(name, factors, plan, HELD)
    assert update.metrics["steps"] == len(losses) == 15
    moved = distance(wanted, factors)
    assert moved > 1e-2
    assert distance(update.adapter, wanted) <= 1e-12 * moved
    assert update.metrics["loss_first"] == pytest.approx(losses[0], rel=1e-12)
    assert update.metrics["loss_last"] == pytest.approx(losses[-1], rel=1e-12)


# --- laws ----------------------------------------------------------------------------------------


@LAWS
@given(
    batch=st.integers(1, 9),
    micro=st.integers(1, 9),
    loss=st.sampled_from(["full", "response"]),
    seed=st.integers(0, 99),
)
def test_micro_batches_do_not_change_the_result(batch, micro, loss, seed):
    plan = LocalPlan(
        optimizer="sgd",
        lr=0.3,
        batch_size=batch,
        dropout=0.0,
        epochs=2,
        loss=loss,
        max_grad_norm=0.4,
    )
    held = examples(6, seed)
    whole = train(plan, held=held)
    cut = train(dataclasses.replace(plan, micro_batch_size=micro), held=held)
    assert distance(whole.adapter, cut.adapter) <= 1e-12 * whole.metrics["delta_norm"]
    assert cut.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-12)


def test_a_step_weighs_tokens_not_micro_batches():
    """A mean of micro-batch means is the usual mistake; here it is another number."""
    held = [example([1, 2, 3, 4, 5, 6, 7, 8, 0]), example([1, 9, 0])]
    plan = LocalPlan(batch_size=2, micro_batch_size=1, dropout=0.0)
    each = [train(dataclasses.replace(plan, lr=0.0), held=[e]).metrics["loss"] for e in held]
    loss = train(plan, held=held).metrics["loss"]
    assert loss == pytest.approx((8 * each[0] + 2 * each[1]) / 10, rel=1e-12)
    assert abs(loss - sum(each) / 2) > 1e-3


@pytest.mark.parametrize("loss", ["full", "response"])
def test_padding_never_reaches_the_result(monkeypatch, loss):
    plan = LocalPlan(batch_size=4, dropout=0.0, loss=loss, epochs=3)
    wanted = train(plan)
    monkeypatch.setattr("fedlora.data.batches.PAD", 17)
    again = train(plan)
    assert torch.equal(vector(wanted.payload), vector(again.payload))


def test_supervised_padding_would_be_caught(monkeypatch):
    """The law above bites: let one padded position have a loss, and the result depends on it."""
    from fedlora.data import batches

    def faulty(rows, loss, states):
        good = batches_collate(rows, loss, states)
        flat = good.inputs.flatten()
        pads = [i for i in range(len(flat) - 1) if i not in set(good.positions.tolist())]
        extra = torch.tensor(pads[-1:], dtype=torch.int64)
        return batches.Batch(
            good.inputs,
            torch.cat([good.positions, extra]),
            torch.cat([good.targets, flat[extra]]),
        )

    batches_collate = batches.collate
    plan = LocalPlan(batch_size=4, dropout=0.0)
    monkeypatch.setattr("fedlora.models.language_model.collate", faulty)
    wanted = train(plan)
    monkeypatch.setattr("fedlora.data.batches.PAD", 17)
    assert not torch.equal(vector(wanted.payload), vector(train(plan).payload))


@pytest.mark.parametrize("name", NETWORKS)
def test_selected_logits_are_the_full_logits(name):
    from fedlora.data.batches import collate

    resident = model(name)
    batch = collate(HELD, "response")
    with torch.no_grad():
        all_of_them = resident.network(input_ids=batch.inputs).logits.flatten(0, 1)
        wanted = all_of_them[batch.positions]
        torch.testing.assert_close(
            supervised_logits(resident.network, batch), wanted, rtol=1e-12, atol=1e-12
        )
        resident.network.get_output_embeddings = lambda: None
        assert torch.equal(supervised_logits(resident.network, batch), wanted)


def test_the_result_does_not_depend_on_global_randomness_and_leaves_it_alone():
    plan = LocalPlan(dropout=0.4, epochs=2)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = train(plan)
    resident = model()  # building one seeds the generator; training must not
    torch.set_rng_state(before[0])
    work = job(start(resident), plan)
    second = LoRAClient(resident, FakeStore({0: HELD}), work.client, SEED).train(work)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(vector(first.payload), vector(second.payload))


@pytest.mark.parametrize("what", ["round", "seed", "client"])
def test_dropout_and_order_have_their_own_stream(what):
    resident = model()
    store = FakeStore({0: HELD, 1: HELD})
    factors = start(resident)
    base = job(factors, LocalPlan(dropout=0.4))
    other = {
        "round": dataclasses.replace(base, round=4),
        "seed": dataclasses.replace(base, seed=SEED + 1),
        "client": dataclasses.replace(base, client=client(factors, 1)),
    }[what]
    one, two = (LoRAClient(resident, store, j.client, j.seed).train(j) for j in (base, other))
    assert not torch.equal(vector(one.payload), vector(two.payload))


def test_one_sgd_step_from_b_zero_moves_b_alone_and_by_the_gradient_of_the_delta():
    """dA = 0; dB = -lr s G (A x)^T = -lr s (dL/dW) A^T, G being the gradient of the output."""
    resident = model("llama")
    factors = LowRankPayload(
        {p: Factors(f.a, torch.zeros_like(f.b), f.alpha) for p, f in start(resident, 3).items()}
    )
    lr = 0.7
    plan = LocalPlan(optimizer="sgd", lr=lr, steps=1, batch_size=7, max_grad_norm=0, dropout=0.0)
    work = job(factors, plan)
    update = LoRAClient(resident, FakeStore({0: HELD}), work.client, SEED).train(work)
    network = NETWORKS["llama"]()
    ids, mask, labels = padded(HELD, "full")
    labels[mask == 0] = -100
    logits = network(input_ids=ids, attention_mask=mask).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    ).backward()
    for path, f in factors.items():
        got = update.adapter[path]
        dense = network.get_submodule(path).weight.grad
        assert torch.equal(got.a, f.a)
        torch.testing.assert_close(got.b, -lr * f.scale * dense @ f.a.T, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("part", ["a", "b"])
def test_a_frozen_factor_keeps_every_bit(part):
    update = train(LocalPlan(epochs=2, **{f"train_{part}": False}))
    other = {"a": "b", "b": "a"}[part]
    for path, f in start(model()).items():
        assert torch.equal(getattr(update.adapter[path], part), getattr(f, part))
        assert not torch.equal(getattr(update.adapter[path], other), getattr(f, other))


def test_sparse_values_train_and_nothing_else_moves():
    resident = model("llama")
    density = 0.2
    names = {m.path: m for m in resident.info.modules}
    from fedlora.core.seeding import mask_noise

    masks = {p: mask_noise(5, p, m.d_out, m.d_in) < density for p, m in names.items()}
    zero = {p: torch.zeros(int(k.sum()), dtype=torch.float64) for p, k in masks.items()}
    begin = SparseDelta(5, density, zero)
    work = job(begin, LocalPlan(epochs=4, dropout=0.1, max_grad_norm=0.3))
    before = {p: resident.effective_weight(p) for p in names}
    update = LoRAClient(resident, FakeStore({0: HELD}), work.client, SEED).train(work)
    assert isinstance(update.payload, SparseDelta)
    assert (update.payload.seed, update.payload.density) == (5, density)
    resident.mount(update.payload)
    for p, mask in masks.items():
        after = resident.effective_weight(p)
        assert torch.equal(after[~mask], before[p][~mask])
        assert not torch.equal(after[mask], before[p][mask])
    resident.unmount()
    assert all(torch.equal(resident.effective_weight(p), before[p]) for p in names)


def test_the_update_differs_from_its_start_which_is_left_alone():
    resident = model()
    factors = start(resident)
    copy = vector(factors).clone()
    work = job(factors, LocalPlan())
    update = LoRAClient(resident, FakeStore({0: HELD}), work.client, SEED).train(work)
    assert torch.equal(vector(factors), copy)
    moved = distance(update.payload, factors)
    assert moved > 1e-3
    assert update.metrics["delta_norm"] == pytest.approx(moved, rel=1e-12)
    assert not resident.parameters()


# --- self-pruning --------------------------------------------------------------------------------


def test_the_penalty_pulls_on_the_tail_alone():
    """The difference that the penalty makes to one SGD step is its own gradient."""
    prune = SelfPrune(weight=0.3, gamma=0.5, min_rank=1)
    plan = LocalPlan(optimizer="sgd", lr=0.1, steps=1, batch_size=7, max_grad_norm=0, dropout=0.0)
    held_at = selfprune.keep(4, 0.5)
    factors = start(model(), 4)
    plain = train(plan, rank=4)
    resident = model()
    work = job(factors, dataclasses.replace(plan, technique=LoRA(prune)))
    parameters = resident.mount(factors)
    loop.optimise(resident, parameters, HELD, work.plan, seed=SEED, round=3, client=0)
    pulled = resident.payload()
    for path, f in factors.items():
        a, b = f.a[held_at:], f.b[:, held_at:]
        da = (pulled[path].a - plain.adapter[path].a) / (-0.1)
        db = (pulled[path].b - plain.adapter[path].b) / (-0.1)
        assert torch.equal(pulled[path].a[:held_at], plain.adapter[path].a[:held_at])
        assert torch.equal(pulled[path].b[:, :held_at], plain.adapter[path].b[:, :held_at])
        close = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(da[held_at:], 0.3 * b.norm() * a / a.norm(), **close)
        torch.testing.assert_close(db[:, held_at:], 0.3 * a.norm() * b / b.norm(), **close)


@pytest.mark.parametrize("micro", [0, 1, 3])
def test_the_penalty_counts_once_per_step_however_the_batch_is_cut(micro):
    plan = LocalPlan(
        optimizer="sgd",
        lr=0.1,
        batch_size=7,
        dropout=0.0,
        technique=LoRA(SelfPrune(weight=0.3, gamma=0.5, min_rank=4)),
    )
    whole = train(plan, rank=4)
    cut = train(dataclasses.replace(plan, micro_batch_size=micro), rank=4)
    assert distance(whole.payload, cut.payload) <= 1e-12


def test_a_client_whose_tail_shrank_sends_less_and_says_so():
    strong = LocalPlan(lr=0.02, epochs=4, technique=LoRA(SelfPrune(5.0, 0.5, 1)))
    update = train(strong, rank=4)
    assert set(update.client.ranks.values()) == {2}
    assert {f.rank for f in update.adapter.values()} == {2}
    assert update.client.id == 0 and update.client.num_examples == 7


def test_a_tail_that_grew_stays_and_b_zero_never_prunes():
    resident = model()
    factors = LowRankPayload(
        {p: Factors(f.a, torch.zeros_like(f.b), f.alpha) for p, f in start(resident, 4).items()}
    )
    work = job(factors, LocalPlan(technique=LoRA(SelfPrune(0.01, 0.5, 1))))
    update = LoRAClient(resident, FakeStore({0: HELD}), work.client, SEED).train(work)
    assert update.client == work.client
    assert torch.isfinite(vector(update.payload)).all()


# --- pieces --------------------------------------------------------------------------------------


def test_learning_rates_are_those_of_the_table():
    def rates(steps, **plan):
        return pytest.approx(learning_rates(steps, LocalPlan(lr=2.0, **plan)), rel=1e-15)

    assert rates(4, schedule="linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(4, schedule="constant") == [2.0] * 4
    assert rates(4, schedule="cosine") == [
        2 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)
    ]
    assert rates(4, schedule="linear", warmup=0.5) == [2 / 3, 4 / 3, 2.0, 1.0]
    assert rates(4, schedule="constant", warmup=0.25) == [1.0, 2.0, 2.0, 2.0]
    assert rates(4, schedule="cosine", warmup=0.5) == [2 / 3, 4 / 3, 2.0, 1.0]
    assert rates(3, schedule="linear", warmup=1.0) == [0.5, 1.0, 1.5]
    assert rates(1, schedule="linear") == [2.0]


@LAWS
@given(
    steps=st.integers(1, 60),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
)
def test_no_step_is_wasted_and_none_exceeds_the_peak(steps, warmup, schedule):
    rates = learning_rates(steps, LocalPlan(lr=0.3, warmup=warmup, schedule=schedule))
    assert len(rates) == steps
    assert all(0 < rate <= 0.3 for rate in rates)


def test_flat_parameters_share_storage_and_give_it_back():
    ps = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(4))]
    values = [p.detach().clone() for p in ps]
    flat = FlatParameters([*ps, torch.nn.Parameter(torch.randn(2, dtype=torch.float64))])
    assert [b.dtype for b in flat.buffers] == [torch.float32, torch.float64]
    assert all(torch.equal(p, v) for p, v in zip(ps, values, strict=True))
    (ps[0].sum() * 3 + ps[1].sum()).backward()
    assert flat.grads[0].tolist() == [3.0] * 6 + [1.0] * 4
    with torch.no_grad():
        flat.buffers[0] += 1
    assert torch.equal(ps[1], values[1] + 1)
    assert float(flat.change()) == pytest.approx(math.sqrt(10), rel=1e-6)
    flat.zero_grad()
    assert ps[0].grad is not None and ps[0].grad.abs().sum() == 0
    flat.release()
    assert ps[0].grad is None


def test_bf16_autocast_is_close_and_not_the_same():
    plan = LocalPlan(dropout=0.0, epochs=2)
    resident = model("llama")
    resident.network.float()
    store = FakeStore({0: HELD})
    results = []
    for autocast in ("none", "bf16"):
        work = job(start(resident), dataclasses.replace(plan, autocast=autocast))
        results.append(LoRAClient(resident, store, work.client, SEED).train(work))
    exact, rough = (u.metrics["loss"] for u in results)
    assert exact != rough
    assert rough == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_diverging_client_says_at_which_step_and_with_which_settings(optimizer):
    plan = LocalPlan(
        optimizer=optimizer, lr=1e200, max_grad_norm=0.0, epochs=3, schedule="constant"
    )
    with pytest.raises(
        FloatingPointError, match=r"(loss is (nan|inf) at step \d|is not finite)"
    ) as e:
        train(plan)
    assert "client.lr=1e+200" in str(e.value)


def test_an_update_that_overflows_in_the_last_step_is_refused():
    with pytest.raises(FloatingPointError, match="not finite after step 1"):
        train(LocalPlan(optimizer="sgd", lr=1e305, weight_decay=1e305, max_grad_norm=0.0, steps=1))


def test_metrics_count_what_was_done():
    plan = LocalPlan(batch_size=3, epochs=2, dropout=0.0, lr=0.0)
    update = train(plan)
    tokens = sum(len(e.input_ids) - 1 for e in HELD)
    m = update.metrics
    assert (m["steps"], m["tokens"], m["examples"]) == (6, 2 * tokens, 7)
    assert m["delta_norm"] == 0 and m["grad_norm"] > 0
    assert m["seconds"] > 0 and m["cpu_seconds"] > 0
    each = [train(dataclasses.replace(plan, epochs=1), held=[e]).metrics["loss"] for e in HELD]
    sizes = [len(e.input_ids) - 1 for e in HELD]
    assert m["loss"] == pytest.approx(np.dot(each, sizes) / tokens, rel=1e-12)
