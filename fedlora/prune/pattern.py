"""Which weights of a layer stay, by a score of each: a fraction of every row, or N of every M."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fedlora.core.errors import ModelError


@dataclass(frozen=True)
class Pattern:
    """How sparse, and what competes with what."""

    ratio: Fraction
    """Fraction of weights that become zero."""
    keep: int = 0
    """N:M patterns only: kept weights of each aligned group of a row."""
    group: int = 0
    """N:M patterns only: inputs per group; 0: no groups."""

    @staticmethod
    def parse(text: str) -> "Pattern":
        """``0.5``: half of the weights become zero; ``2:4``: 2 of 4 stay, ``2:8``: 2 of 8 stay.

        Raises:
            ValueError: naming the text and what is allowed.
        """
        allowed = (
            f"pattern={text!r} must be the fraction of weights that become zero, in (0, 1), or N:M "
            "with 0 < N < M: so many of each M inputs stay"
        )
        kept, colon, group = str(text).partition(":")
        try:
            if not colon:
                ratio = Fraction(kept)
                if not 0 < ratio < 1:
                    raise ValueError
                return Pattern(ratio)
            n, m = int(kept), int(group)
            if not 0 < n < m:
                raise ValueError
        except (ValueError, ZeroDivisionError):
            raise ValueError(allowed) from None
        return Pattern(Fraction(m - n, m), n, m)

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.group else f"{float(self.ratio):g}"

    def zeros(self, weights: int) -> int:
        """How many of so many competing weights become zero; a decimal ratio counts exactly."""
        return math.floor(self.ratio * weights)

    def check(self, path: str, d_in: int) -> None:
        """Raise a ModelError unless a layer of so many inputs can have this pattern."""
        if self.group and d_in % self.group:
            raise ModelError(
                f"{path}: {d_in} inputs are not divisible into groups of {self.group} (pattern "
                f"{self}); use a fraction such as 0.5, a group that divides {d_in}, or other "
                "targets"
            )

    def kept(self, scores: Tensor, *, compete: str = "row") -> Tensor:
        """True where a weight stays: the lowest scores go, the first of equal ones first.

        Args:
            scores: ``[d_out, d_in]``.
            compete: over what a fraction is taken: each ``row``, or the whole ``layer``. Groups of
                N:M patterns lie in rows either way.

        Returns:
            ``[d_out, d_in]`` bool.
        """
        rows, columns = scores.shape
        if self.group:
            shape, lowest = (rows, columns // self.group, self.group), self.group - self.keep
        elif compete == "row":
            shape, lowest = (rows, 1, columns), self.zeros(columns)
        else:
            shape, lowest = (1, 1, rows * columns), self.zeros(rows * columns)
        competing = scores.reshape(shape)
        going = competing.sort(dim=-1, stable=True).indices[..., :lowest]
        kept = torch.ones(shape, dtype=torch.bool, device=scores.device)
        return kept.scatter_(-1, going, False).reshape(rows, columns)
