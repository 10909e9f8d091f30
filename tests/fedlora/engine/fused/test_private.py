"""Private steps: one example is bounded, and both engines give the gradients of single examples."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from fedlora.core.example_privacy import ExamplePrivacy
from fedlora.core.payload import Payload
from fedlora.core.seeding import mask_noise
from fedlora.core.types import Factors, LocalPlan
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.techniques.sparse.technique import Sparse
from fedlora.training import private
from fedlora.training.flat import FlatParameters
from tests.fedlora.engine.fused.harness import (
    alone,
    assert_equal,
    by_client,
    engine,
    mixed,
    resident,
    trained,
)
from tests.fedlora.engine.world import FakeStore, examples, job, start, vector
from tests.fedlora.techniques.cores.test_training import cores

PLAN = LocalPlan(optimizer="sgd", lr=0.1, batch_size=4, dropout=0.0, max_grad_norm=0.0, steps=3)
SHARP = ExamplePrivacy(clip=0.05, sigma=0.7)
WHO = {"seed": 11, "round": 3, "client": 0}


def with_privacy(privacy: ExamplePrivacy, **changes: object) -> LocalPlan:
    return dataclasses.replace(PLAN, privacy=privacy, **changes)  # type: ignore[arg-type]


def sparse(on) -> Payload:
    """A start of the first stage of ``strategy=slora``."""
    masks = {m.path: mask_noise(5, m.path, m.d_out, m.d_in) < 0.2 for m in on.info.modules}
    g = torch.Generator().manual_seed(1)
    values = {
        p: 0.1 * torch.randn(int(m.sum()), generator=g, dtype=torch.float64)
        for p, m in masks.items()
    }
    return SparseDelta(5, 0.2, values)


STARTS = {
    "sparse": (sparse, Sparse(), True),
    "cores": (lambda on: cores(on, (2, 1), 1), PLAN.technique, False),
    "gains": (lambda on: cores(on, (2, 1), 1, gains=True), PLAN.technique, False),
}
"""What trains beside factors: a start, the technique, and whether its plan has ``train_a``."""


def gradient_of(
    held, plan: LocalPlan, on: str = "llama", begin: Payload | None = None
) -> torch.Tensor:
    """The gradient of one private step over these examples, as one row."""
    model = resident(on)
    begin = begin or start(model, mixed, seed=1)
    try:
        parameters = model.mount(begin, train_a=plan.train_a, train_b=plan.train_b)
        flat = FlatParameters(parameters)
        private.add_private_gradient(model, flat, held, plan, iter(range(99)), step=0, stream=WHO)
        return torch.cat([g.clone() for g in flat.grads])
    finally:
        model.unmount()


def by_autograd(
    held, plan: LocalPlan, on: str = "llama", begin: Payload | None = None
) -> list[torch.Tensor]:
    """The gradient of each example's own mean loss, without any code of the product's steps."""
    model, found = resident(on), []
    begin = begin or start(model, mixed, seed=1)
    for example in held:
        try:
            parameters = model.mount(begin, train_a=plan.train_a, train_b=plan.train_b)
            batch = model.collate([example], plan.loss)
            loss = functional.cross_entropy(model.logits(batch), batch.targets)
            grads = torch.autograd.grad(loss, parameters)
            found.append(torch.cat([g.reshape(-1) for g in grads]))
        finally:
            model.unmount()
    return found


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_a_step_without_noise_and_clip_is_the_mean_of_gradients_by_example(sides, on) -> None:
    plan = with_privacy(ExamplePrivacy(math.inf, 0.0), train_a=sides[0], train_b=sides[1])
    held = examples(4, 5)
    want = torch.stack(by_autograd(held, plan, on)).sum(0) / 4
    got = gradient_of(held, plan, on)
    assert float((got - want).abs().max()) <= 1e-12
    clipped = with_privacy(ExamplePrivacy(0.05, 0.0), train_a=sides[0], train_b=sides[1])
    each = [g * min(1, 0.05 / float(g.norm())) for g in by_autograd(held, plan, on)]
    assert float((gradient_of(held, clipped, on) - sum(each) / 4).norm()) <= 2e-6 * 0.05
    assert gradient_of([], clipped, on).norm() == 0


@pytest.mark.parametrize("kind", STARTS)
def test_every_scalar_that_trains_in_place_of_factors_is_clipped_and_noised(kind: str) -> None:
    """Law: of values under a mask and of cores too, the step is the noised mean of the gradients of
    single examples, each clipped as a whole; one example moves it by at most the clip."""
    make, technique, train_a = STARTS[kind]
    begin = make(resident("llama"))
    quiet = with_privacy(ExamplePrivacy(0.05, 0.0), technique=technique, train_a=train_a)
    held = examples(4, 5)
    grads = by_autograd(held, quiet, begin=begin)
    assert min(float(g.norm()) for g in grads) > 0.05, "nothing is clipped: the test says nothing"
    each = [g * min(1, 0.05 / float(g.norm())) for g in grads]
    got = gradient_of(held, quiet, begin=begin)
    assert float((got - sum(each) / 4).norm()) <= 2e-6 * 0.05
    noisy = gradient_of(held, dataclasses.replace(quiet, privacy=SHARP), begin=begin)
    assert bool(((noisy - got) != 0).all()), "some scalar that trains has no noise"
    assert float((noisy - got).std()) == pytest.approx(0.05 * 0.7 / 4, rel=0.3)
    less = gradient_of(held[1:], dataclasses.replace(quiet, privacy=SHARP), begin=begin)
    assert float((noisy - less).norm()) <= 0.05 / 4 * (1 + 1e-9)


@pytest.mark.parametrize("kind", STARTS)
def test_the_fused_engine_trains_them_as_the_sequential_one_and_says_so(kind: str) -> None:
    make, technique, train_a = STARTS[kind]
    plan = with_privacy(SHARP, technique=technique, train_a=train_a)
    store = FakeStore({k: examples(5, k) for k in range(2)})
    jobs = [job(make(resident("llama")), plan, 0), job(start(resident("llama")), PLAN, 1)]
    fused, wanted = engine(store=store), alone(jobs, store)
    got = by_client(fused.train(jobs))
    assert any("one by one" in note for note in fused.notes())
    assert not any("failed" in note for note in fused.notes())
    assert torch.equal(vector(got[0].payload), vector(wanted[0].payload))
    assert_equal(got[1], wanted[1])


def test_one_example_moves_a_step_by_at_most_the_clip_over_the_batch() -> None:
    """Also one whose gradient is a thousand times that of the others, and whatever its tokens."""
    held, plan = examples(5, 2, longest=30), with_privacy(ExamplePrivacy(0.05, 0.7))
    whole = gradient_of(held, plan)
    moved = []
    for k in range(5):
        less = gradient_of([e for i, e in enumerate(held) if i != k], plan)
        moved.append(float((whole - less).norm()))
    assert max(moved) <= 0.05 / 4 * (1 + 1e-9)
    assert max(moved) >= 0.04 / 4, "nothing was clipped: the test says nothing"


def test_noise_is_a_function_of_the_step_and_has_its_size() -> None:
    shapes = [(300, 400), (500, 2)]
    one = SHARP.noise(shapes, 0, **WHO)
    assert [tuple(x.shape) for x in one] == shapes
    assert float(one[0].std()) == pytest.approx(0.05 * 0.7, rel=0.01)
    for other, same in (
        (SHARP.noise(shapes, 0, **WHO), True),
        (SHARP.noise(shapes, 1, **WHO), False),
        (SHARP.noise(shapes, 0, **WHO | {"round": 4}), False),
        (SHARP.noise(shapes, 0, **WHO | {"client": 1}), False),
    ):
        assert torch.equal(one[0], other[0]) == same
    real = dataclasses.replace(SHARP, seeded=False)
    assert not torch.equal(real.noise(shapes, 0, **WHO)[0], real.noise(shapes, 0, **WHO)[0])
    drawn = [[b.tolist() for b in real.batches(20, 5, 3, **WHO)] for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_batches_have_the_expected_size() -> None:
    sizes = [len(b) for b in SHARP.batches(40, 4, 3000, **WHO)]
    assert sum(sizes) / 3000 == pytest.approx(4, abs=4 * math.sqrt(3.6 / 3000))
    assert [b.tolist() for b in SHARP.batches(3, 4, 2, **WHO)] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("on", ["llama", "gpt2"])
@pytest.mark.parametrize("train_a", [True, False])
def test_the_fused_engine_is_the_sequential_one(on: str, train_a: bool) -> None:
    """Ragged and padded, with dropout, micro-batches, empty steps and unequal ranks."""
    plan = with_privacy(
        SHARP,
        train_a=train_a,
        dropout=0.25,
        micro_batch_size=2,
        steps=8,
        batch_size=2,
        loss="response",
        momentum=0.5,
    )
    counts = (4, 7, 10)
    store = FakeStore({k: examples(n, k) for k, n in enumerate(counts)})
    jobs = [job(start(resident(on), 1 + k, k), plan, k) for k in range(3)]
    sizes = [
        len(b) for k, n in enumerate(counts) for b in SHARP.batches(n, 2, 8, **WHO | {"client": k})
    ]
    assert min(sizes) == 0 and max(sizes) > 2
    fused, wanted = trained(jobs, store, on), alone(jobs, store, on)
    for k, update in wanted.items():
        assert_equal(fused[k], update)


def test_a_private_round_says_what_it_was_and_moves() -> None:
    store = FakeStore({0: examples(6, 1)})
    plan = with_privacy(SHARP)
    (update,) = alone([job(start(resident("llama"), 2, 1), plan, 0)], store).values()
    assert update.metrics["tokens"] > 0
    assert update.metrics["delta_norm"] > 0
    quiet = with_privacy(ExamplePrivacy(0.05, 0.0))
    (other,) = alone([job(start(resident("llama"), 2, 1), quiet, 0)], store).values()
    assert all(isinstance(f, Factors) for f in other.adapter.values())
    assert other.metrics["delta_norm"] < update.metrics["delta_norm"]


def test_a_client_whose_steps_drew_no_example_sends_noise() -> None:
    plan = with_privacy(SHARP, steps=1, batch_size=1)
    who = next(k for k in range(99) if not len(next(SHARP.batches(3, 1, 1, **WHO | {"client": k}))))
    store = FakeStore({who: examples(3, 1, longest=5)})
    jobs = [job(start(resident("llama"), 2, 1), plan, who)]
    (one,), (two,) = alone(jobs, store).values(), trained(jobs, store).values()
    assert one.metrics["tokens"] == 0 == one.metrics["loss"]
    assert one.metrics["delta_norm"] > 0
    assert_equal(two, one)
