"""An engine that wants everything at once and has something to say about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedlora.core.types import EvaluateJob, Evaluation, Failure, TrainJob, Update
from fedlora.data.store import TokenStore
from fedlora.engine.base import Engine
from fedlora.engine.sequential import Sequential
from fedlora.models.language_model import LanguageModel


@dataclass(frozen=True)
class Talkative(Sequential):
    """The sequential engine; every second client of a message claims company."""

    @property
    def messages_per_worker(self) -> int:
        return 1

    def open(self, model: LanguageModel, store: TokenStore) -> Engine:
        return _Talking(super().open(model, store))


class _Talking:
    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self._trained: set[int] = set()

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        self._trained |= {len(jobs)} - {0}
        for i, result in enumerate(self._inner.train(jobs)):
            assert isinstance(result, Update)
            yield replace(result, metrics={**result.metrics, "fused": float(i % 2)})

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        return self._inner.evaluate(jobs)

    def notes(self) -> tuple[str, ...]:
        return ("talkative", *(f"{n} at once" for n in sorted(self._trained)))
