"""Everything that a process needs for a split: stages of its resident model, and the data."""

import functools
from collections.abc import Callable, Sequence

from fedlora.core.types import LocalPlan
from fedlora.data.store import Example, TokenStore
from fedlora.engine.client import examples_for
from fedlora.engine.memory import keep_freed_memory
from fedlora.engine.worker import WorkerSpec, resident, worker
from fedlora.models.language_model import LanguageModel
from fedlora.models.stages import Span, Stages, check_stages
from fedlora.split.batches import ROUND
from fedlora.split.protocol import Cut, InitMessage
from fedlora.split.worker import SplitWorker

MOST_KEPT = 256
"""Clients whose examples a process keeps in memory."""


class RunContext:
    """Stages and examples; see `run_context`.

    Args:
        model: the resident one.
        store: its examples, with the states of the frozen blocks where the run keeps them.
        notes: what there is to say of those.
    """

    def __init__(
        self,
        model: LanguageModel,
        store: TokenStore,
        notes: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self.model, self.store, self.notes = model, store, notes
        self.stages = Stages(model)
        self._checked: set[Cut] = set()
        self._examples = functools.lru_cache(maxsize=MOST_KEPT)(self._read)

    def examples(self, init: InitMessage) -> Sequence[Example]:
        """The examples that a client trains on: the same in every round.

        Raises:
            ValueError: if there are none.
        """
        return self.examples_of(init.client.id, init.plan, init.terms.seed)

    def examples_of(self, client: int, plan: LocalPlan, seed: int) -> Sequence[Example]:
        """As `examples`, for a client without an `InitMessage`."""
        # Of the plan only what decides the choice: rates change from round to round.
        chosen = LocalPlan(loss=plan.loss, max_examples=plan.max_examples)
        return self._examples(client, chosen, seed)

    def _read(self, client: int, plan: LocalPlan, seed: int) -> Sequence[Example]:
        return examples_for(self.store, plan, seed=seed, round=ROUND, client=client)

    def check(self, cut: Cut) -> None:
        """Refuse a cut that is impossible for this model. It is cheap after the first time.

        Raises:
            ModelError: naming the cut and the model's blocks, or why the model cannot be cut.
        """
        if cut in self._checked:
            return
        blocks = self.stages.blocks
        if cut.u_shaped:
            self.stages.check_order(cut.first, blocks - cut.tail)
        last = blocks - max(cut.tail, 0)
        spans = [Span(0, cut.first, embeds=True), Span(cut.first, last, heads=not cut.u_shaped)]
        spans += [Span(last, blocks, heads=True)] if cut.u_shaped else []
        check_stages(self.model, [self.stages[span] for span in spans])
        self._checked.add(cut)


@functools.lru_cache(maxsize=1)
def run_context(spec: str) -> RunContext:
    """This process's context for a JSON `fedlora.engine.worker.WorkerSpec`."""
    keep_freed_memory()
    model, store = resident(spec)
    return RunContext(model, *WorkerSpec.from_json(spec).engine.with_states(model, store))


@functools.lru_cache(maxsize=1)
def split_worker(spec: str) -> SplitWorker:
    """The object that answers a worker's split messages, with its engine's threads and memory
    settings."""
    worker(spec)  # its threads and memory settings are the process's
    here = run_context(spec)
    return SplitWorker(here.stages, here.examples, WorkerSpec.from_json(spec).engine.faults)
