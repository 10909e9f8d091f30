"""The interface of engines. An engine executes jobs; it does not know which method needs them.

The sequential engine is the specification. Every other engine must give the same results up to
rounding, one per job, in any order of completion.
"""

import traceback
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedlora.core.types import (
    Client,
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.data.store import TokenStore
from fedlora.models.language_model import LanguageModel
from fedlora.models.modules import ModelInfo


class Engine(Protocol):
    """Executes jobs on one resident model. A job that raises becomes a `Failure`."""

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        """One result per job, as they finish."""

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        """One result per job, as they finish."""

    def notes(self) -> tuple[str, ...]:
        """Short notes on how the engine has trained since the last call of `train`: its kind, and
        each fallback it used, always in the same words: ``fused, ragged, 1024 tokens per step``. A
        round records them; a run prints each note once."""


@dataclass(frozen=True)
class EngineSpec:
    """The configuration of an engine; a worker opens it once and keeps it."""

    @property
    def messages_per_worker(self) -> int:
        """The number of messages per worker in a round. A few large messages suit an engine that
        works on many jobs at once; many small messages keep workers evenly busy."""
        return 4

    def settled(self, info: ModelInfo, dtype: torch.dtype, device: torch.device) -> "EngineSpec":
        """The same with everything decided that a run leaves to the engine. A server asks once per
        run, records the answer and sends it to all workers.

        Args:
            info: the base model.
            dtype: the type that it computes in.
            device: the workers' kind of device.
        """
        return self

    @abstractmethod
    def open(self, model: LanguageModel, store: TokenStore) -> Engine:
        """The engine on this model and these data."""


def failure(client: Client, error: BaseException) -> Failure:
    """An exception as a record that can travel."""
    text = "".join(traceback.format_exception(error))
    return Failure(client, type(error).__name__, str(error), text)
