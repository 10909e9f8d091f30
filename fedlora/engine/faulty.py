"""An engine whose clients fail on purpose, to test that a federation survives failures.

Which clients fail depends only on the job's seed, round and client, so a test can be repeated.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedlora.core.checks import at_least, fraction
from fedlora.core.payload import Payload
from fedlora.core.seeding import generator
from fedlora.core.types import (
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.data.store import TokenStore
from fedlora.engine.base import Engine, EngineSpec
from fedlora.engine.sequential import Sequential
from fedlora.models.language_model import LanguageModel
from fedlora.models.modules import ModelInfo


@dataclass(frozen=True)
class Faulty(EngineSpec):
    """Another engine with planted failures."""

    inner: EngineSpec = field(default_factory=Sequential)
    raise_fraction: float = 0.0
    """Fraction of a round's clients that raise instead of training."""
    nan_fraction: float = 0.0
    """Fraction that returns an update with a NaN in it."""
    shape_fraction: float = 0.0
    """Fraction that returns an update of the wrong shape."""
    kill_round: int = 0
    """The first worker process that gets a job of this round ends at once; 0: never."""
    kill_marker: str = ""
    """File that records the kill, so that a restarted worker is not killed again. Required with
    ``kill_round``."""

    def __post_init__(self) -> None:
        for name in ("raise_fraction", "nan_fraction", "shape_fraction"):
            fraction(f"engine.{name}", getattr(self, name))
        at_least("engine.kill_round", self.kill_round, 0)
        if self.kill_round and not self.kill_marker:
            raise ValueError(
                f"engine.kill_round={self.kill_round} needs engine.kill_marker: a file that does "
                "not exist yet"
            )

    @property
    def messages_per_worker(self) -> int:
        return self.inner.messages_per_worker

    def settled(self, info: ModelInfo, dtype: torch.dtype, device: torch.device) -> "Faulty":
        """The same around a settled inner engine."""
        return replace(self, inner=self.inner.settled(info, dtype, device))

    def open(self, model: LanguageModel, store: TokenStore) -> Engine:
        """The inner engine behind the faults."""
        return _FaultyEngine(self, self.inner.open(model, store))


class _FaultyEngine:
    def __init__(self, spec: Faulty, inner: Engine) -> None:
        self._spec, self._inner = spec, inner

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        for job in jobs:
            if job.round == self._spec.kill_round and _first(self._spec.kill_marker):
                os._exit(9)
            fault = self._fault(job)
            if fault == "raise":
                yield Failure(job.client, "PlantedFault", f"client {job.client.id} gave up")
                continue
            for result in self._inner.train([job]):
                yield _spoil(result, fault) if isinstance(result, Update) else result

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        return self._inner.evaluate(jobs)

    def notes(self) -> tuple[str, ...]:
        return self._inner.notes()

    def _fault(self, job: TrainJob) -> str:
        draw = generator(job.seed, "fault", job.round, job.client.id).random()
        for name in ("raise", "nan", "shape"):
            draw -= getattr(self._spec, f"{name}_fraction")
            if draw < 0:
                return name
        return ""


def _first(marker: str) -> bool:
    """Create the file; whether it did not exist before. This is atomic across processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _spoil(update: Update, fault: str) -> Update:
    return replace(update, payload=_spoil_payload(update.payload, fault)) if fault else update


def _spoil_payload(payload: Payload, fault: str) -> Payload:
    """The first tensor spoiled: not a number, or of another shape."""
    tensors = dict(payload.tensors())
    name, t = next(iter(tensors.items()))
    tensors[name] = t[..., :-1] if fault == "shape" else torch.full_like(t, torch.nan)
    return payload.from_header(payload.header(), tensors)
