"""Cores train alike on both engines, and as plain PyTorch trains them."""

import dataclasses

import pytest
import torch

from fedlora.core.types import TrainJob
from fedlora.engine.fused import Fused
from fedlora.engine.fused.parametrised import Parametrised
from fedlora.engine.sequential import Sequential, SequentialEngine
from fedlora.models.head import head_parameters
from fedlora.models.headed import WithHead
from fedlora.techniques.cores.layer import CoreLayer
from fedlora.techniques.cores.payload import Core, CorePayload
from fedlora.training.terms import FedProx
from tests.fedlora.engine.fused.harness import (
    ADAMW,
    SGD,
    alone,
    assert_equal,
    by_client,
    mixed,
    resident,
    trained,
)
from tests.fedlora.engine.world import NETWORKS, FakeStore, distance, examples, job, model, start
from tests.fedlora.models import classifiers
from tests.fedlora.techniques.cores.plain import labelled_reference, reference
from tests.planted import planted

PLANS = (
    dataclasses.replace(ADAMW, lr=5e-3, steps=8),
    dataclasses.replace(ADAMW, lr=5e-3, steps=8, dropout=0.3),
    dataclasses.replace(ADAMW, steps=6, micro_batch_size=2, dropout=0.1, schedule="cosine"),
    dataclasses.replace(SGD, steps=6, max_grad_norm=0.0, loss="response"),
    dataclasses.replace(SGD, lr=0.05, steps=7, dropout=0.2, warmup=0.3),
)
PLANS = tuple(dataclasses.replace(p, train_a=False) for p in PLANS)
SIZES = ((3,), (2, 2, 1), (1,), (4,), (1, 1, 1))
"""Blocks of the cores of each client."""


def cores(on, sizes, seed: int, gains: bool = False, size: float = 1.0) -> CorePayload:
    g = torch.Generator().manual_seed(seed)
    made = {
        m.path: Core(
            m.d_out,
            m.d_in,
            tuple(size * torch.randn(n, n, generator=g, dtype=torch.float64) for n in sizes),
        )
        for m in on.info.modules
    }
    return CorePayload(made, 12.0, 7, gains)


def jobs(on, gains: bool, plans=PLANS) -> list[TrainJob]:
    return [
        job(cores(on, sizes, k, gains), plan, k)
        for k, (sizes, plan) in enumerate(zip(SIZES, plans, strict=True))
    ]


def scaled(payload: CorePayload) -> dict[str, torch.Tensor]:
    """``s R`` of every module."""
    return {
        path: payload.alpha / core.rank * torch.block_diag(*core.blocks)
        for path, core in payload.cores.items()
    }


def assert_near(got, wanted, tolerance: float = 1e-11) -> None:
    assert got.keys() == wanted.keys()
    for path, due in wanted.items():
        assert float((got[path] - due).norm()) <= tolerance * float(due.norm()), path


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_a_client_is_that_of_plain_pytorch(on, gains):
    """Dropout, parts of batches, clipping, decay; the sequential engine."""
    store = FakeStore({k: examples(7, k) for k in range(len(PLANS))})
    found = alone(jobs(resident(on), gains), store, on)
    for k, task in enumerate(jobs(resident(on), gains)):
        wanted = reference(NETWORKS[on](), task.start, task.plan, store.held[k], k)
        assert_near(scaled(found[k].payload), wanted)
        assert distance(found[k].payload, task.start) > 1e-3


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_both_engines_train_alike_beside_clients_with_factors(on, gains, layout, products):
    store = FakeStore({k: examples(6, k) for k in range(7)})
    tasks = jobs(resident(on), gains)
    tasks += [job(start(resident(on), mixed, k), PLANS[k - 5], k) for k in (5, 6)]
    wanted, found = alone(tasks, store, on), trained(tasks, store, on, layout=layout)
    for k in wanted:
        assert_equal(found[k], wanted[k], tolerance=1e-11)
        assert type(found[k].payload) is type(wanted[k].payload)
        assert distance(found[k].payload, wanted[k].payload) <= 1e-11
        assert found[k].metrics["fused"] == 1.0


