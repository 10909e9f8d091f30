"""Trains many clients concurrently on one fused model. Each client has a row of the adapter bank,
an optimizer and a learning-rate schedule of its own.

A client's loss is the mean over the tokens of its own step. The losses are summed. A client's
factors enter its own loss only, so its gradient equals that of training alone. A client that has
finished leaves the batch, so no work is done for it.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.rates import learning_rates
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
    lengths_of,
    num_steps,
    parts,
    step_indices,
    supervised_tokens,
)
from fedlora.data.store import TokenStore
from fedlora.engine.base import failure
from fedlora.engine.client import completed, training_examples
from fedlora.engine.fused.bank import AdapterBank, Layout, Layouts
from fedlora.engine.fused.lanes import Lane
from fedlora.engine.fused.model import FusedModel
from fedlora.engine.fused.parametrised import Parametrised
from fedlora.engine.fused.private import ExampleRows
from fedlora.engine.fused.schedule import Forward, Policy, Schedule, Work
from fedlora.models.layers import dropped_share
from fedlora.models.modules import check_adapter, check_head
from fedlora.training.loop import Stepper, Trace, check_trace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chain:
    """One client's planned round: the examples of each forward pass, and the layout of its row."""

    job: TrainJob
    layout: Layout
    start: Tensor
    """The start adapter as a row ``[layout.size]``; clients with the same start share it."""
    steps: tuple[tuple[tuple[int, ...], ...], ...]
    """Example indices of each forward pass of each optimizer step."""
    work: Work
    """The same forward passes as the schedule sees them: rows, widths and tokens."""
    version: str = ""
    """Version of the moved base under its factors; empty: the model's own base."""
    empty: frozenset[int] = frozenset()
    """Private steps that drew no example; a forward pass of the first one stands in for them."""

    @property
    def rows(self) -> int:
        """Rows of a bank that it needs beside its own: one per example of a private pass."""
        if self.job.plan.privacy is None:
            return 0
        return max(len(part) for step in self.steps for part in step)

    @property
    def forwards(self) -> list[tuple[int, int]]:
        """``(step, part of the step)`` of each forward pass."""
        return [(s, i) for s, step in enumerate(self.steps) for i in range(len(step))]


class Planner:
    """Turns jobs into chains."""

    def __init__(self, fused: FusedModel, store: TokenStore) -> None:
        self._info, self._store, self._inputs = fused.model.info, store, fused.model.inputs
        self._vocabulary = fused.model.vocabulary
        self._layouts = Layouts(self._info.modules)
        self._dtype, self._device = fused.model.dtype, fused.model.device

    def chains(self, jobs: Sequence[TrainJob]) -> Iterator[Chain | Failure]:
        """Plan jobs. A job that cannot be trained is a failure."""
        starts: dict[int, tuple[Layout, Tensor]] = {}
        for job in jobs:
            try:
                yield self._chain(job, starts)
            except CLIENT_ERRORS as error:
                yield failure(job.client, error)

    def _chain(self, job: TrainJob, starts: dict[int, tuple[Layout, Tensor]]) -> Chain:
        """Plan a job. Examples are read again when the client is admitted, so that a waiting client
        takes no memory.

        Raises:
            ValueError: if the job cannot be trained, naming client and reason.
            IndexError: if an example holds a token that the model does not have.
        """
        adapter, base = job.start.low_rank(), job.start.base()
        assert adapter is not None
        check_adapter(adapter, self._info)
        head = job.start.head()
        check_head(head, self._info)
        examples = training_examples(self._store, job)
        check_vocabulary(examples, self._vocabulary, job.client.id)

        # Which examples each optimizer step has, and how it is cut into forward passes.
        who = {"seed": job.seed, "round": job.round, "client": job.client.id}
        steps = tuple(
            tuple(tuple(part) for part in parts(indices, job.plan))
            for indices in step_indices(
                len(examples), job.plan, **who, lengths=lengths_of(examples)
            )
        )
        empty = frozenset(i for i, step in enumerate(steps) if not step)
        steps = tuple(step or ((0,),) for step in steps)

        # Their size in input tokens.
        lengths = [self._inputs(e) for e in examples]
        forwards = tuple(
            Forward(len(part), max(lengths[i] for i in part), sum(lengths[i] for i in part))
            for step in steps
            for part in step
        )

        # The start as a row [size]; clients that share a payload share the row.
        if id(job.start) not in starts:
            layout = self._layouts(adapter, head)
            packed = layout.pack(adapter, self._dtype, self._device, head)
            starts[id(job.start)] = layout, packed
        version = "" if base is None else base.version
        return Chain(job, *starts[id(job.start)], steps, Work(forwards), version, empty)


