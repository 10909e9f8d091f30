"""The interface of a federated method: pure hooks over an explicit state.

A method never sees Flower, Ray, a path or a clock. `fedlora.server.session.Session` calls its
hooks for the clients' starts and for the aggregation; `fedlora.server.flower` transports jobs and
results. Methods of the project are in ``strategies/``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedlora.algebra.state import Kept, State
from fedlora.algebra.summand import Summands
from fedlora.core.payload import Payload
from fedlora.core.technique import Technique, require
from fedlora.core.types import (
    Adapter,
    Client,
    Failure,
    LocalPlan,
    Module,
    Ranks,
    Setting,
    TrainJob,
    Update,
)
from fedlora.secagg.summed import Summed
from fedlora.server.missed import seeded_bytes
from fedlora.wire.codec import payload_bytes, update_bytes

StateAudit = Callable[[State], Mapping[str, float | int | str]]
"""A check of the server's state after a round, for the round's record."""


@dataclass(frozen=True)
class Setup:
    """The parts of a configuration that a method may have to refuse."""

    client: LocalPlan
    wire: str = "float32"
    """Number format of payloads on the wire."""
    quantization: str = "none"
    """Quantization of the base model."""
    error_feedback: bool = False
    """Whether clients store the rounding error of the wire."""
    classifies: bool = False
    """Whether the base model is a classifier."""
    faults: bool = False
    """Whether workers make clients fail in training on purpose (``engine=faulty``)."""


@dataclass(frozen=True)
class RoundOutcome:
    """The result of a round of training."""

    state: State
    """The server's state after all messages and before the aggregation."""
    results: Sequence[Update | Failure]
    """At most one result per client."""
    summed: Summed | None = None
    """The secure sum that the updates went into, which are withheld; None: the updates are here."""


class ClientChannel(ABC):
    """The connection of a method to the clients of a round that takes several messages each.

    A client stays on one node for the whole round, so that it finds its state there; a node is
    never sent a second message before it has answered the first.
    """

    worker: str
    """What a worker process has to build, as JSON (`fedlora.engine.worker.WorkerSpec`)."""
    source: str
    """Hash of the server's sources."""
    wire: str
    """Number format of adapters in messages."""
    norm_factor: float = 0.0
    """How many medians of the clients' changes an average takes in (`fedlora.server.norm_bound`);
    0: any."""

    def worker_of(self, clients: Sequence[Client]) -> str:
        """What the node of these clients has to open: `worker`, unless nodes are clients."""
        return self.worker

    @abstractmethod
    def say(self, line: str) -> None:
        """Show one line to the person who watches."""

    @abstractmethod
    def on_step(self, step: int, steps: int, loss: float) -> None:
        """Show progress in a round whose clients take their steps together."""

    @abstractmethod
    def exchange(
        self, clients: Sequence[Client], action: str, content: Callable[[Sequence[Client]], Any]
    ) -> list[tuple[Sequence[Client], Any]]:
        """Send every node the messages of its clients, and wait for all answers.

        Args:
            clients: the clients to ask.
            action: of the client app: a message of type ``train.<action>``.
            content: what some of these clients are sent, a Flower ``RecordDict``.

        Returns:
            Some clients and what their node answered, a ``RecordDict``, or a ``str`` that says why
            there is no answer.

        Raises:
            WorkerDied: if a worker process is gone, and with it the state of its clients.
        """


