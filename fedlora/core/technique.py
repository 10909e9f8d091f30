"""What a client trains: an open base class, one subclass per technique.

A technique states its own properties: how a client trains, what it sends, which strategies can
average that. A strategy names the technique that it is made for, so that a combination that would
average the wrong thing is refused before anything is loaded.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fedlora.core.payload import Payload

if TYPE_CHECKING:  # `types` holds a technique in its plans
    from fedlora.core.types import Adapter, Client, LocalPlan, TrainJob

DEFAULT = "fedlora.techniques.lora.technique.LoRA"
"""The ``_target_`` of conf/client/technique's default."""

Audit = Callable[[Payload], Mapping[str, float | int | str]]
"""Looks at the global model after a round, for its record."""


@dataclass(frozen=True)
class Technique(ABC):
    """One kind of local training. Its fields are its hyperparameters and the schema of its YAML."""

    key: ClassVar[str]
    """What chooses it: ``client/technique=lora``."""
    does: ClassVar[str]
    """What its clients do, in words for those who combined it with something else."""
    averaged: ClassVar[str]
    """What a strategy made for it averages."""
    client: ClassVar[str]
    """The config group that brings it."""
    strategy: ClassVar[str]
    """A strategy made for it."""
    keeps_zeros: ClassVar[bool] = False
    """Whether it needs a pruned base, whose zeros its merged update leaves where they are."""
    fuses: ClassVar[bool] = False
    """Whether clients do nothing but gradient steps on the factors they start from, so that an
    engine may train many of them together."""
    alone: ClassVar[str] = ""
    """Why not, for the engine's notes; empty: the payload says why."""

    @abstractmethod
    def train(self, model: Any, job: "TrainJob", examples: Sequence[Any]) -> tuple[Payload, Any]:
        """Mount the job's start on the model and train it.

        Args:
            model: a resident `fedlora.models.language_model.LanguageModel`; the caller unmounts.
            job: what to do.
            examples: that the client trains on.

        Returns:
            What was trained, and its `fedlora.training.loop.Trace`.
        """

    @classmethod
    def payload(cls, value: "Payload | Adapter") -> Payload:
        """What a strategy's hook has given as what travels.

        Raises:
            TypeError: if it is no payload.
        """
        if not isinstance(value, Payload):
            raise TypeError(f"{cls.__name__} trains no {type(value).__name__}")
        return value

    def sends(self, start: Payload) -> type[Payload]:
        """What clients send back who start from this."""
        return start.answer()

    def completed(self, job: "TrainJob", trained: Payload) -> "tuple[Client, Payload]":
        """The client as it is after training, and the part of the result that it sends."""
        return job.client, trained

    @property
    def shrinks(self) -> bool:
        """Whether clients may return smaller ranks than they were sent."""
        return False

    @property
    def penalises(self) -> bool:
        """Whether the local loss gains a `penalty`."""
        return False

    def penalty(self, parameters: Sequence[Sequence[Tensor]]) -> Tensor:
        """What the local loss gains, a scalar.

        Args:
            parameters: of every mounted module, as its layer lists them (LoRA: A, B).
        """
        raise NotImplementedError(f"{type(self).__name__} penalises nothing")

    def audit(self, folder: Path, dtype: Any) -> Audit | None:
        """What is looked at after every round of a run on this base; None: nothing.

        Args:
            folder: of the base model.
            dtype: in which it is held.
        """
        return None


@lru_cache(maxsize=1)
def default_technique() -> Technique:
    """What a plan trains that does not say: the technique named by `DEFAULT`, as it is."""
    module, _, name = DEFAULT.rpartition(".")
    made = getattr(importlib.import_module(module), name)()
    assert isinstance(made, Technique)
    return made


def require(plan: "LocalPlan", needed: type[Technique], strategy: str) -> None:
    """Refuse a plan of another technique than a strategy is made for.

    Raises:
        ValueError: one sentence that says why and what to use instead.
    """
    found = plan.technique
    if type(found) is not needed:
        raise ValueError(
            f"{found.key} {found.does}, and {strategy} averages {needed.averaged}: use "
            f"{found.strategy}, or {needed.client}"
        )
