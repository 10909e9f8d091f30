"""What happens to the changes of a round's clients between accepted and averaged.

A postprocessor acts on summands (`fedlora.algebra.summand`), whatever the method and its ranks are:
on each client's before they are summed, and on the sum. One class, one file under
``conf/postprocess``; a run has any number of them, in their order.
"""

from dataclasses import dataclass

from fedlora.algebra.summand import Summands, norm, scaled
from fedlora.core.checks import at_least
from fedlora.core.types import Client


@dataclass(frozen=True)
class Moment:
    """When a postprocessor acts; random numbers are drawn from nothing else."""

    seed: int
    """Of the run."""
    round: int
    """Counted from 1."""


@dataclass(frozen=True)
class Postprocessor:
    """Does nothing. Pure: its inputs are never changed."""

    def each(self, summands: Summands, client: Client, now: Moment) -> Summands:
        """What goes into the sum in place of one client's change.

        Args:
            summands: the client's change, before it is weighted.
            client: whose it is.
            now: seed and round.
        """
        return summands

    def whole(self, total: Summands, weight: float, now: Moment) -> Summands:
        """What the method absorbs in place of the weighted sum.

        Args:
            total: ``Σ_k w_k x_k``.
            weight: ``Σ_k w_k``.
            now: seed and round.
        """
        return total


@dataclass(frozen=True)
class Bound(Postprocessor):
    """Shortens changes that are too long: ``x ← x min(1, C / ||x||)``.

    The norm is that of all modules together. No client moves the average by more than ``C`` times
    its share, and nobody is rejected (`max_update_norm` rejects). Sun et al., "Can You Really
    Backdoor Federated Learning?", arXiv:1911.07963.
    """

    norm: float = 1.0
    """``C``, in the units of what the method sums: of products the change of the weights."""

    def __post_init__(self) -> None:
        at_least("postprocess.bound.norm", self.norm, 0, strict=True)

    def each(self, summands: Summands, client: Client, now: Moment) -> Summands:
        length = norm(summands)
        return summands if length <= self.norm else scaled(summands, self.norm / length)
