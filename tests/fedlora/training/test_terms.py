"""The proximal term: its gradient, what it is a function of, and what it does to a client."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fedlora.core.payload import Payload
from fedlora.core.seeding import mask_noise
from fedlora.core.terms import LocalTerm, TrainedLayer, TrainedState
from fedlora.core.types import Adapter, Factors, LocalPlan
from fedlora.models.head import head_parameters
from fedlora.models.headed import WithHead
from fedlora.models.language_model import LanguageModel
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.training.flat import FlatParameters, trained_state
from fedlora.training.loop import Trace, optimise
from fedlora.training.terms import FedProx
from fedlora.wire.codec import plan_from_json, plan_to_json
from tests.fedlora.engine.world import SEED, distance, examples, model, start, vector
from tests.fedlora.models.classifiers import classifier
from tests.fedlora.models.classifiers import examples as labelled_examples

PLAN = LocalPlan(
    optimizer="sgd",
    lr=0.05,
    steps=6,
    batch_size=3,
    dropout=0.0,
    max_grad_norm=0.0,
    schedule="constant",
)
METRICS = ("factor", "product")


def mixed(i: int) -> int:
    return 1 + i % 3


def train(plan: LocalPlan, factors: Adapter | SparseDelta) -> tuple[Adapter | SparseDelta, Trace]:
    """One client, in float64."""
    on = model("llama")
    parameters = on.mount(factors, plan.dropout, plan.train_a, plan.train_b)
    trace = optimise(on, parameters, examples(7), plan, seed=SEED, round=1, client=0)
    return on.payload(), trace  # type: ignore[return-value]


def moved_state(
    on: LanguageModel, factors: Payload, train_a: bool = True, train_b: bool = True
) -> TrainedState:
    """A client some way from its start, with gradients of its loss."""
    flat = FlatParameters(on.mount(factors, 0.0, train_a, train_b))
    state = trained_state(on, flat)
    g = torch.Generator().manual_seed(3)
    for buffer in state.buffers:
        buffer.now.add_(torch.randn(buffer.now.shape, generator=g, dtype=torch.float64))
        buffer.grad.copy_(torch.randn(buffer.grad.shape, generator=g, dtype=torch.float64))
    return state


def penalty(term: FedProx, layers: list[tuple[Tensor, Tensor]], state: TrainedState) -> Tensor:
    """The term as it is written, with dense products."""
    squares = []
    for (a, b), x in zip(layers, state.layers, strict=True):
        if term.metric == "factor":
            squares += [(a - x.start_a).square().sum(), (b - x.start_b).square().sum()]
        else:
            squares.append((x.scale * (b @ a - x.start_b @ x.start_a)).square().sum())
    return term.mu / 2 * torch.stack(squares).sum()


@pytest.mark.parametrize("trains", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_is_that_of_the_penalty(metric: str, trains: tuple[bool, bool]) -> None:
    """Against autograd, with another rank in every module; a frozen factor has none."""
    on, term = model("llama"), FedProx(0.3, metric)
    state = moved_state(on, start(on, mixed), *trains)
    assert len({x.a.shape[0] for x in state.layers}) == 3
    live = [(x.a.clone().requires_grad_(), x.b.clone().requires_grad_()) for x in state.layers]
    penalty(term, live, state).backward()
    before = [
        [None if grad is None else grad.clone() for grad in (x.grad_a, x.grad_b)]
        for x in state.layers
    ]
    term.add_gradient(state)
    for x, (a, b), (old_a, old_b) in zip(state.layers, live, before, strict=True):
        for new, old, leaf in ((x.grad_a, old_a, a), (x.grad_b, old_b, b)):
            assert (new is None) == (old is None)
            if new is not None and old is not None:
                assert leaf.grad is not None
                torch.testing.assert_close(new - old, leaf.grad, rtol=1e-12, atol=1e-13)
    assert [x.grad_a is not None for x in state.layers] == [trains[0]] * len(state.layers)
    assert [x.grad_b is not None for x in state.layers] == [trains[1]] * len(state.layers)


@pytest.mark.parametrize("trains", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("travels", [True, False])
@pytest.mark.parametrize("metric", METRICS)
def test_a_head_is_pulled_to_its_start_if_it_is_federated(
    metric: str, travels: bool, trains: tuple[bool, bool]
) -> None:
    """Against autograd: an averaged head under both metrics, a client's own under none."""
    on, term = classifier("bert"), FedProx(0.3, metric)
    head = {n: p.detach().clone() for n, p in head_parameters(on.network).items()}
    state = moved_state(on, WithHead(start(on, mixed), head, travels), *trains)
    live = {n: on.network.get_parameter(n).detach().clone().requires_grad_() for n in head}
    squares = [(h - head[n]).square().sum() for n, h in live.items()]
    (term.mu / 2 * torch.stack(squares).sum() * travels).backward()
    before = {n: gradient(on, n).clone() for n in head}
    factors = [g.clone() for x in state.layers for g in (x.grad_a, x.grad_b) if g is not None]
    term.add_gradient(state)
    for n, h in live.items():
        assert h.grad is not None
        torch.testing.assert_close(gradient(on, n) - before[n], h.grad, rtol=1e-12, atol=1e-13)
        assert bool((gradient(on, n) != before[n]).any()) == travels
    pulled = [g for x in state.layers for g in (x.grad_a, x.grad_b) if g is not None]
    assert all(bool((g != old).any()) for g, old in zip(pulled, factors, strict=True))


