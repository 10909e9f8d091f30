"""Server optimizers against their equations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlora.algebra.server_optimizer import (
    Adaptive,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    NoServerOptimizer,
    ServerOptimizer,
)

OLD = {"x": torch.tensor([1.0, 2.0]).double(), "y": torch.tensor([[3.0]]).double()}
MEAN = {"x": torch.tensor([1.5, 1.0]).double(), "y": torch.tensor([[3.25]]).double()}


def run(optimizer: ServerOptimizer, steps: int) -> dict[str, Tensor]:
    """Steps whose pseudo-gradient is always ``MEAN - OLD``."""
    w, memory = dict(OLD), optimizer.init(OLD)
    for _ in range(steps):
        average = {k: w[k] + MEAN[k] - OLD[k] for k in w}
        w, memory = optimizer.step(w, average, memory)
    return w


@pytest.mark.parametrize("optimizer", [NoServerOptimizer(), FedAvgM(lr=1.0, momentum=0.0)])
def test_the_average_is_a_special_case(optimizer: ServerOptimizer) -> None:
    new, _ = optimizer.step(OLD, MEAN, optimizer.init(OLD))
    for name, t in MEAN.items():
        torch.testing.assert_close(new[name], t, rtol=1e-15, atol=1e-15)


def test_momentum_accumulates() -> None:
    w = run(FedAvgM(lr=0.5, momentum=0.9), 3)
    factor = 0.5 * (1 + (1 + 0.9) + (1 + 0.9 + 0.81))
    torch.testing.assert_close(w["x"], OLD["x"] + factor * (MEAN["x"] - OLD["x"]))


def papers(o: Adaptive, name: str, steps: int) -> Tensor:
    """Algorithm 2 of arXiv:2003.00295 with a constant pseudo-gradient, number by number."""
    found = []
    for w, d in zip(OLD[name].flatten().tolist(), (MEAN[name] - OLD[name]).flatten(), strict=True):
        m, v, d = 0.0, o.tau**2, float(d)
        for _ in range(steps):
            m = o.beta1 * m + (1 - o.beta1) * d
            if isinstance(o, FedYogi):
                v = v - (1 - o.beta2) * d * d * ((v > d * d) - (v < d * d))
            elif isinstance(o, FedAdam):
                v = o.beta2 * v + (1 - o.beta2) * d * d
            else:
                v = v + d * d
            w = w + o.lr * m / (v**0.5 + o.tau)
        found.append(w)
    return torch.tensor(found, dtype=torch.float64).view_as(OLD[name])


ADAPTIVE = [
    FedAdam(lr=0.1, tau=1e-2),
    FedYogi(lr=0.1, beta2=0.7, tau=0.4),  # its v is passed by some changes and not by others
    FedAdagrad(lr=0.1, tau=1e-2),
    FedAdagrad(lr=0.1, beta1=0.8),
]


@pytest.mark.parametrize("optimizer", ADAPTIVE)
def test_adaptive_steps_are_the_papers(optimizer: Adaptive) -> None:
    w = run(optimizer, 5)
    for name in OLD:
        torch.testing.assert_close(w[name], papers(optimizer, name, 5), rtol=1e-13, atol=1e-13)


values = st.floats(1e-6, 1e6)


@given(v=values, change=values, beta2=st.floats(0, 0.999))
def test_yogi_moves_by_no_more_than_the_last_change(v: float, change: float, beta2: float) -> None:
    """And never below zero; Adam forgets a v that is much larger faster."""
    before, squared = (torch.tensor(x, dtype=torch.float64) for x in (v, change * change))
    o = FedYogi(beta2=beta2)
    after = o.second(before, squared)
    assert after >= 0
    assert (after - before).abs() <= (1 - beta2) * squared + 1e-12 * before
    if squared < before / 2:
        assert FedAdam(beta2=beta2).second(before, squared) <= after + 1e-12 * before


@pytest.mark.parametrize("optimizer", ADAPTIVE)
def test_clients_that_never_moved_leave_the_model(optimizer: Adaptive) -> None:
    w, memory = dict(OLD), optimizer.init(OLD)
    for _ in range(3):
        w, memory = optimizer.step(w, w, memory)
    assert all(torch.equal(w[name], t) for name, t in OLD.items())


def test_adagrad_slows_down_and_adam_does_not() -> None:
    for o, falls in ((FedAdagrad(), True), (FedAdam(beta1=0.0, beta2=0.5), False)):
        moved = [(run(o, n + 1)["y"] - run(o, n)["y"]).abs() for n in (1, 20)]
        assert (float(moved[1] / moved[0]) < 0.5) == falls


@pytest.mark.parametrize("optimizer", [NoServerOptimizer(), FedAvgM(), *ADAPTIVE])
def test_steps_are_pure(optimizer: ServerOptimizer) -> None:
    memory = optimizer.init(OLD)
    before = {k: t.clone() for k, t in (OLD | memory).items()}
    one, two = (optimizer.step(OLD, MEAN, memory) for _ in range(2))
    for x, y in zip(one, two, strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)
    assert all(torch.equal(before[k], t) for k, t in (OLD | memory).items())
    assert set(one[1]) == set(memory)


def test_impossible_values_are_refused() -> None:
    for wrong in (
        lambda: FedAvgM(lr=0),
        lambda: FedAvgM(momentum=1),
        lambda: FedAdam(tau=0),
        lambda: FedAdam(beta1=-0.1),
        lambda: FedAdam(beta2=float("nan")),
        lambda: FedYogi(beta2=1),
        lambda: FedAdagrad(beta1=1),
    ):
        with pytest.raises(ValueError, match=r"server_optimizer\.\w+="):
            wrong()
    with pytest.raises(TypeError, match="choose one of its subclasses"):
        ServerOptimizer().step(OLD, MEAN, {})
    with pytest.raises(TypeError, match="choose a subclass"):
        Adaptive().step(OLD, MEAN, Adaptive().init(OLD))
