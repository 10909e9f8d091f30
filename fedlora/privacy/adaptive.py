r"""The clip follows a quantile of the clients' norms, estimated in private.

    b_k = 1[||x_k|| ≤ C]      b̃ = 1/2 + (Σ_k (b_k - 1/2) + N(0, σ_b²)) / m
    C ← C exp(-η (b̃ - γ))

Andrew et al., "Differentially Private Learning with Adaptive Clipping", arXiv:1905.03871. The count
has sensitivity 1/2, so that both releases together are one Gaussian mechanism of multiplier ``z``
if the noise of the changes has ``z_Δ = (z⁻² - (2 σ_b)⁻²)^(-1/2)``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedlora.core.checks import at_least
from fedlora.core.seeding import generator

COUNT = "privacy_count"


@dataclass(frozen=True)
class Adaptive:
    """The quantile and how fast the clip follows it."""

    quantile: float = 0.5
    """``γ``: fraction of clients whose change is not shortened."""
    rate: float = 0.2
    """``η``."""
    count_sigma: float = 0.0
    """``σ_b``, in clients; 0: a twentieth of the cohort for which the noise is made, and at least
    ``2 z``, so that the count takes no more than a sixteenth of the budget."""

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"privacy.adaptive.quantile={self.quantile!r} must lie in (0, 1)")
        at_least("privacy.adaptive.rate", self.rate, 0, strict=True)
        at_least("privacy.adaptive.count_sigma", self.count_sigma, 0)

    def noise(self, multiplier: float, cohort: float) -> float:
        """``σ_b`` of a run, in clients.

        Args:
            multiplier: ``z``.
            cohort: expected number of clients for which the noise is made.
        """
        return self.count_sigma or max(cohort / 20, 2 * multiplier)

    def left_for_changes(self, multiplier: float, cohort: float) -> float:
        """``z_Δ``; 0 without noise.

        Raises:
            ValueError: if the count alone needs the whole budget.
        """
        if multiplier == 0:
            return 0.0
        sigma = self.noise(multiplier, cohort)
        if 2 * sigma <= multiplier:
            raise ValueError(
                f"privacy.adaptive.count_sigma={self.count_sigma} must be above half the noise "
                f"multiplier {multiplier:.4g}, or 0 for a suitable value"
            )
        return float((multiplier**-2 - (2 * sigma) ** -2) ** -0.5)

    def moved(
        self, clip: float, count: float, cohort: float, std: float, seed: int, round: int
    ) -> float:
        """``C`` of the next round.

        Args:
            clip: ``C`` of the round.
            count: ``Σ_k (b_k - 1/2)`` over the changes that arrived (`counted`).
            cohort: ``m``, the expected number of clients.
            std: standard deviation of the noise of the count.
            seed: of the run.
            round: counted from 1.
        """
        noise = std * float(generator(seed, COUNT, round).standard_normal())
        fraction = 0.5 + (count + noise) / cohort
        return clip * math.exp(-self.rate * (fraction - self.quantile))


def counted(clip: float, norms: Iterable[float]) -> float:
    """``Σ_k (b_k - 1/2)``.

    Args:
        clip: ``C`` of the round.
        norms: of the changes that arrived, before the clip; clients that failed add nothing.
    """
    return math.fsum(0.5 if n <= clip else -0.5 for n in norms)
