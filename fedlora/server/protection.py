"""The privacy of a run, as its session sees it: who takes part, what happens to changes, and when
the run has to end.

`PrivacySpec` is the group ``privacy``; it protects nothing by itself. `Protection` is what a
specification becomes in a run: it knows the rounds that were released and is part of the
checkpoint. Implementations are in `fedlora.privacy`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.algebra.summand import Summands
from fedlora.core.types import Client, LocalPlan
from fedlora.population.sampling import Roster, cohort
from fedlora.secagg.config import SecAgg
from fedlora.secagg.limit import Limit
from fedlora.server.composes import Part
from fedlora.server.postprocess import Postprocessor

Record = Mapping[str, float | int | str]
SAVED = "privacy"
"""The key of a mechanism's values in a checkpoint."""


@dataclass(frozen=True)
class PlannedRun:
    """What a protection must know of its run."""

    roster: Roster
    """The population."""
    plan: LocalPlan
    """What clients do in a round, as configured."""
    seed: int
    rounds: int
    """That are planned."""
    folder: Path
    """The run's."""
    seeded: bool = True
    """Whether clients draw from the run's seed; False: real ones, from their operating systems."""


class Protection:
    """The privacy of one run over its rounds. This one protects nothing."""

    def statement(self, zero: Callable[[], Summands]) -> list[str]:
        """What is claimed, at which noise, and what is not covered; one line each.

        Args:
            zero: makes a summand of the run, for its number of scalars.
        """
        return []

    def cohort(self, roster: Roster, seed: int, round: int) -> list[Client]:
        """The clients that take part in a round, perhaps none.

        Args:
            roster: the population.
            seed: of the run.
            round: counted from 1.
        """
        return cohort(roster, seed, round)

    def exhausted(self, done: int) -> str:
        """Why no round may follow those that are done; empty: one may."""
        return ""

    def release(self, round: int) -> Postprocessor | None:
        """What bounds each change of a round and what is added to their sum, the same for the same
        round, however often it is asked; None: sums are left as they are."""
        return None

    def limit(self) -> Limit | None:
        """What bounds each change of the next round in a secure sum, whose clients do it
        themselves; None: nothing."""
        return None

    def check_sums(self, secagg: SecAgg, zero: Callable[[], Summands]) -> None:
        """Refuse secure sums in which a change cannot be hidden.

        Args:
            secagg: of the run.
            zero: makes a summand of the run.

        Raises:
            ValueError: one sentence.
        """

    def released(self, release: Postprocessor, short: float | None = None) -> None:
        """A round was aggregated.

        Args:
            release: what `release` gave for it, after its use.
            short: `fedlora.secagg.summed.Summed.short`; None: the release has seen each change.
        """

    def aborted(self) -> None:
        """A round was ended because too few clients succeeded."""

    def plan(self, base: LocalPlan) -> LocalPlan:
        """What clients do, with what this changes in it.

        Args:
            base: of the round, as configured.
        """
        return base

    def record(self, done: int) -> Record:
        """Metrics after a round, for its record.

        Args:
            done: rounds, with this one.
        """
        return {}

    def saved(self) -> dict[str, Any]:
        """Plain values for the checkpoint, by keys of its own."""
        return {}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on after a checkpoint.

        Args:
            saved: what the checkpoint has beside the state.
        """


UNPROTECTED = Protection()


@dataclass(frozen=True)
class PrivacySpec(Part):
    """No privacy beyond what the rest of the configuration gives."""

    @property
    def words(self) -> str:
        """The value of the group ``privacy`` that chooses it; empty: it protects nothing."""
        return ""

    def begin(self, run: PlannedRun) -> Protection:
        """The protection of a run.

        Raises:
            ValueError: one sentence, if the specification cannot be met.
        """
        return UNPROTECTED
