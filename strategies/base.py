"""What a federated LoRA method is, and the one place where it meets Flower on the server.

To add a method, write one file beside this one: pure functions of tensors, and below them a frozen
dataclass that inherits `LoRAStrategy`. Its fields are the method's hyperparameters and the schema
of its YAML; its hooks are pure functions of an explicit state and never see Flower, Ray or a path.

The Flower side sends cohorts of virtual clients to whatever nodes there are (a node is a slot, not
a client) and hands the replies to the `Session`, which decides everything else.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedlora.algebra.state import State
from fedlora.algebra.summand import Summands
from fedlora.core.errors import RunError
from fedlora.core.techniques import (
    LORA,
    TECHNIQUES,
    require,
)
from fedlora.core.types import (
    Client,
    Evaluation,
    Failure,
    LocalPlan,
    Module,
    Payload,
    Ranks,
    Setting,
    TrainJob,
    Update,
)
from fedlora.server.flower import (
    Carrier,
    Conducted,
    Hall,
    WatchedGrid,
)
from fedlora.server.session import Session
from fedlora.wire.codec import payload_bytes

log = logging.getLogger(__name__)

S = TypeVar("S", bound="LoRAStrategy")


@dataclass(frozen=True)
class Setup:
    """What a method is combined with, as far as it may have to refuse it."""

    client: LocalPlan
    wire: str = "float32"
    """Number format of payloads on the wire."""
    quantization: str = "none"
    """Of the base model."""


@dataclass(frozen=True, eq=False)
class LoRAStrategy(Strategy):
    """A Flower strategy over virtual clients of unequal rank.

    Subclasses override the hooks below; each is a pure function. `aggregate` receives updates
    sorted by client id, already validated, never empty; its result must not depend on their order
    beyond floating-point rounding, and must not alias or change its inputs.

    ``State`` is what the server remembers between rounds: named tensors, never mutated. A
    checkpoint holds exactly this, so everything that matters to the next round must be in it.
    """

    def check(self, setup: Setup) -> None:
        """Refuse a combination before anything is loaded.

        Raises:
            ValueError: one sentence that says why and what to use instead.
        """
        nested = getattr(self, "aggregator", None)
        if isinstance(nested, LoRAStrategy) and nested.technique != self.technique:
            raise ValueError(
                f"strategy.aggregator={type(nested).__name__} averages "
                f"{TECHNIQUES[nested.technique].averaged}, and {type(self).__name__} gives it "
                f"{TECHNIQUES[self.technique].averaged}: use "
                f"{TECHNIQUES[nested.technique].strategy} by itself, or another aggregator"
            )
        require(setup.client, self.technique, type(self).__name__)

    @property
    def technique(self) -> str:
        """The kind of local training whose results it averages (`fedlora.core.techniques`)."""
        return LORA

    def rank_range(self, module: Module) -> tuple[int, int]:
        """The smallest and the largest rank that a client can train on a module."""
        return 1, module.max_rank

    def bytes_down(self, state: State, client: Client, start: Payload, wire: str) -> int:
        """Bytes that a real client is sent before it trains, given what it knows already.

        Args:
            state: as in every hook.
            client: enlisted.
            start: its start of the round.
            wire: number format.
        """
        return payload_bytes(start, wire)

    @abstractmethod
    def init_state(self, setting: Setting) -> State:
        """The state before round 1."""

    def enlist(self, state: State, client: Client) -> Client:
        """The client as it stands now; methods that change a client's ranks override this."""
        return client

    @abstractmethod
    def start_adapter(self, state: State, client: Client) -> Payload:
        """What an enlisted client starts the round from. Equal ranks must give equal payloads."""

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        """What an enlisted client does this round, given the configured plan."""
        return base

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        """The next state."""

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """What one client adds, where ``aggregate`` needs no more than a weighted sum of that.

        With ``w_k`` from `reference_weights`, ``aggregate(state, updates)`` must be
        ``absorb(state, Σ_k w_k adds_k, Σ_k w_k)`` up to rounding. A summand is the change of what
        the client started from: a client that did not move adds exactly zero. Names and shapes
        depend on the state alone, never on the client's ranks.

        Args:
            state: as in every hook.
            start: what the client started the round from, as it received it.
            update: validated.

        Returns:
            Tensors or products by name; ``None``: the method needs the updates themselves.
        """
        return None

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """The state after a sum of what clients add.

        Args:
            state: as in every hook.
            total: ``Σ_k w_k adds_k``; of equal names and shapes as one summand.
            weight: what the sum is divided by: ``Σ_k w_k``, or a number fixed beforehand.
        """
        raise TypeError(f"{type(self).__name__} needs its clients' updates, not their sum")

    def conduct(self, state: State, jobs: Sequence[TrainJob], hall: Hall) -> Conducted | None:
        """Train a round in several exchanges with its clients (SplitLoRA).

        Args:
            state: as in every hook; not mutated.
            jobs: of the round's clients, by id.
            hall: where the method meets them.

        Returns:
            What came of it; ``None``: the method has nothing of the kind, and every client is sent
            its job in one message and trains alone.
        """
        return None

    def evaluated_ranks(self, state: State, client: Client) -> Ranks:
        """At which ranks a client uses the global model: those it holds."""
        return self.enlist(state, client).ranks

    @abstractmethod
    def global_adapter(self, state: State, ranks: Ranks | None = None) -> Payload:
        """The global model's update at the given ranks; ``None``: as exactly as it is known."""

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        """By what the method weights its clients: the average against which the exactness gap is
        measured. Methods with a choice of weights override this."""
        return [float(u.num_examples) for u in updates]

    def report(self, state: State) -> Mapping[str, float | int | str]:
        """What the method has to say of its state after a round, for the round's record."""
        return {}

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """The state whose global update is this dense one, as nearly as the method can hold it.

        For methods that begin elsewhere and go on with another's rule (SLoRA). ``delta`` maps each
        module path to ``[d_out, d_in]``; whatever a server optimizer remembers starts anew.
        """
        raise TypeError(f"{type(self).__name__} cannot continue from an update it did not make")

    # --- Flower -------------------------------------------------------------------------------

    def bind(self: S, session: Session, *, worker: str, source: str) -> S:
        """Attach the run that this strategy serves.

        Args:
            session: the run's state and records.
            worker: JSON description of what a worker process has to build.
            source: hash of this process's sources; workers with others refuse to work.
        """
        object.__setattr__(self, "_carrier", Carrier(session, worker, source))
        return self

    @property
    def _bound(self) -> Carrier:
        carrier = getattr(self, "_carrier", None)
        if carrier is None:
            raise RunError(f"{type(self).__name__} serves no run: call bind() before start()")
        assert isinstance(carrier, Carrier)
        return carrier

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Flower's own loop over the rounds that are left, with an evaluation before the first.

        Rounds, seconds and the initial adapter default to what the bound session says.

        Raises:
            RunError: if the run cannot go on.
        """
        carrier, session = self._bound, self._bound.session
        watched = WatchedGrid(grid, carrier)
        seconds = session.rounds.timeout_s if timeout is None else timeout
        left = session.rounds.rounds - session.done if num_rounds is None else num_rounds
        carrier.offset = session.done
        if session.evaluation_missing():
            first = self.configure_evaluate(0, ArrayRecord(), ConfigRecord(), watched)
            self.aggregate_evaluate(0, watched.send_and_receive(first, timeout=seconds))
        return super().start(
            grid=watched,
            initial_arrays=carrier.arrays() if initial_arrays is None else initial_arrays,
            num_rounds=left,
            timeout=seconds,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
        )

    def summary(self) -> None:
        """One line for Flower's log."""
        session = self._bound.session
        log.info(
            "%s: %d clients (%s), %d per round",
            self,
            len(session.roster.clients),
            ", ".join(f"rank {r}: {n}" for r, n in session.roster.rank_counts().items()),
            session.roster.per_round,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The cohort of this round, packed into messages. ``arrays`` and ``config`` are not used:
        every virtual client gets the start adapter of its own rank from the method's state."""
        carrier = self._bound
        session = carrier.session
        cohorts = session.train_cohorts(server_round + carrier.offset)
        jobs = sorted((job for jobs in cohorts for job in jobs), key=lambda job: job.client.id)
        carrier.conducted = self.conduct(session.state, jobs, Hall(carrier, grid))
        if carrier.conducted is not None:
            return carrier.messages([], MessageType.TRAIN, grid)
        return carrier.messages([("train", jobs) for jobs in cohorts], MessageType.TRAIN, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand the replies to the session; Flower gets the global adapter and the numbers."""
        carrier = self._bound
        results = [r for found in carrier.results(replies).values() for r in found]
        carrier.raise_if_dead()
        training = [r for r in results if not isinstance(r, Evaluation)]
        if carrier.conducted is not None:
            carrier.session.state = carrier.conducted.state
            training = list(carrier.conducted.results)
        record = carrier.session.finish_training(training)
        return carrier.arrays(), _brief(record, ("clients", "failed", "rejected", "train/loss"))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation jobs, if the schedule says so, packed into messages."""
        carrier = self._bound
        batches = carrier.session.evaluate_cohorts(server_round + carrier.offset)
        return carrier.messages(batches, MessageType.EVALUATE, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Hand the replies to the session; Flower gets the first group's numbers."""
        carrier = self._bound
        results: dict[str, list[Evaluation | Failure]] = {
            tag: [r for r in found if not isinstance(r, Update)]
            for tag, found in carrier.results(replies).items()
        }
        carrier.raise_if_dead()
        numbers = carrier.session.finish_evaluation(server_round + carrier.offset, results)
        shown = ("clients", "loss_response", "loss_full", "rouge_l")
        return _brief(numbers, shown) if numbers else None


def _brief(record: Mapping[str, float | int | str], keys: Iterable[str]) -> MetricRecord:
    """The numbers that Flower's own log repeats at the end; metrics.jsonl has all of them."""
    numbers = ((k, record[k]) for k in keys if k in record)
    return MetricRecord({k: v for k, v in numbers if isinstance(v, int | float)})
