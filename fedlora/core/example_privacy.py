r"""DP-SGD in a client's plan: what bounds one example's part in every step of its training.

    B_t: example i is in it iff u_{t,i} < q         Poisson, q = L / n, so that L are expected
    g_t = (Σ_{i∈B_t} ∇l_i min(1, C / ||∇l_i||) + N(0, (σ C)² I)) / L

``l_i`` is the mean over the example's own supervised tokens: no other example is in its gradient.
Abadi et al., "Deep Learning with Differential Privacy", arXiv:1607.00133. Engines execute it
(`fedlora.training.private`); accounts are in `fedlora.privacy.example`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.checks import at_least
from fedlora.core.seeding import generator, torch_generator

MARGIN = 1 - 2.0**-20
"""Keeps a gradient within the clip when its entries are rounded."""


@dataclass(frozen=True)
class ExamplePrivacy:
    """Clip and noise of the gradients of single examples."""

    clip: float
    """``C``: largest norm of one example's gradient, all parameters together."""
    sigma: float
    """``σ``: standard deviation of the sum's noise in clips; 0: none."""
    seeded: bool = True
    """Whether batches and noise follow from the run's seed, as in a simulation; False: from 128
    bits of the operating system, as a silo needs, whose server knows the seed."""

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"privacy.clip={self.clip!r} must be > 0")
        at_least("privacy.sigma", self.sigma, 0)

    def batches(
        self, n: int, size: int, steps: int, *, seed: int, round: int, client: int
    ) -> Iterator[NDArray[np.int64]]:
        """The examples of each step, perhaps none.

        Args:
            n: examples.
            size: ``L``.
            steps: how many batches.
            seed: of the run.
            round: counted from 1.
            client: its id.
        """
        keys = (seed, "example_batches", round, client)
        stream = generator(*keys) if self.seeded else np.random.default_rng()
        for _ in range(steps):
            yield np.flatnonzero(stream.random(n) < min(1.0, size / n))

    def factors(self, norms: Tensor) -> Tensor:
        """By what gradients of these norms are multiplied."""
        scale = MARGIN * self.clip / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return torch.where(norms <= self.clip, torch.ones_like(norms), scale)

    def noise(
        self, shapes: Sequence[Sequence[int]], step: int, *, seed: int, round: int, client: int
    ) -> list[Tensor]:
        """The noise of a step's sum, float64 on the CPU, one tensor of each shape.

        Args:
            shapes: of the trained parameters, in the order of the model's modules; of a pair of
                factors ``A [r, d_in]`` before ``B [d_out, r]``.
            step: counted from 0.
            seed: of the run.
            round: counted from 1.
            client: its id.
        """
        std = self.sigma * self.clip if self.sigma else 0.0  # the clip may be infinite
        if not self.seeded:  # torch's generator has 32 bits of seed, which could be searched
            system = np.random.default_rng()
            return [torch.from_numpy(std * system.standard_normal(tuple(s))) for s in shapes]
        drawn = torch_generator(seed, "example_noise", round, client, step)
        return [std * torch.randn(*s, generator=drawn, dtype=torch.float64) for s in shapes]
