"""Trains many clients concurrently on one fused model: a row, an optimizer and a schedule each.

Every client's loss is a mean over its own step's tokens, and the losses are summed; since a
client's factors enter its own loss alone, its gradient is exactly that of training alone. A client
that has finished leaves the batch: it is never multiplied by zero.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedlora.core.seeding import dropout_seeds
from fedlora.core.terms import TrainedBuffer, TrainedLayer, TrainedState
from fedlora.core.types import (
    Failure,
    TrainJob,
    Update,
)
from fedlora.data.batches import (
    TokenExample,
    check_vocabulary,
    num_steps,
    parts,
    step_indices,
    supervised_tokens,
)
from fedlora.data.store import TokenStore
from fedlora.engine.base import failure
from fedlora.engine.client import completed, training_examples
from fedlora.engine.fused.bank import AdapterBank, Layout, Layouts
from fedlora.engine.fused.batch import Lane
from fedlora.engine.fused.model import FusedModel
from fedlora.engine.fused.schedule import Forward, Policy, Schedule, Work
from fedlora.models.layers import dropped_share
from fedlora.models.modules import check_adapter
from fedlora.training.loop import (
    Trace,
    check_trace,
    clip_and_step,
    learning_rates,
    optimizer_for,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chain:
    """One client's round, planned: which examples each forward takes, which layout its row has."""

    job: TrainJob
    layout: Layout
    start: Tensor
    """The start adapter as a row; one for all clients that share it."""
    steps: tuple[tuple[tuple[int, ...], ...], ...]
    """Optimizer steps of forward passes of example indices."""
    work: Work
    version: str = ""
    """Of the moved base that it stands on; empty: the model's own."""

    @property
    def forwards(self) -> list[tuple[int, int]]:
        """``(step, part of it)`` of each forward pass."""
        return [(s, i) for s, step in enumerate(self.steps) for i in range(len(step))]


class Planner:
    """Turns jobs into chains."""

    def __init__(self, fused: FusedModel, store: TokenStore) -> None:
        self._info, self._store = fused.model.info, store
        self._vocabulary = fused.model.vocabulary
        self._layouts = Layouts(self._info.modules)
        self._dtype, self._device = fused.model.dtype, fused.model.device

    def chains(self, jobs: Sequence[TrainJob]) -> Iterator[Chain | Failure]:
        """Plan jobs. A job that cannot be trained is a failure."""
        starts: dict[int, tuple[Layout, Tensor]] = {}
        for job in jobs:
            try:
                yield self._chain(job, starts)
            except Exception as error:
                yield failure(job.client, error)

    def _chain(self, job: TrainJob, starts: dict[int, tuple[Layout, Tensor]]) -> Chain:
        """Plan a job. Examples are read again when its turn comes: waiting takes no memory.

        Raises:
            ValueError: if the job cannot be trained, naming client and reason.
            IndexError: if an example holds a token that the model does not have.
        """
        adapter, base = job.start.low_rank(), job.start.base()
        assert adapter is not None
        check_adapter(adapter, self._info)
        examples = training_examples(self._store, job)
        check_vocabulary(examples, self._vocabulary, job.client.id)
        who = {"seed": job.seed, "round": job.round, "client": job.client.id}
        steps = tuple(
            tuple(tuple(part) for part in parts(indices, job.plan))
            for indices in step_indices(len(examples), job.plan, **who)
        )
        lengths = [len(e.input_ids) - 1 for e in examples]
        forwards = tuple(
            Forward(len(part), max(lengths[i] for i in part), sum(lengths[i] for i in part))
            for step in steps
            for part in step
        )
        if id(job.start) not in starts:
            layout = self._layouts(adapter)
            packed = layout.pack(adapter, self._dtype, self._device)
            starts[id(job.start)] = layout, packed
        version = "" if base is None else base.version
        return Chain(job, *starts[id(job.start)], steps, Work(forwards), version)