@dataclass(eq=False)
class Resident:
    """A client in a slot: its row, its optimizer, and the trace of its steps so far."""

    chain: Chain
    slot: int
    row: Tensor
    """``[layout.size]``: its parameters, a view of the bank."""
    grad: Tensor
    """``[layout.size]``: their gradients, a view of the bank."""
    examples: Sequence[TokenExample]
    rows: ExampleRows | None = None
    """Under privacy: rows of the bank for the examples of a forward pass."""
    buffers: list[nn.Parameter] = field(init=False)
    """What is trained: sections of the row, and scalars that make its factors."""
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __post_init__(self) -> None:
        plan, layout, start = self.chain.job.plan, self.chain.layout, self.chain.job.start
        made = start.parametrisation(self.row.dtype, self.row.device)
        self._made = None if made is None else Parametrised(made, layout, self.row, self.grad)
        self._sides = (plan.train_a, plan.train_b)  # the factors that need a gradient
        trained = layout.trained(*self._sides)
        if self._made is not None:
            self._sides, trained = self._made.sides, layout.trained(False, False)  # the head
        self.buffers = [nn.Parameter(self.row[section]) for section in trained]
        for buffer, section in zip(self.buffers, trained, strict=True):
            buffer.grad = self.grad[section]
        if self._made is not None:
            self.buffers.insert(0, self._made.buffer)
        self._stepper = Stepper(plan, self.buffers, self._masks(trained))
        self._forwards = self.chain.forwards
        self._rates = learning_rates(num_steps(len(self.examples), plan), plan)
        job = self.chain.job
        self._seeds = dropout_seeds(job.seed, job.round, job.client.id)
        self._dropped = dropped_share(plan.dropout)
        self._trained = trained
        self._state = None if plan.term is None else self._trained_state(trained)

    def _masks(self, trained: Sequence[slice]) -> list[Tensor] | None:
        """The scalars of each trained section that belong to chosen rank indices; None: all do."""
        chosen = self.chain.job.chosen
        if chosen is None:
            return None
        mask = self.chain.layout.mask(chosen.indices, self.row.device)
        return [mask[section] for section in trained]

    def _trained_state(self, trained: Sequence[slice]) -> TrainedState:
        """What the client trains, as views of its rows of the bank and of the common start."""
        # Rows as factors by module path: A [r, d_in] and B^T [r, d_out], hence the transposes.
        plan, layout, start = self.chain.job.plan, self.chain.layout, self.chain.start
        head, travels = slice(layout.head_at, layout.size), self.chain.job.start.travels
        if not travels:  # a client's own head is not compared with the start
            cut = [slice(s.start, min(s.stop, head.start)) for s in trained]
            trained = [s for s in cut if s.start < s.stop]
        rest = [head] if layout.head and travels else []
        buffers, others = (
            [TrainedBuffer(self.row[s], start[s], self.grad[s]) for s in sections]
            for sections in (trained, rest)
        )
        if self._made is not None:
            made, grad = self._made, self._made.buffer.grad
            assert grad is not None
            buffers.insert(0, TrainedBuffer(made.buffer.detach(), made.start, grad))
            return TrainedState(buffers, (), others)
        now, begin, grads = (layout.factors(r) for r in (self.row, start, self.grad))
        linear = self.chain.job.start.linear() or {}
        layers = [
            TrainedLayer(
                a=now[path][0],
                b=now[path][1].t(),
                start_a=begin[path][0],
                start_b=begin[path][1].t(),
                grad_a=grads[path][0] if plan.train_a else None,
                grad_b=grads[path][1].t() if plan.train_b else None,
                scale=part.scale,
                linear_a=linear[path].a.to(self.row) if path in linear else None,
                linear_b=linear[path].b.to(self.row) if path in linear else None,
            )
            for path, part in zip(layout.paths, layout.parts, strict=True)
            if part is not None
        ]
        return TrainedState(buffers, layers, others)

    def lane(self, index: int) -> Lane:
        """The client's part of a batch that runs its forward pass ``index``."""
        # At the first part of a step: count the supervised tokens of the whole step, by which the
        # loss of every part is divided.
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
            *self._sides,
            self._dropped,
            next(self._seeds),
        )

    def lanes(self, index: int) -> list[Lane]:
        """The client's parts of a batch: one, or under privacy one of each example, with rows of
        their own."""
        if self.rows is None:
            return [self.lane(index)]
        plan, (step, part) = self.chain.job.plan, self._forwards[index]
        empty = step in self.chain.empty
        if part == 0:
            drawn = [] if empty else [i for indices in self.chain.steps[step] for i in indices]
            own = [supervised_tokens(self.examples[i], plan.loss) for i in drawn]
            self.tokens.append(sum(own))
        examples = [self.examples[i] for i in self.chain.steps[step][part]]
        self.rows.load(self.row, [supervised_tokens(e, plan.loss) for e in examples], empty)
        return [
            Lane(
                slot,
                self.chain.layout,
                [example],
                plan.loss,
                tokens,
                *self._sides,
                self._dropped,
                0 if empty else next(self._seeds),
            )
            for slot, example, tokens in zip(
                self.rows.slots, examples, self.rows.tokens, strict=True
            )
        ]

    def taken(self, losses: Tensor) -> Tensor:
        """The loss of a forward pass, a scalar; under privacy the clipped gradients of its examples
        are added to the client's.

        Args:
            losses: ``[lanes]``, of its lanes.
        """
        if self.rows is None:
            return losses[0]
        self.rows.add_clipped(self.grad, self._trained)
        return self.rows.loss(losses) / max(1, self.tokens[-1])

    def learn(self, index: int, loss: Tensor) -> None:
        """Record the loss of one forward pass; after the last part of a step, step the optimizer.

        Args:
            index: the forward pass of the client's chain.
            loss: a detached scalar, the part's sum of losses over the tokens of the whole step.
        """
        plan, (step, part) = self.chain.job.plan, self._forwards[index]
        if part == 0:
            self.losses.append(loss)
        else:
            self.losses[-1] = self.losses[-1] + loss
        if part + 1 < len(self.chain.steps[step]):
            return

        # The gradient of the step is complete: add penalty and local term, then clip and step.
        if self.rows is not None:
            self.rows.finish(self.grad, self.chain.job, self.chain.layout, step)
        self._regularise()
        if self._made is not None:
            self._made.pull()
        if plan.term is not None and self._state is not None:
            with torch.no_grad():
                plan.term.add_gradient(self._state)
        self.norms.append(self._stepper.step(self._rates[step]))
        if self._made is not None:
            self._made.push()
        self.grad.zero_()

    def _regularise(self) -> None:
        """Add the gradient of the technique's penalty, if it has one."""
        layout, plan = self.chain.layout, self.chain.job.plan
        if not plan.technique.penalises:
            return

        # The penalty on copies (A [r, d_in], B [d_out, r]), so that autograd does not reach the
        # bank; then its gradients are added to the trained sections of the row.
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
        """The client's update, after its last step.

        Raises:
            FloatingPointError: if a loss or the result is not finite.
        """
        job, layout = self.chain.job, self.chain.layout
        trace = Trace.of(self.losses, self.tokens, self.norms, self._change())
        check_trace(trace, job.plan)
        spent = {
            "examples": float(len(self.examples)),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "fused": 1.0,
        }
        if self._made is None:
            payload = job.start.trained(layout.read(self.row))
        else:
            payload = job.start.retrained(self._made.values())
        if layout.head:
            payload = payload.with_head(layout.heads(self.row.clone()))
        return completed(job, payload, trace.metrics() | spent, num_examples)

    def _change(self) -> Tensor:
        """Euclidean norm of the change of what is trained, a scalar."""
        moved = self.row - self.chain.start
        if self._made is not None:  # the head's section, and what makes the factors
            moved = moved[self.chain.layout.head_at :]
            moved = torch.cat([self._made.buffer.detach() - self._made.start, moved])
        norm: Tensor = torch.linalg.vector_norm(moved)
        return norm


