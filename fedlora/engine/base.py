"""What an engine is: it executes jobs and never knows why they were given.

The sequential engine is the specification. Every other engine must give the same results up to
rounding, one per job, in any order of completion.
"""

import traceback
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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


class Engine(Protocol):
    """Executes jobs on one resident model. A job that raises becomes a `Failure`."""

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        """One result per job, as they finish."""

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        """One result per job, as they finish."""

    def notes(self) -> tuple[str, ...]:
        """What this engine is and what it had to do otherwise since training last began, a few
        words each, the same words for the same thing: ``fused, ragged, 1024 tokens per step``. A
        round records them; a run says each once."""


@dataclass(frozen=True)
class EngineSpec:
    """The configuration of an engine; a worker opens it once and keeps it."""

    @property
    def messages_per_worker(self) -> int:
        """Into how many messages per worker a round is cut. Few large ones suit an engine that
        works on many jobs at once, many small ones keep workers evenly busy."""
        return 4

    @abstractmethod
    def open(self, model: LanguageModel, store: TokenStore) -> Engine:
        """The engine on this model and these data."""


def failure(client: Client, error: Exception) -> Failure:
    """An exception as a record that can travel."""
    text = "".join(traceback.format_exception(error))
    return Failure(client, type(error).__name__, str(error), text)
