"""The interface of engines. An engine executes jobs; it does not know which method needs them.

The sequential engine is the specification. Every other engine must give the same results up to
rounding, one per job, in any order of completion.
"""

import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedlora.core.checks import MOST_THREADS, at_least, one_of, within
from fedlora.core.payload import Payload
from fedlora.core.types import (
    Client,
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.data.store import TokenStore
from fedlora.engine.memory import keep_freed_memory
from fedlora.engine.prefix import DTYPES, PrefixCache, why_not_prefix
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import AdaptedLinear
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


class Faults(Protocol):
    """Failures that an engine plants among the clients that train, for rehearsals."""

    def before(
        self, seed: int, round: int, client: Client, *, learns: bool | None = None
    ) -> Failure | None:
        """The failure of a client in place of what it was asked for; None: it does it. May end the
        process.

        Args:
            seed: of the run.
            round: counted from 1.
            client: that was asked.
            learns: of a split's exchange: whether it brings the gradient of an earlier one; None:
                the client is asked for a whole round of training.
        """

    def spoiled(self, seed: int, round: int, client: Client, payload: Payload) -> Payload:
        """What the client returns of what it has trained."""


@dataclass(frozen=True)
class EngineSpec:
    """The configuration of an engine; a worker opens it once and keeps it."""

    @property
    def faults(self) -> Faults | None:
        """What makes clients fail in training on purpose, under every engine and in splits; None:
        nothing does."""
        return None

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

    def with_states(
        self, model: LanguageModel, store: TokenStore
    ) -> tuple[TokenStore, Callable[[], tuple[str, ...]]]:
        """The store of an engine on this model, and what is to be said of it; here without states
        of frozen blocks."""
        return store, tuple

    @abstractmethod
    def open(self, model: LanguageModel, store: TokenStore) -> Engine:
        """The engine on this model and these data."""


OFF, AUTO, ON, STATES = "off", "auto", "on", "states"
"""Values of ``engine.prefix``."""


@dataclass(frozen=True)
class WorkerEngine(EngineSpec):
    """What engines that train on a worker's resident model have in common."""

    threads: int = 1
    """Intra-op threads of a worker process; 0 leaves PyTorch's choice. With one, results do not
    depend on the machine's number of cores, and many workers do not compete for them."""
    reuse_memory: bool = True
    """Keep up to 512 MiB of freed memory in the process if glibc is used (`keep_freed_memory`):
    faster on CPU, bitwise identical results."""
    prefix: str = AUTO
    """Whether hidden states behind the blocks without adapters are computed once per example and
    kept on disk (`fedlora.engine.prefix`): ``off``; ``on``, with the frozen products of a last
    block where the engine has a use for them; ``states``, without; or ``auto``, which a run decides
    by their cost when it begins."""
    prefix_gb: float = 16.0
    """The most that they may take on disk, in 10^9 bytes. Examples beyond it run through all
    blocks."""
    prefix_dtype: str = "float32"
    """``float32``: as the base computes them; ``bfloat16``: rounded, half the size."""

    def __post_init__(self) -> None:
        within("engine.threads", self.threads, 0, MOST_THREADS)
        one_of("engine.prefix", self.prefix, (OFF, AUTO, ON, STATES))
        at_least("engine.prefix_gb", self.prefix_gb, 0, strict=True)
        one_of("engine.prefix_dtype", self.prefix_dtype, DTYPES)

    def prepare(self) -> None:
        """Set up the process."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.reuse_memory:
            keep_freed_memory()

    def readers(self, model: LanguageModel) -> Sequence[AdaptedLinear]:
        """The adapted layers whose frozen products this engine wants beside the states."""
        return ()

    def state_width(self, info: ModelInfo) -> int:
        """The most numbers that are kept of a token, for what they take on disk."""
        return info.width

    def with_states(
        self, model: LanguageModel, store: TokenStore
    ) -> tuple[TokenStore, Callable[[], tuple[str, ...]]]:
        """The store of an engine on this model, and what is to be said of it: with a prefix its
        examples bring their states.

        What ``auto`` means is decided before an engine is opened: until then there is none.
        """
        if self.prefix not in (ON, STATES):
            return store, tuple
        reason = why_not_prefix(model)
        if reason:
            return store, lambda: (f"no prefix, for {reason}",)
        readers = self.readers(model) if self.prefix == ON else ()
        cache = PrefixCache(model, store, self.prefix_dtype, 1e9 * self.prefix_gb, readers)
        return store.with_states(cache.attach), cache.notes


def failure(client: Client, error: BaseException) -> Failure:
    """An exception as a record that can travel."""
    text = "".join(traceback.format_exception(error))
    return Failure(client, type(error).__name__, str(error), text)
