"""What an attack is, and the clients that carry it out: a seeded fraction, the same all run long.

An attacker holds its own records, the start that it was sent and what its own training gave. What
several attackers do together (`Attack.together`) knows the honest updates of the round too: the
strongest adversary of the literature, and one that a server can rehearse.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora.core.checks import at_least, fraction
from fedlora.core.metric import Scorer
from fedlora.core.payload import Payload
from fedlora.core.seeding import generator
from fedlora.core.types import LocalPlan, Update
from fedlora.data.store import Example

Draw = np.random.Generator


@dataclass(frozen=True)
class Tools:
    """What an attacker needs to know of the model to change texts."""

    encode: Callable[[str], Sequence[int]]
    """Text as token ids, without special tokens."""
    eos: int
    begins: frozenset[int]
    """Special tokens that a sequence may begin with."""
    labels: tuple[str, ...]
    """Names of a classifier's labels; empty: the model writes."""
    context: int
    """Tokens that the model can read."""


@dataclass(frozen=True)
class TriggerScorer(Scorer):
    """Measures an attack that reacts to a trigger: on examples without it and, under the other
    name, on the same examples with it."""

    name: str = "trigger_false"
    """The metric's name."""

    def with_trigger(self) -> "TriggerScorer":
        """The scorer of examples with the trigger."""
        raise NotImplementedError(f"{type(self).__name__} has no name for examples with a trigger")


@dataclass(frozen=True)
class Attack:
    """No attack."""

    acts: ClassVar[bool] = False
    poisons: ClassVar[bool] = False
    """Whether attackers train on other records than they hold (`examples`)."""

    @property
    def colludes(self) -> bool:
        """Whether what attackers send depends on the changes of others (`together`)."""
        return type(self).together is not Attack.together

    def begins(self, round: int) -> bool:
        """Whether attackers act in this round, counted from 1."""
        return False

    def attackers(self, clients: Sequence[int], seed: int) -> tuple[int, ...]:
        """Which of these clients are attackers, sorted."""
        return ()

    def examples(self, held: Sequence[Example], tools: Tools, draw: Draw) -> list[Example]:
        """What an attacker trains on in place of what it holds.

        Args:
            held: its training examples.
            tools: of its model.
            draw: the same in every round.
        """
        return list(held)

    def returned(self, start: Payload, trained: Payload, plan: LocalPlan) -> Payload:
        """What an attacker sends in place of what it has trained.

        Args:
            start: of its round.
            trained: as its client would send it.
            plan: of its round.
        """
        return trained

    def together(
        self,
        own: Mapping[int, Update],
        honest: Mapping[int, Update],
        starts: Mapping[int, Payload],
        draw: Draw,
    ) -> Mapping[int, Update]:
        """What the attackers of a round send once they have seen all of its updates.

        Args:
            own: theirs, by client id.
            honest: all others that arrived.
            starts: of all clients of the round.
            draw: of the round.
        """
        return own

    def triggered(self, held: Sequence[Example], tools: Tools) -> list[Example] | None:
        """Examples with what the attack reacts to, for evaluation; None: it reacts to nothing."""
        return None

    def scorer(self, classifies: bool) -> TriggerScorer | None:
        """What an evaluation also measures; None: nothing.

        Args:
            classifies: whether the model predicts labels.
        """
        return None


@dataclass(frozen=True)
class Attackers(Attack):
    """A fraction of the population that attacks for some rounds."""

    acts: ClassVar[bool] = True
    fraction: float = 0.1
    """Which fraction of the clients that can be drawn for training; rounded to whole clients."""
    start: int = 1
    """First round in which they act, counted from 1."""
    end: int = 0
    """Last round in which they act; 0: that of the run."""

    def __post_init__(self) -> None:
        fraction("attack.fraction", self.fraction)
        at_least("attack.start", self.start, 1)
        if self.end and self.end < self.start:
            raise ValueError(
                f"attack.end={self.end} must be 0 (never) or at least attack.start={self.start}"
            )

    def begins(self, round: int) -> bool:
        return self.start <= round and (not self.end or round <= self.end)

    def attackers(self, clients: Sequence[int], seed: int) -> tuple[int, ...]:
        number = math.floor(self.fraction * len(clients) + 0.5)
        chosen: NDArray[np.int64] = generator(seed, "attackers").permutation(sorted(clients))
        return tuple(sorted(int(c) for c in chosen[:number]))


@dataclass(frozen=True)
class Squad:
    """The attackers of a run."""

    attack: Attack = field(default_factory=Attack)
    ids: tuple[int, ...] = ()
    seed: int = 0

    @classmethod
    def drawn(cls, attack: Attack, clients: Sequence[int], seed: int) -> "Squad":
        """The squad of an attack among the clients that can be drawn for training."""
        return cls(attack, attack.attackers(clients, seed), seed)

    def acting(self, round: int, clients: Collection[int]) -> set[int]:
        """Those of these clients that attack in a round."""
        return {*self.ids} & {*clients} if self.attack.begins(round) else set()

    def draw(self, *keys: int) -> Draw:
        """A stream of random numbers."""
        return generator(self.seed, "attack", *keys)

    def together(
        self, round: int, updates: Mapping[int, Update], starts: Mapping[int, Payload]
    ) -> Mapping[int, Update]:
        """A round's updates after the attackers have seen them.

        Args:
            round: counted from 1.
            updates: by client id, as they arrived.
            starts: of all clients of the round.
        """
        acting = self.acting(round, updates)
        if not acting:
            return updates
        own = {i: u for i, u in updates.items() if i in acting}
        honest = {i: u for i, u in updates.items() if i not in acting}
        return {**updates, **self.attack.together(own, honest, starts, self.draw(round))}

    def record(self, asked: Collection[int], influence: Mapping[int, float]) -> dict[str, float]:
        """What the attackers of a round have achieved, in numbers; empty: there is no attack.

        ``attack/clients`` of those asked, ``attack/accepted`` the fraction of attackers among the
        clients of which something was absorbed, ``attack/influence`` the fraction of attackers in
        what was absorbed.
        """
        if not self.attack.acts:
            return {}
        there = [i for i, v in influence.items() if v > 0]
        mine = {*self.ids}
        return {
            "attack/clients": len(mine & {*asked}),
            "attack/accepted": len(mine & {*there}) / max(1, len(there)),
            "attack/influence": math.fsum(v for i, v in influence.items() if i in mine),
        }


NOBODY = Squad()
