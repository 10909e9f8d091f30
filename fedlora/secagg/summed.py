"""The sum of a round, and what it cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedlora.algebra.summand import Summands
from fedlora.secagg.config import STAGES
from fedlora.secagg.cost import Traffic, summed


@dataclass(frozen=True)
class Summed:
    """A secure sum, simulated or real."""

    total: Summands
    """``Σ_k w_k x_k`` over the clients in the sum."""
    weights: Mapping[int, float]
    """``w_k`` of the clients in the sum; the largest of the cohort is 1."""
    lost: Mapping[int, str]
    """Client id -> the stage in which it was lost, of those that are not in the sum."""
    traffic: Mapping[int, Traffic]
    """By client id."""
    numbers: int
    """Numbers of a client's vectors."""
    cut: int
    """Numbers of all clients that were beyond ``±ρ``."""
    short: float | None = None
    """``Σ_k (b_k - 1/2)``, where ``b_k`` is 1 if privacy did not shorten what client ``k`` adds and
    0 if it did; None: nothing was counted."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds by stage, and of unmasking (``server``); empty: nothing was sent."""

    @staticmethod
    def empty(zero: Summands) -> "Summed":
        """The sum of a round that asked no client.

        Args:
            zero: what a client adds that did not move.
        """
        return Summed(zero, {}, {}, {}, numbers=0, cut=0)

    @property
    def weight(self) -> float:
        """``Σ_k w_k``."""
        return math.fsum(self.weights.values())

    @property
    def influence(self) -> dict[int, float]:
        """Client id -> its fraction of the sum."""
        return {i: w / self.weight for i, w in self.weights.items()}

    def record(self) -> dict[str, float | int | str]:
        """For the round's record: bytes and seconds by stage, and the fraction of numbers that were
        cut."""
        whole = summed(list(self.traffic.values()))
        found: dict[str, float | int | str] = {
            "secagg/clients": len(self.weights),
            "secagg/lost": len(self.lost),
            "secagg/numbers": self.numbers,
            "secagg/cut": self.cut / max(1, self.numbers * len(self.weights)),
        }
        for stage in STAGES:
            found[f"secagg/{stage}_up_bytes"] = whole.up[stage]
            found[f"secagg/{stage}_down_bytes"] = whole.down[stage]
        return found | {f"secagg/{stage}_seconds": s for stage, s in self.seconds.items()}
