"""Server optimizers: what the server does with the difference between an average and what it had.

The difference is a pseudo-gradient ``Δ``; the average itself is recovered by adding it. From Hsu
et al., arXiv:1909.06335 (FedAvgM) and Reddi et al., arXiv:2003.00295 (FedAdam, FedYogi,
FedAdagrad). The last three scale every entry by itself: on factors they depend on the basis that
the factors happen to have, and on a dense update their steps are of full rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedlora.core.checks import at_least

Named: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class ServerOptimizer:
    """Maps (what the server had, the clients' average, own state) to (new parameters, own state).

    Pure: nothing is changed in place. States are named tensors, one per parameter and moment.
    """

    def init(self, parameters: Named) -> dict[str, Tensor]:
        """The optimizer's state before the first step."""
        return {}

    def step(
        self, old: Named, average: Named, state: Named
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step for every parameter, each independent of the others."""
        raise TypeError(f"{type(self).__name__} defines no step; choose one of its subclasses")


@dataclass(frozen=True)
class NoServerOptimizer(ServerOptimizer):
    """The average is the new global model."""

    def step(
        self, old: Named, average: Named, state: Named
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(average), {}


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """``v ← momentum v + Δ;  w ← w + lr v``. With lr 1 and momentum 0 it is the average."""

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        at_least("server_optimizer.lr", self.lr, 0, strict=True)
        _decay("server_optimizer.momentum", self.momentum)

    def init(self, parameters: Named) -> dict[str, Tensor]:
        return {f"velocity/{name}": torch.zeros_like(p) for name, p in parameters.items()}

    def step(
        self, old: Named, average: Named, state: Named
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        new: dict[str, Tensor] = {}
        velocity: dict[str, Tensor] = {}
        for name, w in old.items():
            v = self.momentum * state[f"velocity/{name}"] + (average[name] - w)
            new[name], velocity[f"velocity/{name}"] = w + self.lr * v, v
        return new, velocity


@dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """``m ← β1 m + (1-β1) Δ;  w ← w + lr m / (sqrt(v) + τ)``, every number by a step of its own.

    ``v`` starts at ``τ²``, each subclass says how it moves, and nothing is bias-corrected, as in
    algorithm 2 of Reddi et al., arXiv:2003.00295.
    """

    lr: float = 0.01
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        at_least("server_optimizer.lr", self.lr, 0, strict=True)
        at_least("server_optimizer.tau", self.tau, 0, strict=True)
        _decay("server_optimizer.beta1", self.beta1)

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        """The next ``v``.

        Args:
            v: of one parameter, not negative.
            squared: ``Δ²``, of the same shape.
        """
        raise TypeError(f"{type(self).__name__} does not say how v moves; choose a subclass")

    def init(self, parameters: Named) -> dict[str, Tensor]:
        first = {f"first/{name}": torch.zeros_like(p) for name, p in parameters.items()}
        second = {
            f"second/{name}": torch.full_like(p, self.tau**2) for name, p in parameters.items()
        }
        return first | second

    def step(
        self, old: Named, average: Named, state: Named
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        new: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, w in old.items():
            delta = average[name] - w
            m = self.beta1 * state[f"first/{name}"] + (1 - self.beta1) * delta
            v = self.second(state[f"second/{name}"], delta.square())
            new[name] = w + self.lr * m / (v.sqrt() + self.tau)
            moments[f"first/{name}"], moments[f"second/{name}"] = m, v
        return new, moments


@dataclass(frozen=True)
class FedAdam(Adaptive):
    """``v ← β2 v + (1-β2) Δ²``."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        _decay("server_optimizer.beta2", self.beta2)

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * squared


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """``v ← v - (1-β2) Δ² sign(v - Δ²)``: it moves by at most ``(1-β2) Δ²``, so that steps do not
    grow at once when changes become small."""

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - self.beta2) * squared * (v - squared).sign()


@dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """``v ← v + Δ²``: steps become smaller from round to round. Without momentum by default."""

    beta1: float = 0.0

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        return v + squared


def _decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} must lie in [0, 1)")
