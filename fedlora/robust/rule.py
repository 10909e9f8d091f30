r"""What replaces the weighted mean of clients' changes when some of the clients may lie.

    mean     Σ_k w_k x_k / Σ_k w_k        one client moves it anywhere
    robust   R(x_1, ..., x_K)             f < K / 2 clients of any kind move it by a bounded amount

A rule acts on summands (`fedlora.algebra.summand`): on what clients *add*, whatever the method and
its ranks are. Its result is absorbed with weight 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlora.algebra.summand import Summands, total
from fedlora.core.checks import at_least


@dataclass(frozen=True)
class Term:
    """One client's part in an average."""

    summands: Summands
    examples: int
    """Those that it says it holds."""
    owned: dict[str, Tensor]
    """Name -> which elements a client of its ranks can move, of the summand's shape; the others are
    padding. Names that are not here are its own as a whole."""


@dataclass(frozen=True)
class Centre:
    """What a rule makes of the terms."""

    value: Summands
    influence: Sequence[float]
    """The fraction of each term in the value, in their order: its coefficient as a fraction of all
    coefficients, averaged over the elements where these differ from element to element."""


@dataclass(frozen=True)
class Rule:
    """The mean that the method itself defines: no rule."""

    acts: ClassVar[bool] = False
    """Whether it takes the place of the method's mean."""

    def centre(self, terms: Sequence[Term]) -> Centre:
        """What is absorbed in place of the mean.

        Args:
            terms: one per client, sorted by client id, at least `fewest`.
        """
        raise TypeError("there is no rule: the method averages by itself")

    def fewest(self, clients: int) -> int:
        """The number of clients below which the rule promises nothing.

        Args:
            clients: of the round; how many of them may be attackers depends on it.
        """
        return 1

    def check(self, clients: int) -> None:
        """Refuse a cohort that is too small.

        Raises:
            ValueError: one sentence that names the numbers.
        """
        needed = self.fewest(clients)
        if clients < needed:
            raise ValueError(
                f"robust={type(self).__name__} needs at least {needed} clients in a round for its "
                f"robust.attackers, and there are {clients}: lower robust.attackers, raise "
                "population.fraction, or use robust=bound"
            )


NO_RULE = Rule()


@dataclass(frozen=True)
class Withstands(Rule):
    """A rule that is made for a known fraction of attackers."""

    acts: ClassVar[bool] = True
    attackers: float = 0.2
    """The fraction of a round's clients that may be attackers; ``f`` is that of the clients whose
    updates arrived, rounded up."""

    def __post_init__(self) -> None:
        at_least("robust.attackers", self.attackers, 0)
        if self.attackers >= 0.5:
            raise ValueError(
                f"robust.attackers={self.attackers} must be below 0.5: no rule "
                "withstands a majority"
            )

    def f(self, clients: int) -> int:
        """How many of so many clients may be attackers."""
        return math.ceil(self.attackers * clients - 1e-9)

    def fewest(self, clients: int) -> int:
        """``2 f + 1``."""
        return 2 * self.f(clients) + 1


@dataclass(frozen=True)
class Weighted(Rule):
    """A rule whose clients need not count alike."""

    acts: ClassVar[bool] = True
    cap: int = 0
    """A client counts as its examples, but as no more than this many: a number of examples is what
    the client says. 0: all count alike."""

    def __post_init__(self) -> None:
        at_least("robust.cap", self.cap, 0)

    def weights(self, terms: Sequence[Term]) -> list[float]:
        """One weight in ``[0, 1]`` for each term."""
        return capped([t.examples for t in terms], self.cap)


def capped(examples: Sequence[int], cap: int) -> list[float]:
    """``min(n_k, cap) / cap``; all 1 if there is no cap or no client has an example."""
    if not cap or not any(examples):
        return [1.0] * len(examples)
    return [min(n, cap) / cap for n in examples]


def combined(terms: Sequence[Term], coefficients: Sequence[float]) -> Centre:
    """``Σ_k c_k x_k``; products stay factored, and terms with ``c_k = 0`` are left out.

    Args:
        terms: one per client.
        coefficients: not negative, not all zero.
    """
    used = [(t.summands, c) for t, c in zip(terms, coefficients, strict=True) if c > 0]
    whole = math.fsum(coefficients)
    value = total([x for x, _ in used], [c for _, c in used])
    return Centre(value, [c / whole for c in coefficients])
