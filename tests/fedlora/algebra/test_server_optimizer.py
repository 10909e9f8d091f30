"""Server optimizers against their equations."""

import pytest
import torch
from torch import Tensor

from fedlora.algebra.server_optimizer import (
    FedAdam,
    FedAvgM,
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


def test_adam_is_the_papers_algorithm() -> None:
    o = FedAdam(lr=0.1, beta1=0.9, beta2=0.99, tau=1e-2)
    w = run(o, 2)
    for name in OLD:
        d, m = MEAN[name] - OLD[name], torch.zeros_like(OLD[name])
        v, want = torch.full_like(m, 1e-4), OLD[name]
        for _ in range(2):
            m = 0.9 * m + 0.1 * d
            v = 0.99 * v + 0.01 * d**2
            want = want + 0.1 * m / (v.sqrt() + 1e-2)
        torch.testing.assert_close(w[name], want)


@pytest.mark.parametrize("optimizer", [NoServerOptimizer(), FedAvgM(), FedAdam()])
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
    ):
        with pytest.raises(ValueError, match=r"server_optimizer\.\w+="):
            wrong()
    with pytest.raises(TypeError, match="choose one of its subclasses"):
        ServerOptimizer().step(OLD, MEAN, {})
