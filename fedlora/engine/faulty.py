"""An engine whose clients fail on purpose, to test that a federation survives failures.

Which clients fail depends only on the job's seed, round and client, so a test can be repeated.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fedlora.core.checks import at_least, fraction, one_of
from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.payload import Payload
from fedlora.core.seeding import generator
from fedlora.core.types import (
    Client,
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.data.store import TokenStore
from fedlora.engine.base import Engine, EngineSpec, Faults, failure
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
    deadly: tuple[int, ...] = ()
    """Ids of clients that end or block their worker process, every time."""
    deadly_way: str = "exit"
    """How: ``exit`` (`os._exit`), ``segfault``, ``abort``, ``kill`` (SIGKILL, as the kernel does
    when memory is short), ``system_exit`` (the exception) or ``hang``."""
    deadly_in: str = "train"
    """When: ``train`` or ``evaluate``."""
    deadly_at: str = "forward"
    """When in a round of a split: before its first ``forward`` pass, or ``backward``: between that
    and its gradient."""

    def __post_init__(self) -> None:
        for name in ("raise_fraction", "nan_fraction", "shape_fraction"):
            fraction(f"engine.{name}", getattr(self, name))
        at_least("engine.kill_round", self.kill_round, 0)
        one_of("engine.deadly_way", self.deadly_way, _WAYS)
        one_of("engine.deadly_in", self.deadly_in, ("train", "evaluate"))
        one_of("engine.deadly_at", self.deadly_at, ("forward", "backward"))
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

    @property
    def faults(self) -> Faults | None:
        """Those of training, if there are any."""
        fractions = self.raise_fraction + self.nan_fraction + self.shape_fraction
        deadly = self.deadly and self.deadly_in == "train"
        return _Planted(self) if fractions or self.kill_round or deadly else None

    def open(self, model: LanguageModel, store: TokenStore) -> Engine:
        """The inner engine behind the faults."""
        return _FaultyEngine(self, self.inner.open(model, store))

    def end(self, phase: str, client: Client) -> Failure | None:
        """End or block this process for a client that does so; its failure if it only raised."""
        if self.deadly_in != phase or client.id not in self.deadly:
            return None
        try:
            _WAYS[self.deadly_way]()
        except CLIENT_ERRORS as error:
            return failure(client, error)
        return None


@dataclass(frozen=True)
class _Planted:
    """The faults of clients that train; see `fedlora.engine.base.Faults`."""

    spec: Faulty

    def before(
        self, seed: int, round: int, client: Client, *, learns: bool | None = None
    ) -> Failure | None:
        if round == self.spec.kill_round and _first(self.spec.kill_marker):
            os._exit(9)
        early = learns is None or self.spec.deadly_at == "forward"
        if (early or learns) and (ended := self.spec.end("train", client)) is not None:
            return ended
        if self._fault(seed, round, client) == "raise":
            return Failure(client, "PlantedFault", f"client {client.id} gave up")
        return None

    def spoiled(self, seed: int, round: int, client: Client, payload: Payload) -> Payload:
        fault = self._fault(seed, round, client)
        return _spoil_payload(payload, fault) if fault else payload

    def _fault(self, seed: int, round: int, client: Client) -> str:
        draw = generator(seed, "fault", round, client.id).random()
        for name in ("raise", "nan", "shape"):
            draw -= getattr(self.spec, f"{name}_fraction")
            if draw < 0:
                return name
        return ""


class _FaultyEngine:
    def __init__(self, spec: Faulty, inner: Engine) -> None:
        self._spec, self._inner = spec, inner

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        faults = self._spec.faults
        for job in jobs:
            who = job.seed, job.round, job.client
            if faults is not None and (ended := faults.before(*who)) is not None:
                yield ended
                continue
            for result in self._inner.train([job]):
                if isinstance(result, Update) and faults is not None:
                    result = replace(result, payload=faults.spoiled(*who, result.payload))
                yield result

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        for job in jobs:
            if (ended := self._spec.end("evaluate", job.client)) is not None:
                yield ended
                continue
            yield from self._inner.evaluate([job])

    def notes(self) -> tuple[str, ...]:
        return self._inner.notes()


_WAYS: dict[str, Callable[[], object]] = {
    "exit": lambda: os._exit(9),
    "segfault": partial(signal.raise_signal, signal.SIGSEGV),
    "abort": os.abort,
    "kill": partial(signal.raise_signal, signal.SIGKILL),
    "system_exit": lambda: sys.exit(9),
    "hang": lambda: time.sleep(1e6),
}


def _first(marker: str) -> bool:
    """Create the file; whether it did not exist before. This is atomic across processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _spoil_payload(payload: Payload, fault: str) -> Payload:
    """The first tensor spoiled: not a number, or of another shape."""
    tensors = dict(payload.tensors())
    name, t = next(iter(tensors.items()))
    tensors[name] = t[..., :-1] if fault == "shape" else torch.full_like(t, torch.nan)
    return payload.from_header(payload.header(), tensors)
