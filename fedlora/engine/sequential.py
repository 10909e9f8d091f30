"""The reference engine: one client after another on one resident model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.payload import Payload
from fedlora.core.types import (
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.data.store import TokenStore
from fedlora.engine.base import WorkerEngine, failure
from fedlora.engine.client import LoRAClient
from fedlora.models.language_model import LanguageModel

J = TypeVar("J", TrainJob, EvaluateJob)


@dataclass(frozen=True)
class Sequential(WorkerEngine):
    """Configuration of the reference engine."""

    def open(self, model: LanguageModel, store: TokenStore) -> "SequentialEngine":
        self.prepare()
        store, said = self.with_states(model, store)
        return SequentialEngine(model, store, said=said)


class SequentialEngine:
    """Runs a `LoRAClient` per job. No state of a job, failed or not, is kept after it.

    Args:
        model: clients are trained on it.
        store: their data.
        note: its name in the notes, and the reason if another engine stands back for it.
        said: what there is to say of the store.
    """

    def __init__(
        self,
        model: LanguageModel,
        store: TokenStore,
        note: str = "sequential",
        said: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self.model = model
        self.store = store
        self._note, self._said = note, said

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        for job in by_base(jobs):
            try:
                yield self._client(job).train(job)
            except CLIENT_ERRORS as error:
                yield failure(job.client, error)

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        for job in by_base(jobs):
            try:
                yield self._client(job).evaluate_job(job)
            except CLIENT_ERRORS as error:
                yield failure(job.client, error)

    def notes(self) -> tuple[str, ...]:
        return (self._note, *self._said())

    def _client(self, job: TrainJob | EvaluateJob) -> LoRAClient:
        return LoRAClient(self.model, self.store, job.client, job.seed)


def by_base(jobs: Sequence[J]) -> list[J]:
    """Jobs over the same base in a row, each base where it first comes: a model keeps the weights
    of one moved base (`fedlora.models.language_model.LanguageModel.moved`)."""
    rows: dict[str, list[J]] = {}
    for job in jobs:
        payload: Payload | None = job.start if isinstance(job, TrainJob) else job.adapter
        base = None if payload is None else payload.base()
        rows.setdefault("" if base is None else base.version, []).append(job)
    return [job for row in rows.values() for job in row]