@dataclass(frozen=True)
class Limits:
    """How many clients and tokens are computed at once."""

    policy: Policy
    tokens: int
    """Tokens of one fused step."""
    slots: int
    """Clients in training at a time."""


class FusedTrainer:
    """Runs planned chains over one base. If a fused step raises, its clients' jobs are left in
    `rescue`."""

    def __init__(self, fused: FusedModel, store: TokenStore) -> None:
        self._fused, self._store = fused, store
        self.rescue: list[TrainJob] = []
        """Jobs that must be trained another way."""

    def train(self, chains: Sequence[Chain], limits: Limits) -> Iterator[Update | Failure]:
        """One result per chain, as they finish, except those that are left in `rescue`."""
        for autocast in dict.fromkeys(c.job.plan.autocast for c in chains):
            for private in (False, True):
                alike = [
                    c for c in chains if c.job.plan.autocast == autocast and bool(c.rows) == private
                ]
                if alike:
                    yield from self._train(alike, limits, autocast == "bf16")

    def _train(
        self, chains: Sequence[Chain], limits: Limits, autocast: bool
    ) -> Iterator[Update | Failure]:
        """Chains of one base and one precision."""
        # A schedule of fused steps, and a bank [slots, width of the largest row].
        fused = self._fused
        limits = replace(limits, slots=min(limits.slots, len(chains)))
        schedule = Schedule(
            [c.work for c in chains],
            limits.policy,
            limits.tokens,
            limits.slots,
            padded=not fused.is_ragged,
        )
        rows = max(c.rows for c in chains)  # of each client beside its own, under privacy
        bank = AdapterBank(
            limits.slots * (1 + rows),
            max(c.layout.size for c in chains),
            fused.model.dtype,
            fused.model.device,
            fused.factor_dtype(autocast),
        )

        # Each step: load admitted clients, run one forward pass of each active client, and finish
        # those whose last pass that was. If a step raises, its clients are trained another way.
        residents: dict[int, Resident] = {}
        with fused.mounted(bank, autocast, base=chains[0].job.start.base()):
            for step in schedule:
                for who, slot in step.admitted:
                    try:
                        first = limits.slots + slot * rows
                        residents[who] = self._admit(bank, chains[who], slot, first)
                    except CLIENT_ERRORS as error:
                        schedule.drop(who)
                        yield failure(chains[who].job.client, error)
                active = [(w, index) for w, _, index in step.active if w in residents]
                try:
                    self._step([(residents[who], index) for who, index in active])
                except CLIENT_ERRORS as error:
                    log.warning("a fused step failed: %s: %s", type(error).__name__, error)
                    for who, _ in active:
                        self.rescue.append(residents.pop(who).chain.job)
                        schedule.drop(who)
                    continue
                for who in [w for w in step.finished if w in residents]:
                    yield self._finish(residents.pop(who))

    def _admit(self, bank: AdapterBank, chain: Chain, slot: int, first: int) -> Resident:
        """Seat a client in a slot, and under privacy its examples in rows from ``first`` on."""
        row, grad = bank.load(slot, chain.start)
        examples, privacy = training_examples(self._store, chain.job), chain.job.plan.privacy
        rows = None if privacy is None else ExampleRows(bank, first, privacy)
        return Resident(chain, slot, row, grad, examples, rows)

    def _step(self, active: Sequence[tuple[Resident, int]]) -> None:
        """One fused step: forward, backward and the clients' own optimizer steps."""
        if not active:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        # One loss per lane, [K]; gradients are in the rows of the bank.
        lanes = [resident.lanes(index) for resident, index in active]
        batch = self._fused.batch([lane for own in lanes for lane in own])
        losses = self._fused.backward(batch).split([len(own) for own in lanes])
        for (resident, index), own in zip(active, losses, strict=True):
            resident.learn(index, resident.taken(own))

        # The time of the step, divided among the clients by their tokens.
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        for resident, index in active:
            fraction = resident.chain.work.forwards[index].tokens / batch.tokens
            resident.seconds += fraction * wall
            resident.cpu_seconds += fraction * cpu

    def _finish(self, resident: Resident) -> Update | Failure:
        job = resident.chain.job
        try:
            return resident.update(self._store.count(job.client.id, "train"))
        except CLIENT_ERRORS as error:
            return failure(job.client, error)
