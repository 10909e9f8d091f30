"""The fused engine, and the engine that chooses between fused and sequential training."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import plain_factors
from fedlora.core.types import (
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.data.store import TokenStore
from fedlora.engine.base import STATES, Engine, WorkerEngine
from fedlora.engine.choice import with_choices
from fedlora.engine.fused.check import (
    readers_of_all,
    reason_of,
    why_not_fused,
    why_not_ragged,
)
from fedlora.engine.fused.cost import CostModel, slots_for, total_memory
from fedlora.engine.fused.evaluation import FusedEvaluator
from fedlora.engine.fused.model import FusedModel
from fedlora.engine.fused.schedule import POLICIES, Schedule, policy
from fedlora.engine.fused.trainer import Chain, FusedTrainer, Limits, Planner
from fedlora.engine.sequential import SequentialEngine
from fedlora.models.language_model import LanguageModel
from fedlora.models.layers import AdaptedLinear
from fedlora.models.modules import ModelInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fused(WorkerEngine):
    """Configuration of the fused engine."""

    tokens: int = 0
    """Tokens of one fused step; 0: from the model's shape and the kind of device
    (`fedlora.engine.fused.cost`). Results depend on it in their last bits."""
    slots: int = 0
    """Clients in training at a time; 0: 1.5 times as many as fill a step."""
    policy: str = "refill"
    """Which clients run in which step: `fedlora.engine.fused.schedule.POLICIES`."""
    layout: str = "auto"
    """``ragged``: sequences end to end; ``padded``: one per row; ``auto``: ragged where the model
    can (tried when it is opened)."""
    checkpoint: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    memory: float = 0.25
    """Steps and slots may take this fraction of the memory of the machine or accelerator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("engine.tokens", self.tokens, 0)
        at_least("engine.slots", self.slots, 0)
        one_of("engine.policy", self.policy, POLICIES)
        one_of("engine.layout", self.layout, ("auto", "ragged", "padded"))
        if not 0 < self.memory <= 1:
            raise ValueError(f"engine.memory={self.memory} must lie in (0, 1]")

    @property
    def messages_per_worker(self) -> int:
        """Two: a message holds enough clients to fill steps, and a worker that is done early can
        take a second one."""
        return 2

    def settled(self, info: ModelInfo, dtype: torch.dtype, device: torch.device) -> "Fused":
        """The same with the token budget decided: the one of the cost model, halved until half of
        the engine's memory holds a step."""
        if self.tokens:
            return self
        model = CostModel.of(info, dtype)
        wanted = model.budget(device, info.classifies)
        budget = model.fitting(wanted, self.memory / 2 * total_memory(device))
        return replace(self, tokens=budget)

    def open(self, model: LanguageModel, store: TokenStore) -> Engine:
        """The engine on this model and these data; the sequential one if clients cannot share its
        forward passes.

        Raises:
            ValueError: if a ragged layout or checkpointing is configured and the model does not
                support it.
        """
        self.prepare()
        store, said = self.with_states(model, store)
        if reason := reason_of(why_not_fused, model):
            if self.layout == "ragged":
                raise ValueError(f"engine.layout=ragged: {reason}; use auto, or engine=sequential")
            return SequentialEngine(model, store, f"one by one, for {reason}", said)
        return self._engine()(self, model, store, said)

    def readers(self, model: LanguageModel) -> Sequence[AdaptedLinear]:
        """The layers of the last block that read all tokens, if it alone has adapters: what else is
        in it is computed for pooled rows, so their products are most of a forward pass."""
        return readers_of_all(model) if self._may_narrow(model.info) else ()

    def state_width(self, info: ModelInfo) -> int:
        """With keys and values beside the states, if the model turns out to be of that kind."""
        beside = self.prefix != STATES and self._may_narrow(info)
        return (3 if beside else 1) * info.width

    def _may_narrow(self, info: ModelInfo) -> bool:
        return info.classifies and info.frozen_blocks == info.blocks - 1 and self.layout != "padded"

    def _engine(self) -> "type[FusedEngine]":
        return FusedEngine


