"""What composes: the parts of a run that act on clients' changes, and which of them exclude others.

Each part says what it is (`traits`), with which traits it cannot go, and why (`refuses`), and what
it refuses beside other parts (`check`). Nothing here names a part: a new one declares its own rules
and edits no other. `check_composition` runs before anything is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.server.method import Method, Setup
from fedlora.server.schedule import Rounds

STATISTIC = "statistic"
"""Puts another statistic (median, trimmed mean, Krum) in the place of the weighted sum."""
NORM_BOUND = "norm_bound"
"""Shortens each client's change by a rule that looks at no other client."""
NOISE = "noise"
"""Adds noise that hides one client's change of bounded norm in the sum of all."""
MASKED = "masked"
"""Shows the server no client's change, only the sum of a round's."""
STALE = "stale"
"""Sums changes that began from different states, with weights by their age."""
SPARSE = "sparse"
"""Sends entries that each client chooses for itself."""
MEMORY = "memory"
"""Adds to a client's change what earlier ones have left behind."""
COLLUSION = "collusion"
"""Makes the changes of some clients from those of others."""
SILOS = "silos"
"""Real clients, in real time."""
VIRTUAL_TIME = "virtual_time"
"""Lets clients take the time that modelled devices and networks would."""


@dataclass(frozen=True)
class Around:
    """What a part may have to refuse beside the other parts."""

    strategy: Method
    setup: Setup
    rounds: Rounds


@dataclass(frozen=True)
class Part:
    """One part of a run that acts on clients' changes. This one goes with everything."""

    @property
    def on_summands(self) -> bool:
        """Whether it acts on what clients add, so that the strategy must say it (`Method.adds`)."""
        return True

    @property
    def traits(self) -> frozenset[str]:
        """What it is, for the rules of others; the constants above."""
        return frozenset()

    @property
    def refuses(self) -> Mapping[str, str]:
        """Trait of another part -> why the two exclude each other, and what to use instead."""
        return {}

    def check(self, around: Around) -> None:
        """Refuse a strategy or settings of other groups.

        Raises:
            ValueError: one sentence that says why not and what to use instead.
        """


@dataclass(frozen=True)
class Trait(Part):
    """A part that others may refuse and that refuses nothing itself, such as ``runtime=silos``."""

    name: str = ""
    """One of the constants above."""
    sums: bool = False
    """Whether it acts on what clients add."""

    @property
    def on_summands(self) -> bool:
        """As it says."""
        return self.sums

    @property
    def traits(self) -> frozenset[str]:
        """Its name."""
        return frozenset({self.name})


def check_composition(parts: Mapping[str, Part], around: Around) -> None:
    """Refuse parts that exclude each other, or that the strategy or other settings exclude.

    Args:
        parts: what is on, by the words that a user chose it with: ``privacy=client``.
        around: strategy and settings.

    Raises:
        ValueError: one sentence that says why not and what to use instead.
    """
    for words, part in parts.items():
        if part.on_summands and around.strategy.needs_updates:
            raise ValueError(f"{words}: {around.strategy.needs_updates}")
        for trait, why in part.refuses.items():
            for others, other in parts.items():
                if other is not part and trait in other.traits:
                    raise ValueError(f"{words} with {others}: {why}")
        try:
            part.check(around)
        except ValueError as error:
            raise ValueError(f"{words}: {error}") from error