def test_a_common_start_is_left_alone_and_its_clients_do_not_meet(products):
    """All share one payload, and with it one row of factors."""
    on = resident("llama")
    common = cores(on, (2, 1), 3, gains=True)
    before = {name: t.clone() for name, t in common.tensors()}
    store = FakeStore({k: examples(6, k) for k in range(5)})
    tasks = [job(common, PLANS[0], k) for k in range(5)]
    wanted, found = alone(tasks, store), trained(tasks, store)
    for k in wanted:
        assert_equal(found[k], wanted[k], tolerance=1e-11)
    assert all(torch.equal(t, before[name]) for name, t in common.tensors())
    once = trained([tasks[0]], FakeStore({0: store.held[0]}))
    assert distance(once[0].payload, found[0].payload) <= 1e-11


@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_fixed_factors_that_come_with_the_start_train_alike(on):
    """They are those of another seed: the result is that of a start of this seed."""
    store = FakeStore({k: examples(6, k) for k in range(len(PLANS))})
    seeded = jobs(resident(on), True)

    def given(start: CorePayload) -> CorePayload:
        cpu = torch.device("cpu")
        bases = {p: start.fixed(p, torch.float64, cpu) for p in start.cores}
        return dataclasses.replace(start, seed=99, bases=bases)

    tasks = [dataclasses.replace(j, start=given(j.start)) for j in seeded]
    wanted, found = alone(tasks, store, on), trained(tasks, store, on)
    plain = alone(seeded, store, on)
    for k in wanted:
        assert_equal(found[k], wanted[k], tolerance=1e-11)
        for path, core in plain[k].payload.cores.items():
            mine = wanted[k].payload.cores[path]
            assert all(torch.equal(x, y) for x, y in zip(mine.blocks, core.blocks, strict=True))


@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_a_proximal_term_pulls_the_cores(on):
    plans = tuple(dataclasses.replace(p, term=FedProx(2.0)) for p in PLANS)
    store = FakeStore({k: examples(6, k) for k in range(len(plans))})
    tasks = jobs(resident(on), True, plans)
    wanted, found = alone(tasks, store, on), trained(tasks, store, on)
    free = alone(jobs(resident(on), True), store, on)
    for k in wanted:
        assert_equal(found[k], wanted[k], tolerance=1e-11)
        assert distance(free[k].payload, wanted[k].payload) > 1e-4


def test_a_core_of_zeros_learns_and_its_gains_come_later():
    """The gradient of R is s Uᵀ G Vᵀ; that of a gain is zero as long as its block is."""
    on = resident("llama")
    plan = dataclasses.replace(SGD, steps=1, weight_decay=0.0, max_grad_norm=0.0)
    store = FakeStore({0: examples(6, 0)})
    one, gained = (
        alone([job(cores(on, (2, 2), 1, gains, size=0.0), plan)], store)[0].payload
        for gains in (False, True)
    )
    assert distance(one, gained) == 0
    assert all(bool((block != 0).all()) for c in one.cores.values() for block in c.blocks)


@pytest.mark.parametrize("how", ["bf16 base", "autocast"])
def test_bfloat16_stays_within_its_own_noise(how, products):
    """The fused engine rounds U R, the sequential one R and U apart."""
    on = model("llama")
    on.network.float()
    plan = dataclasses.replace(PLANS[0], max_grad_norm=1.0)
    store = FakeStore({k: examples(7, k) for k in range(5)})
    tasks = jobs(on, True, (plan,) * 5)
    exact = by_client(SequentialEngine(on, store).train(tasks))
    if how == "autocast":
        half = dataclasses.replace(plan, autocast="bf16")
        tasks = [dataclasses.replace(j, plan=half) for j in tasks]
    else:
        on.network.bfloat16()
    rough = by_client(SequentialEngine(on, store).train(tasks))
    fused = Fused(tokens=60, slots=5, reuse_memory=False).open(on, store)
    found = by_client(fused.train(tasks))
    assert not any("failed" in note for note in fused.notes())
    for k, update in found.items():
        assert update.metrics["fused"] == 1
        assert update.metrics["loss"] == pytest.approx(rough[k].metrics["loss"], rel=2e-2)
        assert all(t.dtype == torch.float32 for _, t in update.payload.tensors())
    fused_noise, noise = (
        sum(distance(of[k].payload, exact[k].payload) for k in exact) for of in (found, rough)
    )
    assert fused_noise < 2 * noise