class FusedEngine:
    """Trains and evaluates many clients at once. Jobs that cannot be fused are done one by one, and
    a note says so.

    Args:
        spec: the configuration.
        model: clients are trained on it.
        store: the clients' data.
        said: what there is to say of it.
    """

    def __init__(
        self,
        spec: Fused,
        model: LanguageModel,
        store: TokenStore,
        said: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self.spec = spec.settled(model.info, model.network.dtype, model.device)
        self.model, self.store, self._said = model, store, said
        self._cost = CostModel.of(model.info, model.network.dtype)
        self._alone = SequentialEngine(model, store)
        self._notes: dict[str, None] = {}  # since training last began
        reason = "" if spec.layout == "padded" else reason_of(why_not_ragged, model)
        if reason and spec.layout == "ragged":
            raise ValueError(f"engine.layout=ragged: {reason}; use auto or padded")
        self._ragged = spec.layout != "padded" and not reason
        self._standing = (f"padded, for {reason}",) if reason else ()
        self.fused = FusedModel(model, self._ragged, spec.checkpoint)
        self._planner = Planner(self.fused, store)

    def train(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        self._notes.clear()
        yield from with_choices(jobs, self._train_decided)

    def _train_decided(self, jobs: Sequence[TrainJob]) -> Iterator[Update | Failure]:
        """Train jobs whose rank indices are decided, or that train all."""
        # Jobs that cannot be fused, with a note for each reason.
        reasons = [self._why_alone(j) for j in jobs]
        alone = [j for j, why in zip(jobs, reasons, strict=True) if why]
        for reason in dict.fromkeys(filter(None, reasons)):
            self._note(reason)

        # The others in groups over the same base: a fused step has one frozen weight per layer.
        chains: dict[str, list[Chain]] = {}
        together = [j for j, why in zip(jobs, reasons, strict=True) if not why]
        for planned in self._planner.chains(together):
            if isinstance(planned, Chain):
                chains.setdefault(planned.version, []).append(planned)
            else:
                yield planned
        for alike in chains.values():
            yield from self._train(alike)
        yield from self._alone.train(alone)

    def _why_alone(self, job: TrainJob) -> str:
        """The reason why a job cannot train in common forward passes; empty: it can."""
        technique, start, model = job.plan.technique, job.start, self.model
        if not technique.fuses:
            return technique.alone or start.alone
        factors, moved = start.low_rank(), start.base() is not None
        if factors is None or (moved and (not factors or model.network.dtype != model.dtype)):
            return start.alone
        if job.plan.privacy is not None:
            parts = start.parametrisation(model.dtype, model.device)
            if parts is not None:
                return "private steps of scalars that make factors one by one"
        return ""

    def _train(self, chains: Sequence[Chain]) -> Iterator[Update | Failure]:
        """Chains of one base."""
        limits = self._limits(chains)
        if not self._worth_fusing(chains, limits):
            self._note("sequential")
            yield from self._alone.train([c.job for c in chains])
            return
        layout = "ragged" if self._ragged else "padded"
        self._note(f"fused, {layout}, {limits.tokens} tokens per step")
        largest = max(f.tokens for c in chains for f in c.work.forwards)
        if largest > limits.tokens:
            self._note("forward passes larger than a step run alone")
        trainer = FusedTrainer(self.fused, self.store)
        yield from trainer.train(chains, limits)
        if trainer.rescue:
            self._note("clients of fused steps that failed one by one")
            yield from self._alone.train(trainer.rescue)

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        self.fused.require_free()
        alone = [j for j in jobs if not _plain(j)]
        evaluator = FusedEvaluator(self.fused, self.store, self.spec.tokens)
        yield from evaluator.evaluate([j for j in jobs if _plain(j)])
        if evaluator.rescue:
            self._note("clients of fused evaluations that failed one by one")
        yield from self._alone.evaluate([*alone, *evaluator.rescue])

    def notes(self) -> tuple[str, ...]:
        return (*self._standing, *self._notes, *self._said())

    def _note(self, text: str) -> None:
        self._notes.setdefault(text)

    def _worth_fusing(self, chains: Sequence[Chain], limits: Limits) -> bool:
        """Whether to fuse at all: this engine always does."""
        return True

    def _limits(self, chains: Sequence[Chain]) -> Limits:
        """The limits of fused steps: as configured, else from the cost model."""
        # A slot holds four rows: parameters, gradients and Adam's two moments. Slots get the memory
        # that a step leaves.
        spec, works = self.spec, [c.work for c in chains]
        row = 4.0 * self.model.dtype.itemsize * max(c.layout.size for c in chains)
        left = spec.memory * total_memory(self.model.device) - self._cost.memory(spec.tokens)
        slots = spec.slots or slots_for(spec.tokens, works, left, row, not self._ragged)
        return Limits(policy(spec.policy), spec.tokens, slots)


@dataclass(frozen=True)
class Auto(Fused):
    """The fused engine if it is expected to be faster, else the sequential one.

    It decides for each cohort by the cost of steps and tokens: fusing always saves steps, but if a
    model needs padding, the padding may cost more than the saved steps.
    """

    def _engine(self) -> "type[FusedEngine]":
        return AutoEngine


class AutoEngine(FusedEngine):
    """The engine of `Auto`: it decides for each cohort whether to fuse."""

    def _worth_fusing(self, chains: Sequence[Chain], limits: Limits) -> bool:
        """Compare the predicted cost of this schedule with that of clients one by one."""
        if self._ragged:  # the same tokens without padding, in fewer steps
            return True
        works = [c.work for c in chains]
        schedule = Schedule(works, limits.policy, limits.tokens, limits.slots, padded=True)
        return self._cost.predict(schedule) < self._cost.one_by_one(works)


def _plain(job: EvaluateJob) -> bool:
    """Whether a job evaluates factors over the model's own base, or the base alone."""
    return job.adapter is None or plain_factors(job.adapter) is not None
