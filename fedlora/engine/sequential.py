"""The reference engine: one client after another on one resident model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedlora.core.checks import at_least
from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.types import (
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.data.store import TokenStore
from fedlora.engine.base import EngineSpec, failure
from fedlora.engine.client import LoRAClient
from fedlora.engine.memory import keep_freed_memory
from fedlora.models.language_model import LanguageModel


@dataclass(frozen=True)
class Sequential(EngineSpec):
    """Configuration of the reference engine."""

    threads: int = 1
    """Intra-op threads of a worker process; 0 leaves PyTorch's choice. With one, results do not
    depend on the machine's number of cores, and many workers do not compete for them."""
    reuse_memory: bool = True
    """Keep up to 512 MiB of freed memory in the process if glibc is used (`keep_freed_memory`):
    faster on CPU, bitwise identical results."""

    def __post_init__(self) -> None:
        at_least("engine.threads", self.threads, 0)

    def open(self, model: LanguageModel, store: TokenStore) -> "SequentialEngine":
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.reuse_memory:
            keep_freed_memory()
        return SequentialEngine(model, store)


class SequentialEngine:
    """Runs a `LoRAClient` per job. No state of a job, failed or not, is kept after it.

    Args:
        model: clients are trained on it.
        store: their data.
        note: its name in the notes, and the reason if another engine stands back for it.
    """

    def __init__(self, model: LanguageModel, store: TokenStore, note: str = "sequential") -> None:
        self.model = model
        self.store = store
        self._note = note

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        for job in jobs:
            try:
                yield self._client(job).train(job)
            except CLIENT_ERRORS as error:
                yield failure(job.client, error)

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        for job in jobs:
            try:
                yield self._client(job).evaluate_job(job)
            except CLIENT_ERRORS as error:
                yield failure(job.client, error)

    def notes(self) -> tuple[str, ...]:
        return (self._note,)

    def _client(self, job: TrainJob | EvaluateJob) -> LoRAClient:
        return LoRAClient(self.model, self.store, job.client, job.seed)