class Method(ABC):
    """The hooks of a federated method over virtual clients of unequal rank.

    Subclasses override the hooks below; each is a pure function. `aggregate` receives updates
    sorted by client id, already validated, never empty; its result must not depend on their order
    beyond floating-point rounding, and must not alias or change its inputs.

    ``State`` is what the server remembers between rounds: named tensors, never mutated. A
    checkpoint holds exactly this, so everything that matters to the next round must be in it.
    ``Kept`` is what one client remembers between the rounds in which it takes part. No other client
    receives it.
    """

    # --- before round 1 -----------------------------------------------------------------------

    technique: ClassVar[type[Technique]]
    """The technique of its clients, whose results it averages."""
    private: ClassVar[str] = ""
    """The factors of an update that stay with its client: ``b``, or ``ab`` for a method that shares
    nothing. `aggregate` and `adds` do not read them, `kept` stores them, and the model of each
    client is its own (`personal_update`): there is no global one."""

    @property
    def shares(self) -> bool:
        """Whether anything that a client trains reaches others. The `aggregate` of a method that
        shares nothing, a bound for the others, leaves the state as it is."""
        return self.private != "ab"

    @property
    def label(self) -> str:
        """Its name, for messages."""
        return type(self).__name__

    def check(self, setup: Setup) -> None:
        """Refuse a combination before anything is loaded.

        Raises:
            ValueError: one sentence that says why and what to use instead.
        """
        nested = getattr(self, "aggregator", None)
        if isinstance(nested, Method) and not nested.shares:
            raise ValueError(
                f"strategy.aggregator={type(nested).__name__} averages nothing, and "
                f"{type(self).__name__} needs an average: use another aggregator, such as fedit"
            )
        if isinstance(nested, Method) and nested.private:
            raise ValueError(
                f"strategy.aggregator={type(nested).__name__} leaves "
                f"{nested.private.upper()} with each client, and {type(self).__name__} needs a "
                "global model: use another aggregator, such as fedit"
            )
        if isinstance(nested, Method) and nested.technique is not self.technique:
            raise ValueError(
                f"strategy.aggregator={type(nested).__name__} averages "
                f"{nested.technique.averaged}, and {type(self).__name__} gives it "
                f"{self.technique.averaged}: use {nested.technique.strategy} by itself, or another "
                "aggregator"
            )
        require(setup.client, self.technique, type(self).__name__)
        if setup.client.choice is not None:
            raise ValueError(
                f"client.choice={type(setup.client.choice).__name__}: the strategy says which rank "
                "indices its clients train; leave client.choice null, or use strategy=lora_a2"
            )

    def rank_range(self, module: Module) -> tuple[int, int]:
        """The smallest and the largest rank that a client can train on a module."""
        return 1, module.max_rank

    @abstractmethod
    def init_state(self, setting: Setting) -> State:
        """The state before round 1."""

    # --- a round ------------------------------------------------------------------------------

    def enlist(self, state: State, client: Client) -> Client:
        """The client as it stands now; methods that change a client's ranks override this."""
        return client

    def variant(self, state: State, client: Client) -> Hashable:
        """A key: enlisted clients with equal variants start from the same payload and have the same
        plan. The default is the client's ranks.

        A method that gives each client a start of its own returns ``client.id``. A run compares two
        clients of each variant in rounds 1, 2, 4, 8 and so on, and ends if they differ.
        """
        return client.ranks

    @abstractmethod
    def client_start(
        self, state: State, client: Client, kept: Kept | None = None
    ) -> Payload | Adapter:
        """The start of an enlisted client: a payload, or factors in a plain mapping. Clients with
        equal variants must get equal starts.

        Args:
            state: as in every hook.
            client: enlisted.
            kept: what `kept` returned when it last took part; ``None``: nothing.
        """

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        """The plan of an enlisted client for this round, made from the configured plan."""
        return base

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """The bytes that a real client receives before it trains, given what it already has.

        By default its whole start, except for a frozen ``A`` that still is the one of the run's
        seed (`fedlora.server.missed.seeded_bytes`).

        Args:
            state: as in every hook.
            job: the enlisted client, its start and its plan of the round.
            wire: number format.
        """
        return payload_bytes(job.start, wire) - seeded_bytes(job, wire)

    def bytes_up(self, state: State, update: Update, plan: LocalPlan, wire: str) -> int:
        """The bytes that a real client sends after it has trained.

        Args:
            state: from which the round began.
            update: of the client, accepted or not.
            plan: of the client's round.
            wire: number format.
        """
        return update_bytes(update.payload, plan, wire)

    def run_round(
        self, state: State, jobs: Sequence[TrainJob], channel: ClientChannel
    ) -> RoundOutcome | None:
        """Train a round with several messages to and from its clients (SplitLoRA).

        Args:
            state: as in every hook; not mutated.
            jobs: of the round's clients, by id.
            channel: to these clients.

        Returns:
            The result; ``None``: the method has no such round, so every client receives its job in
            one message and trains alone.
        """
        return None

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        """The next state."""

    @property
    def inexact(self) -> str:
        """Why the global model is not the mean of its clients' models, with the weights of
        `reference_weights`, even where all clients have one rank; empty: it is, and the laws of the
        contract hold the method to it."""
        return ""

    @property
    def beyond_average(self) -> str:
        """Why the server goes beyond what its clients average to, so that a client that is alone
        does not get its own model back and clients that do not move may see the model move; empty:
        it does not, and the laws of the contract hold the method to it."""
        return ""

    @property
    def needs_updates(self) -> str:
        """Why `aggregate` needs more than a sum of what clients add, and what to choose instead;
        empty: a sum is enough, and `adds` is never ``None``."""
        return (
            f"strategy {type(self).__name__} averages whole updates, not a sum of their changes; "
            "choose none, or a strategy that says what clients add, such as fedit"
        )

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """One client's summand, for methods whose `aggregate` needs only a weighted sum.

        With ``w_k`` from `reference_weights`, ``aggregate(state, updates)`` must be
        ``absorb(state, Σ_k w_k adds_k, Σ_k w_k)`` up to rounding. A summand is the change of what
        the client started from: a client that did not move adds exactly zero. Names and shapes
        depend on the state alone, never on the client's ranks.

        Args:
            state: as in every hook.
            start: what the client started the round from, as it received it.
            update: validated.

        Returns:
            Tensors or products by name; ``None``: as `needs_updates` says.
        """
        return None

    def adds_state(self, state: State) -> State:
        """The part of a state that `adds` looks at: what each client of a secure sum is sent, for
        there the clients call `adds` themselves. By default the whole state."""
        return state

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """The state after a sum of what clients add.

        Args:
            state: as in every hook.
            total: ``Σ_k w_k adds_k``; of equal names and shapes as one summand.
            weight: what the sum is divided by: ``Σ_k w_k``, or a number fixed beforehand.
        """
        raise TypeError(f"{type(self).__name__} needs its clients' updates, not their sum")

    def kept(
        self, state: State, client: Client, before: Kept | None, start: Payload, update: Update
    ) -> Kept | None:
        """The state that a client keeps for itself after a round in which its update was accepted.

        It is stored (`fedlora.server.client_state`), never sent to another client and no traffic:
        a method whose `client_start` makes use of it leaves it out of `bytes_down`. A client that
        failed or was rejected keeps what it had.

        Args:
            state: from which the round began.
            client: enlisted.
            before: what it kept so far; ``None``: nothing.
            start: what it started from.
            update: what it sent.

        Returns:
            Named tensors in place of what it had; ``None``: nothing new, as for a method whose
            clients keep nothing.
        """
        return None

    # --- the global model ---------------------------------------------------------------------

    @abstractmethod
    def global_update(self, state: State, ranks: Ranks | None = None) -> Payload | Adapter:
        """The global model's update at the given ranks; ``None``: as exactly as it is known."""

    def evaluated_ranks(self, state: State, client: Client) -> Ranks:
        """The ranks at which a client uses the global model: by default those that it holds."""
        return self.enlist(state, client).ranks

    def personal_update(
        self, state: State, client: Client, kept: Kept | None = None
    ) -> Payload | Adapter:
        """The update that one client uses itself, made from the global model and from what it
        keeps; by default the global update at its ranks. Clients that keep nothing and have equal
        variants use the same.

        Args:
            state: as in every hook.
            client: as it stands in the population.
            kept: what `kept` returned when it last took part; ``None``: nothing.
        """
        return self.global_update(state, self.evaluated_ranks(state, client))

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        """The weights ``w_k`` of the clients in the method's average, not normalized.

        `fedlora.server.combine` sums with them what clients add, ``aggregate`` averages with them,
        and the exactness gap is measured against that. Methods with a choice of weights override
        this.
        """
        return [float(u.num_examples) for u in updates]

    def report(self, state: State) -> Mapping[str, float | int | str]:
        """Metrics of the method's state after a round, for the round's record."""
        return {}

    def state_audit(self) -> StateAudit | None:
        """A check that remembers earlier rounds, which a pure hook cannot; ``None``: no check.

        Every run makes its own and calls it after each round. A resumed run begins a new one.
        """
        return None

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """The state whose global update is this dense one, as nearly as the method can hold it.

        For methods that begin elsewhere and go on with another's rule (SLoRA). ``delta`` maps each
        module path to ``[d_out, d_in]``; whatever a server optimizer remembers starts anew.
        """
        raise TypeError(f"{type(self).__name__} cannot continue from an update it did not make")
