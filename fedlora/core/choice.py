"""Which rank indices of each module a client trains: an open base class.

Index ``i`` of a module is row ``A[i]`` and column ``B[:, i]`` of its factors. What is not chosen
keeps every bit: it has no gradient, no optimizer state and no weight decay, and is no part of the
norm that is clipped. The scale stays ``alpha / r`` of all ``r`` indices.

A strategy puts a choice in a client's plan, and every engine executes it. A choice that needs it is
shown what a probe has trained: a first pass of the same client over the same start.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # `types` holds a choice in its plans
    from fedlora.core.types import Adapter, LocalPlan, TrainJob

Indices: TypeAlias = Mapping[str, tuple[int, ...]]
"""Module path -> rank indices, ascending; every module of the start, some with none."""


@dataclass(frozen=True)
class Chosen:
    """The rank indices that a client trains in one round."""

    indices: Indices
    probe: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the probe, whose cost is the client's; empty: there was none."""


@dataclass(frozen=True)
class IndexChoice(ABC):
    """A rule that chooses rank indices. Its fields travel with the plan."""

    def probe(self, plan: "LocalPlan") -> "LocalPlan | None":
        """The plan of the pass that precedes the choice; None: it needs none.

        Args:
            plan: of the client's round.
        """
        return None

    @abstractmethod
    def count(self, start: "Adapter") -> int:
        """The number of rank indices, of all modules together, that are chosen of a start."""

    @abstractmethod
    def choose(self, job: "TrainJob", probed: "Adapter | None") -> Indices:
        """Choose `count` rank indices.

        Args:
            job: of the client; all of its start may be looked at.
            probed: what the probe has made of the start's factors; None: there was none.
        """
