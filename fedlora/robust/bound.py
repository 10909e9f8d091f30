r"""Norm bounding: no client moves the mean further than a typical one.

    x_k ← x_k min(1, C / ||x_k||),  then the mean            C fixed, or the median of the ||x_k||

One flat norm over all modules; of products by Gram matrices. Sun et al., "Can You Really Backdoor
Federated Learning?", arXiv:1911.07963.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.algebra.summand import norm
from fedlora.core.checks import at_least
from fedlora.robust.rule import Centre, Term, Weighted, combined


@dataclass(frozen=True)
class Bound(Weighted):
    """The mean of changes that are shortened to ``C``. It never moves further than ``C``."""

    norm: float = 0.0
    """``C`` in the units of the method's summands; 0: the median norm of the round's changes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("robust.norm", self.norm, 0)

    def centre(self, terms: Sequence[Term]) -> Centre:
        weights = self.weights(terms)
        shortened = bounding(terms, self.norm)
        whole = math.fsum(weights)
        scale = [w * c / whole for w, c in zip(weights, shortened, strict=True)]
        return combined(terms, scale)


def bounding(terms: Sequence[Term], bound: float = 0.0) -> list[float]:
    """``min(1, C / ||x_k||)`` of each term; ``bound`` 0: ``C`` is the median norm. A change of norm
    zero is left as it is."""
    norms = [norm(t.summands) for t in terms]
    most = bound or statistics.median(norms)
    if most == 0:  # half of the clients did not move at all: nothing says how far is too far
        most = min((n for n in norms if n > 0), default=1.0)
    return [1.0 if n <= most else most / n for n in norms]
