"""Evaluation of many clients in common forward passes, with the same adapter or different ones."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.types import (
    Adapter,
    EvaluateJob,
    Evaluation,
    Failure,
)
from fedlora.data.batches import TokenExample, check_vocabulary
from fedlora.data.store import TokenStore
from fedlora.engine.base import failure
from fedlora.engine.fused.bank import AdapterBank, Layout, Layouts
from fedlora.engine.fused.lanes import Group, Lane
from fedlora.engine.fused.model import FusedModel
from fedlora.evaluation import metrics as evaluate
from fedlora.models.modules import check_adapter, check_head

log = logging.getLogger(__name__)

ADAPTERS = 32
"""Distinct adapters in memory at once."""
ROWS = 64
"""Sequences that are generated together."""


@dataclass(eq=False)
class Task:
    """One job and its results so far."""

    job: EvaluateJob
    slot: int
    panel: evaluate.Panel
    guesses: dict[int, evaluate.Guess] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)

    def result(self, fused: FusedModel) -> Evaluation:
        """The metrics, once all results are there."""
        plan, rows = self.job.plan, range(len(self.panel.examples))
        guesses = [self.guesses[i] for i in rows]
        texts = [self.texts[i] for i in rows] if plan.generate else []
        outputs = evaluate.outputs_of(fused.model, self.panel, guesses, texts, plan)
        return Evaluation(self.job.client, evaluate.metrics_of(outputs, plan))


@dataclass(frozen=True)
class Item:
    """One example of one task."""

    task: Task
    index: int

    @property
    def example(self) -> TokenExample:
        """The example."""
        return self.task.panel.examples[self.index]


class FusedEvaluator:
    """Measures jobs on a fused model.

    Args:
        fused: the model.
        store: the clients' examples.
        tokens: most tokens of one forward pass; a longer sequence runs alone.
    """

    def __init__(self, fused: FusedModel, store: TokenStore, tokens: int) -> None:
        self._fused, self._store, self._tokens = fused, store, tokens
        self._layouts = Layouts(fused.model.info.modules)
        self.rescue: list[EvaluateJob] = []
        """Jobs of forward passes that failed, to be evaluated one by one."""

    def evaluate(self, jobs: Sequence[EvaluateJob]) -> Iterator[Evaluation | Failure]:
        """One result per job, except for those that are left in `rescue`."""
        adapters = list({id(j.adapter): j.adapter for j in jobs}.values())
        for at in range(0, len(adapters), ADAPTERS):
            slots = {id(a): slot for slot, a in enumerate(adapters[at : at + ADAPTERS])}
            yield from self._together([j for j in jobs if id(j.adapter) in slots], slots)

    def _together(
        self, jobs: Sequence[EvaluateJob], slots: dict[int, int]
    ) -> Iterator[Evaluation | Failure]:
        tasks = []
        for job in jobs:
            try:
                tasks.append(self._task(job, slots[id(job.adapter)]))
            except CLIENT_ERRORS as error:
                yield failure(job.client, error)
        if not tasks:
            return
        try:
            self._run(tasks)
        except CLIENT_ERRORS as error:
            log.warning("a fused evaluation failed: %s: %s", type(error).__name__, error)
            self.rescue += [task.job for task in tasks]
            return
        for task in tasks:
            try:
                yield task.result(self._fused)
            except CLIENT_ERRORS as error:
                yield failure(task.job.client, error)

    def _task(self, job: EvaluateJob, slot: int) -> Task:
        # Refuse a job that would fail in a forward pass, because it shares that with other jobs.
        plan, who, store = job.plan, job.client.id, self._store
        if job.adapter is not None:
            check_adapter(_factors(job.adapter), self._fused.model.info)
            check_head(job.adapter.head(), self._fused.model.info)
        if store.count(who, plan.split) == 0:
            raise ValueError(f"client {who} has no examples in split {plan.split!r}")
        references = store.references(who, plan.split) if plan.generate else None
        examples = store.examples(who, plan.split)
        panel = evaluate.select_panel(examples, references, plan, seed=job.seed, client=who)
        check_vocabulary(panel.examples, self._fused.model.vocabulary, who)
        return Task(job, slot, panel)

    def _run(self, tasks: Sequence[Task]) -> None:
        # A bank with one row for every distinct adapter.
        adapters = {t.slot: (_factors(t.job.adapter), _head(t.job.adapter)) for t in tasks}
        layouts = {slot: self._layouts(*both) for slot, both in adapters.items()}
        model = self._fused.model
        bank = AdapterBank(
            max(adapters) + 1,
            max(layout.size for layout in layouts.values()),
            model.dtype,
            model.device,
            self._fused.factor_dtype(False),
        )
        for slot, (adapter, head) in adapters.items():
            bank.load(slot, layouts[slot].pack(adapter, model.dtype, model.device, head))

        # Likelihoods of all sequences; then generation, by numbers of new tokens.
        with torch.no_grad():
            with self._fused.mounted(bank):
                self._likelihoods(tasks, layouts)
            generated = [t for t in tasks if t.job.plan.generate]
            with self._fused.mounted(bank, generate=True):
                for longest, some in _by_plan(generated):
                    self._generate(some, layouts, longest)

    def _likelihoods(self, tasks: Sequence[Task], layouts: dict[int, Layout]) -> None:
        # A sequence without a target needs no forward pass.
        items = [Item(t, i) for t in tasks for i in range(len(t.panel.examples))]
        lengths = {id(item): self._fused.model.inputs(item.example) for item in items}
        for item in items:
            if not lengths[id(item)]:  # nothing after BOS
                item.task.guesses[item.index] = (
                    torch.zeros(0, dtype=torch.float64),
                    torch.zeros(0, dtype=torch.int64),
                )

        # Sequences of similar length together, up to the limit; within a pass, in order of slots.
        line = sorted((i for i in items if lengths[id(i)]), key=lambda i: -lengths[id(i)])
        for packed in _packs(line, [lengths[id(i)] for i in line], self._tokens):
            packed.sort(key=lambda i: i.task.slot)
            lanes = [
                Lane(slot, layouts[slot], [i.example for i in of_slot], "full", 1)
                for slot, of_slot in _by_slot(packed)
            ]
            logits, targets = self._fused.logits(self._fused.batch(lanes))
            found = evaluate.guesses_of(logits, targets, [i.example for i in packed])
            for item, guess in zip(packed, found, strict=True):
                item.task.guesses[item.index] = guess

    def _generate(
        self, tasks: Sequence[Task], layouts: dict[int, Layout], max_new_tokens: int
    ) -> None:
        # Prompts of similar length together, ROWS at a time; within a batch, in order of slots.
        model = self._fused.model
        prompts = {
            (id(t), i): ids
            for t in tasks
            for i, ids in enumerate(evaluate.prompts(model, t.panel.examples, t.job.plan))
        }
        items = [Item(t, i) for t in tasks for i in range(len(t.panel.examples))]
        items.sort(key=lambda i: -len(prompts[id(i.task), i.index]))
        for at in range(0, len(items), ROWS):
            batch = sorted(items[at : at + ROWS], key=lambda i: i.task.slot)
            groups = [
                Group((Lane(slot, layouts[slot], (), "full", 1),), len(of_slot))
                for slot, of_slot in _by_slot(batch)
            ]
            self._fused.prepare_rows(groups)
            ids = [prompts[id(i.task), i.index] for i in batch]
            for item, text in zip(batch, evaluate.greedy(model, ids, max_new_tokens), strict=True):
                item.task.texts[item.index] = text


def _factors(payload: Payload | None) -> Adapter:
    """Factors by module; none for the base model without an adapter."""
    if payload is None:
        return {}
    factors = plain_factors(payload)
    if factors is None:
        raise TypeError(f"the fused engine evaluates low-rank factors, not {payload.noun}")
    return factors


def _head(payload: Payload | None) -> Mapping[str, Tensor] | None:
    """The head that a payload brings."""
    return None if payload is None else payload.head()


def _by_slot(items: Sequence[Item]) -> list[tuple[int, list[Item]]]:
    """Items sorted by slot, divided into one list per slot."""
    grouped = itertools.groupby(items, key=lambda i: i.task.slot)
    return [(slot, list(run)) for slot, run in grouped]


def _by_plan(tasks: Sequence[Task]) -> list[tuple[int, list[Task]]]:
    """Tasks by the number of tokens that they generate."""
    lengths = dict.fromkeys(t.job.plan.max_new_tokens for t in tasks)
    return [(n, [t for t in tasks if t.job.plan.max_new_tokens == n]) for n in lengths]


def _packs(items: Sequence[Item], costs: Sequence[int], limit: int) -> Iterator[list[Item]]:
    """Lists of consecutive items whose costs stay within the limit; a single item may exceed it."""
    packed: list[Item] = []
    total = 0
    for item, cost in zip(items, costs, strict=True):
        if packed and total + cost > limit:
            yield packed
            packed, total = [], 0
        packed.append(item)
        total += cost
    if packed:
        yield packed
