"""Configuration of secure aggregation, and what it fixes before round 1."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fedlora.core.checks import at_least, fraction, one_of, within
from fedlora.core.seeding import generator

NONE, SIMULATED, REAL = "none", "simulated", "real"
ONE, TWO = "one", "two"
SKETCHES = (NONE, ONE, TWO)
KEYS, SHARES, VECTOR, UNMASK = "keys", "shares", "vector", "unmask"
STAGES = (KEYS, SHARES, VECTOR, UNMASK)
"""Messages of one instance of the protocol, in their order."""
FEWEST = 2
"""Clients of a sum: that of one client is its summand."""


@dataclass(frozen=True)
class SecAgg:
    """Fixed-point numbers, the protocol's parameters, and how products are summed."""

    kind: str = NONE
    """``none``; ``simulated``: numbers are rounded and summed as in the protocol, clients are lost
    and bytes counted, without masks; ``real``: the protocol. Both give the same state."""
    bits: int = 32
    """``b``: sums are modulo ``2^b``; 16 or 32."""
    levels: int = 22
    """``v``: a client's number is one of ``2^v`` values."""
    range: float = 1.0
    """``ρ``: numbers beyond ``±ρ`` are cut. A client's largest number after its weight, which is at
    most 1."""
    threshold: float = 0.5
    """Fraction of those who hold shares of a client's secret that must be exceeded to recover it:
    at least one half, two thirds if the server may lie."""
    degree: int = 0
    """Clients with which each shares masks and secrets; 0: all of its round. No security is claimed
    for less."""
    sketch: str = NONE
    """How products are summed: as dense matrices (``none``) or by a sketch in ``one`` exchange or
    ``two`` (`fedlora.secagg.sketch`)."""
    width: float = 3.0
    """Columns of a sketch as a multiple of the largest rank."""
    losses: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Stage -> fraction of a round's clients that are lost in it on purpose, for rehearsals."""

    def __post_init__(self) -> None:
        one_of("secagg.kind", self.kind, (NONE, SIMULATED, REAL))
        one_of("secagg.bits", self.bits, (16, 32))
        within("secagg.levels", self.levels, 1, self.bits - 1)
        at_least("secagg.range", self.range, 0, strict=True)
        if not 0.5 <= self.threshold < 1:
            raise ValueError(f"secagg.threshold={self.threshold!r} must lie in [0.5, 1)")
        at_least("secagg.degree", self.degree, 0)
        if self.degree % 2:
            raise ValueError(
                f"secagg.degree={self.degree} must be even: neighbours lie on both sides of a ring"
            )
        one_of("secagg.sketch", self.sketch, SKETCHES)
        at_least("secagg.width", self.width, 1)
        for stage, value in self.losses.items():
            one_of("secagg.losses", stage, STAGES)
            fraction(f"secagg.losses.{stage}", value)

    @property
    def on(self) -> bool:
        """Whether sums are secure, or simulated to be."""
        return self.kind != NONE

    @property
    def capacity(self) -> int:
        """The most clients whose sum cannot wrap around: ``K (2^v - 1) < 2^b``."""
        return ((1 << self.bits) - 1) // ((1 << self.levels) - 1)

    def degree_of(self, clients: int) -> int:
        """Neighbours of each of so many clients."""
        return min(self.degree or clients, clients - 1)

    def shares_needed(self, clients: int) -> int:
        """``t``: shares that recover a secret, of ``d + 1`` that exist; more than half, so that no
        two groups of their holders can recover one secret each.

        Args:
            clients: that are asked in a round.
        """
        holders = self.degree_of(clients) + 1
        return max(FEWEST, math.floor(holders * self.threshold) + 1)

    def check_cohort(self, clients: int) -> None:
        """Refuse a cohort that is too small for a sum, or too large for its numbers.

        Args:
            clients: of a round.

        Raises:
            ValueError: one sentence.
        """
        if clients < FEWEST:
            raise ValueError(
                f"secagg.kind={self.kind}: a round has {clients} client, whose sum is its own "
                f"update; draw at least {FEWEST} (population.per_round or population.fraction)"
            )
        self.check_most(clients)

    def check_most(self, clients: int) -> None:
        """Refuse a cohort that is too large for its numbers.

        Args:
            clients: of a round.

        Raises:
            ValueError: one sentence.
        """
        if clients > self.capacity:
            raise ValueError(
                f"secagg.levels={self.levels} and secagg.bits={self.bits}: sums of more than "
                f"{self.capacity:,} clients wrap around, and a round has {clients:,}; use fewer "
                "levels, more bits, or a smaller round"
            )

    def lost(self, seed: int, round: int, client: int, exchange: int, stage: str) -> bool:
        """Whether a client is lost on purpose.

        Args:
            seed: of the run.
            round: counted from 1.
            client: its id.
            exchange: of the round, counted from 0.
            stage: one of `STAGES`.
        """
        due = self.losses.get(stage, 0.0)
        keys = (round, client, exchange, STAGES.index(stage))
        return due > 0 and generator(seed, "secagg loss", *keys).random() < due