def gradient(on: LanguageModel, name: str) -> Tensor:
    found = on.network.get_parameter(name).grad
    assert found is not None
    return found


@pytest.mark.parametrize("travels", [True, False])
@pytest.mark.parametrize("metric", METRICS)
def test_no_weight_is_no_term_for_a_head(metric: str, travels: bool) -> None:
    """Bit by bit, and a client's own head trains as without a term of the factors' start."""

    def trained(term: LocalTerm | None) -> tuple[Payload | None, Trace]:
        on = classifier("bert")
        head = {n: p.detach().clone() for n, p in head_parameters(on.network).items()}
        parameters = on.mount(WithHead(start(on, 2), head, travels))
        held, plan = labelled_examples(7), replace(PLAN, term=term)
        trace = optimise(on, parameters, held, plan, seed=SEED, round=1, client=0)
        return on.payload(), trace

    (none, traced), (zero, trace) = trained(None), trained(FedProx(0.0, metric))
    assert none is not None
    assert zero is not None
    assert torch.equal(vector(none), vector(zero))
    assert trace == traced


def rescaled(x: TrainedLayer, c: float) -> TrainedLayer:
    """The same update by other factors."""
    zero_a, zero_b = torch.zeros_like(x.a), torch.zeros_like(x.b)
    return replace(x, a=c * x.start_a, b=x.start_b / c, grad_a=zero_a, grad_b=zero_b)


def test_the_product_metric_sees_updates_and_the_factor_metric_factors() -> None:
    on = model("llama")
    layers = [rescaled(x, 4.0) for x in moved_state(on, start(on, 2)).layers]
    FedProx(1.0, "product").add_gradient(TrainedState([], layers))
    assert all(float(x.grad_a.abs().max()) < 1e-13 for x in layers if x.grad_a is not None)
    assert all(float((x.a - x.start_a).norm()) > 1 for x in layers)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("metric", METRICS)
def test_no_weight_is_no_term(metric: str, optimizer: str) -> None:
    """Bit by bit; with weight there is one."""
    factors = start(model("llama"), mixed)
    plan = replace(PLAN, optimizer=optimizer, lr=0.01)
    none, traced = train(plan, factors)
    zero, trace = train(replace(plan, term=FedProx(0.0, metric)), factors)
    assert torch.equal(vector(none), vector(zero))
    assert trace == traced
    some, _ = train(replace(plan, term=FedProx(0.1, metric)), factors)
    assert distance(some, none) > 1e-6