# ------------------------------------------------------------------------------- classification


FAMILIES = ["bert", "modernbert_mean", "llama", "deberta"]
LABELLED = dataclasses.replace(PLANS[0], steps=5)


def headed(on, sizes, k: int) -> WithHead:
    head = {n: p.detach().clone() for n, p in head_parameters(on.network).items()}
    return WithHead(cores(on, sizes, k), head)


@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers_train_alike_with_their_heads_and_as_plain_pytorch(family):
    on = classifiers.classifier(family)
    held = {k: classifiers.examples(8, k) for k in range(4)}
    tasks = [job(headed(on, sizes, k), LABELLED, k) for k, sizes in enumerate(SIZES[:3])]
    tasks.append(job(cores(on, (2,), 3), dataclasses.replace(PLANS[1], steps=5), 3))
    wanted = by_client(Sequential().open(on, FakeStore(held)).train(tasks))
    engine = Fused(tokens=80, slots=3, reuse_memory=False).open(on, FakeStore(held))
    found = by_client(engine.train(tasks))
    for k in wanted:
        assert distance(found[k].payload, wanted[k].payload) <= 1e-11
        assert found[k].metrics["delta_norm"] == pytest.approx(
            wanted[k].metrics["delta_norm"], rel=1e-11
        )
        if family != "deberta":  # trains one by one
            assert_equal(found[k], wanted[k], tolerance=1e-11)
    for k, task in enumerate(tasks[:3]):
        network = classifiers.network(family)
        due = labelled_reference(
            network,
            task.start.update,
            LABELLED,
            held[k],
            k,
            lambda n: list(head_parameters(n).values()),
        )
        assert_near(scaled(wanted[k].payload.update), due)
        for name, value in wanted[k].payload.head().items():
            close = float((head_parameters(network)[name].detach() - value).norm())
            assert close <= 1e-11 * float(value.norm()), name


# ------------------------------------------------------------------------------- planted faults


def agree() -> None:
    """The laws above on a few clients, in short."""
    on = resident("llama")
    store = FakeStore({k: examples(6, k) for k in range(len(PLANS))})
    tasks = jobs(on, True)
    wanted, found = alone(tasks, store), trained(tasks, store)
    for k in wanted:
        due = reference(NETWORKS["llama"](), tasks[k].start, tasks[k].plan, store.held[k], k)
        assert_near(scaled(wanted[k].payload), due)
        assert_equal(found[k], wanted[k], tolerance=1e-11)


FAULTS = {
    "the factors of the start for ever": (Parametrised.push, "bt.copy_(f.b.detach().t())", "pass"),
    "gradients of all steps add up": (
        Parametrised.push,
        "self.buffer.grad.zero_()",
        "self.buffer.grad.mul_(1)",
    ),
    "gradients of the factors are taken for those of A": (
        Parametrised.pull,
        "(f.b, grad_bt.t())",
        "(f.b, 2 * grad_bt.t())",
    ),
    "a core without its scale": (
        CoreLayer.__call__,
        "alpha=self.scale",
        "alpha=1.0",
    ),
    "dropout behind V": (
        CoreLayer.__call__,
        "x = dropout(x, self.p, self.bits)",
        "pass",
    ),
    "gains stay with the client": (
        CorePayload.retrained,
        "self._product(path, values)",
        'self._product(path, values | {f"{path}/gains": torch.ones(9).double()})',
    ),
}


def test_the_laws_hold() -> None:
    agree()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault) -> None:
    with planted(*FAULTS[fault]), pytest.raises(AssertionError):
        agree()
