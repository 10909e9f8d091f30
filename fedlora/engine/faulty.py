"""An engine whose clients fail on purpose: a rehearsal of what a federation must survive.

Which clients fail depends on the job's seed, round and client alone: a rehearsal can be repeated.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedlora.core.checks import at_least, share
from fedlora.core.seeding import generator
from fedlora.core.types import (
    EvaluateJob,
    Evaluation,
    Factors,
    Failure,
    MaskedScale,
    Payload,
    Rebased,
    SparseDelta,
    TrainJob,
    Update,
)
from fedlora.data.store import TokenStore
from fedlora.engine.base import Engine, EngineSpec
from fedlora.engine.sequential import Sequential
from fedlora.models.language_model import LanguageModel


@dataclass(frozen=True)
class Faulty(EngineSpec):
    """Another engine with planted failures."""

    inner: EngineSpec = field(default_factory=Sequential)
    raise_share: float = 0.0
    """Share of a round's clients that raise instead of training."""
    nan_share: float = 0.0
    """Share that returns an update with a NaN in it."""
    shape_share: float = 0.0
    """Share that returns an update of the wrong shape."""
    kill_round: int = 0
    """The first worker process that is handed a job of this round ends at once; 0: never."""
    kill_marker: str = ""
    """File that remembers the kill, so that a restarted worker lives on. Needed to kill."""

    def __post_init__(self) -> None:
        for name in ("raise_share", "nan_share", "shape_share"):
            share(f"engine.{name}", getattr(self, name))
        at_least("engine.kill_round", self.kill_round, 0)
        if self.kill_round and not self.kill_marker:
            raise ValueError(
                f"engine.kill_round={self.kill_round} needs engine.kill_marker: a file that does "
                "not exist yet"
            )

    @property
    def messages_per_worker(self) -> int:
        return self.inner.messages_per_worker

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
            draw -= getattr(self._spec, f"{name}_share")
            if draw < 0:
                return name
        return ""


def _first(marker: str) -> bool:
    """Whether nobody has made this file before: the making is atomic across processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _spoil(update: Update, fault: str) -> Update:
    return replace(update, payload=_spoiled(update.payload, fault)) if fault else update


def _spoiled(payload: Payload, fault: str) -> Payload:
    if isinstance(payload, SparseDelta):
        path, values = next(iter(payload.values.items()))
        bad = (
            values[:-1] if fault == "shape" else values.index_fill(0, torch.tensor([0]), torch.nan)
        )
        return replace(payload, values={**payload.values, path: bad})
    if isinstance(payload, MaskedScale):
        return _spoiled_scale(payload, fault)
    if isinstance(payload, Rebased):
        path, shift = next(iter(payload.shift.items()))
        bad = shift[:-1] if fault == "shape" else torch.full_like(shift, torch.nan)
        return replace(payload, shift={**payload.shift, path: bad}, factors={})
    path, f = next(iter(payload.items()))
    if fault == "shape":
        spoiled = Factors(f.a[:, :-1], f.b, f.alpha)
    else:
        b = f.b.clone()
        b[0, 0] = torch.nan
        spoiled = Factors(f.a, b, f.alpha)
    return {**payload, path: spoiled}


def _spoiled_scale(payload: MaskedScale, fault: str) -> MaskedScale:
    name = next(n for n in ("alpha", "beta", "change") if getattr(payload, n))
    tensors = getattr(payload, name)
    path, t = next(iter(tensors.items()))
    bad = t[..., :-1] if fault == "shape" else torch.full_like(t, torch.nan)
    changed: dict[str, Any] = {name: {**tensors, path: bad}}
    return replace(payload, **changed)
