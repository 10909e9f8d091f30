"""Postprocessors: they act on the clients' changes after acceptance and before averaging.

A postprocessor acts on summands (`fedlora.algebra.summand`), whatever the method and its ranks are:
on each client's before they are summed, and on the sum. One class, one file under
``conf/postprocess``; a run has any number of them: the first is the first to see a client's change
and the last to see the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.algebra.summand import Summands, norm, scaled
from fedlora.core.checks import at_least
from fedlora.core.types import Client
from fedlora.server.composes import NORM_BOUND, Part


@dataclass(frozen=True)
class Moment:
    """The seed and round of a postprocessor's action: its only source of randomness."""

    seed: int
    """The run's seed."""
    round: int
    """Counted from 1."""


@dataclass(frozen=True)
class Postprocessor(Part):
    """Does nothing. Pure: its inputs are never changed."""

    def weights(self, weights: Sequence[float]) -> Sequence[float]:
        """The clients' weights ``w_k`` in the sum.

        Args:
            weights: those of the method.
        """
        return weights

    def weight(self, weight: float) -> float:
        """What the sum is divided by.

        Args:
            weight: ``Σ_k w_k``, 0 if no client took part.
        """
        return weight

    def each(self, summands: Summands, client: Client, now: Moment) -> Summands:
        """The summand that replaces one client's change.

        Args:
            summands: the client's change, before it is weighted.
            client: the client that made it.
            now: seed and round.
        """
        return summands

    def whole(self, total: Summands, weight: float, now: Moment) -> Summands:
        """The sum that replaces the weighted sum before the method absorbs it.

        Args:
            total: ``Σ_k w_k x_k``.
            weight: what it will be divided by.
            now: seed and round.
        """
        return total


@dataclass(frozen=True)
class Bound(Postprocessor):
    """Shortens changes that are too long: ``x ← x min(1, C / ||x||)``.

    The norm is taken over all modules together. No client moves the average by more than ``C``
    times its weight, and no client is rejected (`max_update_norm` rejects). Sun et al., "Can You
    Really Backdoor Federated Learning?", arXiv:1911.07963.
    """

    norm: float = 1.0
    """``C``, in the units of the method's summands (for products: the change of the weights)."""

    def __post_init__(self) -> None:
        at_least("postprocess.bound.norm", self.norm, 0, strict=True)

    @property
    def traits(self) -> frozenset[str]:
        """A norm bound."""
        return frozenset({NORM_BOUND})

    def each(self, summands: Summands, client: Client, now: Moment) -> Summands:
        length = norm(summands)
        return summands if length <= self.norm else scaled(summands, self.norm / length)