@dataclass(eq=False)
class Resident:
    """A client in a slot: its row, its optimizer, what has happened so far."""

    chain: Chain
    slot: int
    row: Tensor
    grad: Tensor
    examples: Sequence[TokenExample]
    buffers: list[nn.Parameter] = field(init=False)
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __post_init__(self) -> None:
        plan, at = self.chain.job.plan, self.chain.layout.a_size
        trained = slice(0 if plan.train_a else at, None if plan.train_b else at)
        buffer = nn.Parameter(self.row[trained])
        buffer.grad = self.grad[trained]
        self.buffers = [buffer]
        self._optimizer = optimizer_for(plan, self.buffers)
        self._forwards = self.chain.forwards
        self._rates = learning_rates(num_steps(len(self.examples), plan), plan)
        job = self.chain.job
        self._seeds = dropout_seeds(job.seed, job.round, job.client.id)
        self._dropped = dropped_share(plan.dropout)
        self._state = None if plan.term is None else self._trained_state(trained)

    def _trained_state(self, trained: slice) -> TrainedState:
        """What the client trains, as views of its rows of the bank and of the common start."""
        plan, layout, start = self.chain.job.plan, self.chain.layout, self.chain.start
        buffer = TrainedBuffer(self.row[trained], start[trained], self.grad[trained])
        now, begin, grads = (layout.factors(r) for r in (self.row, start, self.grad))
        layers = [
            TrainedLayer(
                a=now[path][0],
                b=now[path][1].t(),
                start_a=begin[path][0],
                start_b=begin[path][1].t(),
                grad_a=grads[path][0] if plan.train_a else None,
                grad_b=grads[path][1].t() if plan.train_b else None,
                scale=part.scale,
            )
            for path, part in zip(layout.paths, layout.parts, strict=True)
            if part is not None
        ]
        return TrainedState([buffer], layers)

    def lane(self, index: int) -> Lane:
        """Its part of a batch that runs its forward ``index``."""
        plan, (step, part) = self.chain.job.plan, self._forwards[index]
        if part == 0:
            supervised = [
                supervised_tokens(self.examples[i], plan.loss)
                for indices in self.chain.steps[step]
                for i in indices
            ]
            self.tokens.append(sum(supervised))
        return Lane(
            self.slot,
            self.chain.layout,
            [self.examples[i] for i in self.chain.steps[step][part]],
            plan.loss,
            self.tokens[-1],
            plan.train_a,
            plan.train_b,
            self._dropped,
            next(self._seeds),
        )

    def learn(self, index: int, loss: Tensor) -> None:
        """Take in one forward's loss; step the optimizer if it was the last of its step."""
        plan, (step, part) = self.chain.job.plan, self._forwards[index]
        if part == 0:
            self.losses.append(loss)
        else:
            self.losses[-1] = self.losses[-1] + loss
        if part + 1 < len(self.chain.steps[step]):
            return
        self._regularise()
        if plan.term is not None and self._state is not None:
            with torch.no_grad():
                plan.term.add_gradient(self._state)
        self.norms.append(
            clip_and_step(self._optimizer, self.buffers, self._rates[step], plan.max_grad_norm)
        )
        self.grad.zero_()

    def _regularise(self) -> None:
        """Add the gradient of the technique's penalty, if it has one."""
        layout, plan = self.chain.layout, self.chain.job.plan
        if not plan.technique.penalises:
            return
        pairs = [
            (a.detach().requires_grad_(), bt.t().detach().requires_grad_())
            for a, bt in layout.factors(self.row).values()
        ]
        plan.technique.penalty(pairs).backward()
        for (a, b), (grad_a, grad_bt) in zip(
            pairs, layout.factors(self.grad).values(), strict=True
        ):
            if plan.train_a and a.grad is not None:
                grad_a += a.grad
            if plan.train_b and b.grad is not None:
                grad_bt += b.grad.t()

    def update(self, num_examples: int) -> Update:
        """What came of it.

        Raises:
            FloatingPointError: if a loss or the result is not finite.
        """
        job, layout = self.chain.job, self.chain.layout
        change = torch.linalg.vector_norm(self.row - self.chain.start)
        trace = Trace.of(self.losses, self.tokens, self.norms, change)
        check_trace(trace, job.plan)
        spent = {
            "examples": float(len(self.examples)),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "fused": 1.0,
        }
        payload = job.start.trained(layout.read(self.row))
        return completed(job, payload, trace.metrics() | spent, num_examples)


@dataclass(frozen=True)
class Limits:
    """How much runs at once."""

    policy: Policy
    tokens: int
    """Of one fused step."""
    slots: int


class FusedTrainer:
    """Runs planned chains of one base; clients of a fused step that raises are left in `rescue`."""

    def __init__(self, fused: FusedModel, store: TokenStore) -> None:
        self._fused, self._store = fused, store
        self.rescue: list[TrainJob] = []
        """Jobs that must be trained another way."""

    def train(self, chains: Sequence[Chain], limits: Limits) -> Iterator[Update | Failure]:
        """One result per chain, as they finish, except those that are left in `rescue`."""
        for autocast in dict.fromkeys(c.job.plan.autocast for c in chains):
            alike = [c for c in chains if c.job.plan.autocast == autocast]
            yield from self._train(alike, limits, autocast == "bf16")

    def _train(
        self, chains: Sequence[Chain], limits: Limits, autocast: bool
    ) -> Iterator[Update | Failure]:
        fused = self._fused
        limits = replace(limits, slots=min(limits.slots, len(chains)))
        schedule = Schedule(
            [c.work for c in chains],
            limits.policy,
            limits.tokens,
            limits.slots,
            padded=not fused.is_ragged,
        )
        bank = AdapterBank(
            limits.slots,
            max(c.layout.size for c in chains),
            fused.model.dtype,
            fused.model.device,
            fused.compute_dtype(autocast),
        )
        residents: dict[int, Resident] = {}
        with fused.mounted(bank, autocast, base=chains[0].job.start.base()):
            for step in schedule:
                for who, slot in step.admitted:
                    try:
                        residents[who] = self._admit(bank, chains[who], slot)
                    except Exception as error:
                        schedule.drop(who)
                        yield failure(chains[who].job.client, error)
                active = [(w, index) for w, _, index in step.active if w in residents]
                try:
                    self._step([(residents[who], index) for who, index in active])
                except Exception as error:
                    log.warning("a fused step failed: %s: %s", type(error).__name__, error)
                    for who, _ in active:
                        self.rescue.append(residents.pop(who).chain.job)
                        schedule.drop(who)
                    continue
                for who in [w for w in step.finished if w in residents]:
                    yield self._finish(residents.pop(who))

    def _admit(self, bank: AdapterBank, chain: Chain, slot: int) -> Resident:
        row, grad = bank.load(slot, chain.start)
        return Resident(chain, slot, row, grad, training_examples(self._store, chain.job))

    def _step(self, active: Sequence[tuple[Resident, int]]) -> None:
        if not active:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        batch = self._fused.batch([resident.lane(index) for resident, index in active])
        losses = self._fused.backward(batch)
        for (resident, index), loss in zip(active, losses.unbind(), strict=True):
            resident.learn(index, loss)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        for resident, index in active:
            share = resident.chain.work.forwards[index].tokens / batch.tokens
            resident.seconds += share * wall
            resident.cpu_seconds += share * cpu

    def _finish(self, resident: Resident) -> Update | Failure:
        job = resident.chain.job
        try:
            return resident.update(self._store.count(job.client.id, "train"))
        except Exception as error:
            return failure(job.client, error)
