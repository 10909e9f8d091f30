"""The privacy of a run, as its session sees it: who takes part, what happens to changes, and when
the run has to end.

`PrivacySpec` is the group ``privacy``; it protects nothing by itself. `Protection` is what a
specification becomes in a run: it knows the rounds that were released and is part of the
checkpoint. Implementations are in `fedlora.privacy`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.algebra.summand import Summands
from fedlora.core.types import Client, LocalPlan
from fedlora.population.sampling import Roster
from fedlora.server.composes import Part
from fedlora.server.postprocess import Postprocessor

Record = Mapping[str, float | int | str]


class Protection(ABC):
    """The privacy of one run over its rounds."""

    @abstractmethod
    def statement(self, zero: Summands) -> list[str]:
        """What is claimed, at which noise, and what is not covered; one line each.

        Args:
            zero: a summand of the run, for its number of scalars.
        """

    @abstractmethod
    def cohort(self, round: int) -> list[Client]:
        """The clients that take part in a round, perhaps none."""

    @abstractmethod
    def exhausted(self, done: int) -> str:
        """Why no round may follow those that are done; empty: one may."""

    @abstractmethod
    def release(self, round: int) -> Postprocessor:
        """What bounds each change of a round and what is added to their sum. The same for the same
        round, however often it is asked."""

    @abstractmethod
    def released(self, release: Postprocessor) -> None:
        """A round was aggregated.

        Args:
            release: what `release` gave for it, after its use.
        """

    @abstractmethod
    def aborted(self) -> None:
        """A round was ended because too few clients succeeded: it counts as released."""

    @abstractmethod
    def record(self, done: int) -> Record:
        """Metrics after a round, for its record.

        Args:
            done: rounds, with this one.
        """

    @abstractmethod
    def saved(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""

    @abstractmethod
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on after a checkpoint.

        Args:
            saved: what `saved` returned then.
        """


@dataclass(frozen=True)
class PrivacySpec(Part):
    """No privacy beyond what the rest of the configuration gives."""

    @property
    def words(self) -> str:
        """The value of the group ``privacy`` that chooses it; empty: it protects nothing."""
        return ""

    def begin(self, roster: Roster, seed: int, rounds: int, folder: Path) -> Protection | None:
        """The protection of a run; None: sessions need not know of it.

        Args:
            roster: the population.
            seed: of the run.
            rounds: that are planned.
            folder: of the run.

        Raises:
            ValueError: one sentence, if the specification cannot be met.
        """
        return None

    def plan(self, base: LocalPlan) -> LocalPlan:
        """What clients do, with what this changes in it.

        Args:
            base: as configured.
        """
        return base
