r"""Fixed-point numbers that can be summed exactly, modulo ``2^b``.

    e = floor((clip(x, ±ρ) + ρ) / (2ρ) · (2^v - 1) + u)        u uniform in [0, 1)
    Σ x ≈ 2ρ / (2^v - 1) · (Σ e mod 2^b) - K' ρ                K' summands, K' (2^v - 1) < 2^b

Rounding is unbiased: the mean of the decoded number over ``u`` is ``clip(x, ±ρ)``.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.seeding import generator

Codes: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""Unsigned integers of ``b`` bits, ``[D]``; their sums wrap around."""
Reals: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class FixedPoint:
    """The numbers of one run."""

    bits: int
    """``b``."""
    levels: int
    """``v``."""
    range: float
    """``ρ``."""

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The type of codes: little-endian, as they travel and as key streams are read."""
        return np.dtype("<u2" if self.bits == 16 else "<u4")

    def encode(self, x: Reals, uniform: Reals) -> tuple[Codes, int]:
        """Codes of numbers, and how many of them were cut.

        Args:
            x: ``[D]``, finite.
            uniform: ``u``, ``[D]``.

        Raises:
            FloatingPointError: if a number is NaN or infinite.
        """
        if not bool(np.isfinite(x).all()):
            bad = int(x.size - np.isfinite(x).sum())
            raise FloatingPointError(f"{bad} of {x.size} numbers to be summed are not finite")
        top = 2**self.levels - 1
        steps = (np.clip(x, -self.range, self.range) + self.range) / (2 * self.range) * top
        codes = np.floor(steps + uniform).clip(0, top).astype(self.dtype)
        return codes, int((np.abs(x) > self.range).sum())

    def decode(self, total: Codes, summands: int) -> Reals:
        """The sum of numbers from the sum of their codes.

        Args:
            total: ``Σ e mod 2^b``.
            summands: ``K'``, those that are in the sum.
        """
        top = 2**self.levels - 1
        wide: Reals = total.astype(np.float64) * (2 * self.range / top) - summands * self.range
        return wide


def uniform(seed: int, round: int, client: int, exchange: int, size: int) -> Reals:
    """The ``u`` of one client's vector.

    Args:
        seed: of the run.
        round: counted from 1.
        client: its id.
        exchange: of the round, counted from 0.
        size: ``D``.
    """
    return generator(seed, "secagg rounding", round, client, exchange).random(size)