@pytest.mark.parametrize("metric", METRICS)
def test_the_first_step_is_that_of_the_loss(metric: str) -> None:
    factors, plan = start(model("llama"), mixed), replace(PLAN, steps=1)
    none, _ = train(plan, factors)
    pulled, _ = train(replace(plan, term=FedProx(7.0, metric)), factors)
    assert torch.equal(vector(none), vector(pulled))


def products(adapter: Adapter) -> Tensor:
    return torch.cat([f.delta().reshape(-1) for f in adapter.values()])


@pytest.mark.parametrize(("metric", "mu", "part"), [("factor", 100.0, 0.1), ("product", 1.0, 0.4)])
def test_a_large_weight_holds_the_client_at_its_start(metric: str, mu: float, part: float) -> None:
    """In the metric's own terms."""
    factors, plan = start(model("llama"), 2), replace(PLAN, lr=0.005, steps=100)
    moved = []
    for term in (None, FedProx(mu, metric)):
        found, _ = train(replace(plan, term=term), factors)
        assert isinstance(found, LowRankPayload)
        gap = products(found) - products(factors)
        moved.append(distance(found, factors) if metric == "factor" else float(gap.norm()))
    assert moved[1] < part * moved[0]


def test_other_parameters_have_a_factor_metric_and_no_product() -> None:
    """Values of a sparse mask: the entries of the update themselves."""
    on = model("llama")
    masks = {m.path: mask_noise(5, m.path, m.d_out, m.d_in) < 0.2 for m in on.info.modules}
    zeros = {p: torch.zeros(int(m.sum()), dtype=torch.float64) for p, m in masks.items()}
    delta = SparseDelta(5, 0.2, zeros)
    free, _ = train(PLAN, delta)
    held, _ = train(replace(PLAN, term=FedProx(5.0)), delta)
    assert float(vector(held).norm()) < 0.8 * float(vector(free).norm())
    with pytest.raises(ValueError, match=r"metric=product .* use client\.term\.metric=factor"):
        train(replace(PLAN, term=FedProx(5.0, "product")), delta)


def test_the_pull_is_clipped_with_the_gradient() -> None:
    factors = start(model("llama"), 2)
    plan = replace(PLAN, max_grad_norm=0.1, lr=0.5)
    _, trace = train(replace(plan, term=FedProx(1e3)), factors)
    assert trace.grad_norms[-1] > 1  # measured before clipping
    assert trace.delta_norm <= 0.5 * 0.1 * PLAN.steps + 1e-12


def test_a_plan_with_a_term_travels() -> None:
    plan = replace(PLAN, term=FedProx(0.5, "product"))
    assert plan_from_json(plan_to_json(plan)) == plan


@pytest.mark.parametrize(("key", "value"), [("mu", -1.0), ("metric", "weight")])
def test_impossible_settings_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"client\.term\.{key}"):
        FedProx(**{key: value})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Drift(LocalTerm):
    """A linear term, as of a method that corrects drift."""

    slope: float = 0.01

    def add_gradient(self, state: TrainedState) -> None:
        for buffer in state.buffers:
            buffer.grad.add_(self.slope)


def test_a_term_of_ones_own_needs_no_change_of_the_loop() -> None:
    factors = start(model("llama"), 2)
    plan = replace(PLAN, steps=1)
    plain, _ = train(plan, factors)
    drifted, _ = train(replace(plan, term=Drift()), factors)
    gap = vector(plain) - vector(drifted)
    torch.testing.assert_close(gap, torch.full_like(gap, 0.01 * PLAN.lr), rtol=1e-9, atol=1e-15)


def test_factors_of_the_start_are_not_changed() -> None:
    factors = start(model("llama"), 2)
    kept = {p: Factors(f.a.clone(), f.b.clone(), f.alpha) for p, f in factors.items()}
    train(replace(PLAN, term=FedProx(0.5, "product")), factors)
    assert torch.equal(vector(factors), vector(kept))
