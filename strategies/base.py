"""What a federated LoRA method is, and the one place where it meets Flower on the server.

To add a method, write one file beside this one: pure functions of tensors, and below them a frozen
dataclass that inherits `LoRAStrategy`. Its fields are the method's hyperparameters and the schema
of its YAML; its hooks are pure functions of an explicit state and never see Flower, Ray or a path.

The Flower side sends cohorts of virtual clients to whatever nodes there are (a node is a slot, not
a client) and hands the replies to the `Session`, which decides everything else.
"""

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.run import Run
from torch import Tensor

from fedlora.codec import (
    decode_results,
    encode_jobs,
    encode_payload,
    glance,
    payload_bytes,
)
from fedlora.session import RunError, Session, WorkerDied
from fedlora.state import State
from fedlora.types import (
    Client,
    EvaluateJob,
    Evaluation,
    Failure,
    LocalPlan,
    Payload,
    Ranks,
    Setting,
    TrainJob,
    Update,
)

log = logging.getLogger(__name__)

Job: TypeAlias = TrainJob | EvaluateJob
S = TypeVar("S", bound="LoRAStrategy")

NODE_PATIENCE_S = 120.0
"""How long to wait for the first Flower node: on a busy machine Ray needs half a minute."""
DEATH = ("ActorDied", "ActorUnavailable", "WorkerCrashed", "OutOfMemoryError: Task was killed")
"""Marks of a worker process that is gone. Flower never replaces it: it would fail every further
message it is given, so the run stops and goes on from its checkpoint in a new pool."""


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
        if isinstance(nested, LoRAStrategy) and nested.why_alone:
            raise ValueError(f"strategy.aggregator={type(nested).__name__}: {nested.why_alone}")
        if setup.client.technique == "spp":
            raise ValueError(
                "client=spp scales the weights of a pruned model by alpha and beta, and "
                f"{type(self).__name__} aggregates LoRA's A and B: use strategy=spp, or "
                "client=adamw"
            )
        if setup.client.switch is not None:
            raise ValueError(
                f"client.switch with strategy={type(self).__name__}: clients that exchange vectors "
                "by themselves move their frozen weights each its own way, and what is aggregated "
                "here are factors alone, which belong to unlike weights; use strategy=switchlora, "
                "or client=adamw"
            )

    @property
    def why_alone(self) -> str:
        """Why it cannot average within another strategy, and what to use; empty: it can."""
        return ""

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

    def conduct(self, state: State, jobs: Sequence[TrainJob], hall: "Hall") -> "Conducted | None":
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
        object.__setattr__(self, "_wire", _Wire(session, worker, source))
        return self

    @property
    def _bound(self) -> "_Wire":
        wire = getattr(self, "_wire", None)
        if wire is None:
            raise RunError(f"{type(self).__name__} serves no run: call bind() before start()")
        assert isinstance(wire, _Wire)
        return wire

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
        wire, session = self._bound, self._bound.session
        watched = _WatchedGrid(grid, wire)
        seconds = session.rounds.timeout_s if timeout is None else timeout
        left = session.rounds.rounds - session.done if num_rounds is None else num_rounds
        wire.offset = session.done
        if session.evaluation_missing():
            first = self.configure_evaluate(0, ArrayRecord(), ConfigRecord(), watched)
            self.aggregate_evaluate(0, watched.send_and_receive(first, timeout=seconds))
        return super().start(
            grid=watched,
            initial_arrays=wire.arrays() if initial_arrays is None else initial_arrays,
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
        wire = self._bound
        session = wire.session
        cohorts = session.train_cohorts(server_round + wire.offset)
        jobs = sorted((job for jobs in cohorts for job in jobs), key=lambda job: job.client.id)
        wire.conducted = self.conduct(session.state, jobs, Hall(wire, grid))
        if wire.conducted is not None:
            return wire.messages([], MessageType.TRAIN, grid)
        return wire.messages([("train", jobs) for jobs in cohorts], MessageType.TRAIN, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand the replies to the session; Flower gets the global adapter and the numbers."""
        wire = self._bound
        results = [r for found in wire.results(replies).values() for r in found]
        wire.raise_if_dead()
        training = [r for r in results if not isinstance(r, Evaluation)]
        if wire.conducted is not None:
            wire.session.state = wire.conducted.state
            training = list(wire.conducted.results)
        record = wire.session.finish_training(training)
        return wire.arrays(), _brief(record, ("clients", "failed", "rejected", "train/loss"))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation jobs, if the schedule says so, packed into messages."""
        wire = self._bound
        batches = wire.session.evaluate_cohorts(server_round + wire.offset)
        return wire.messages(batches, MessageType.EVALUATE, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Hand the replies to the session; Flower gets the first group's numbers."""
        wire = self._bound
        results: dict[str, list[Evaluation | Failure]] = {
            tag: [r for r in found if not isinstance(r, Update)]
            for tag, found in wire.results(replies).items()
        }
        wire.raise_if_dead()
        numbers = wire.session.finish_evaluation(server_round + wire.offset, results)
        shown = ("clients", "loss_response", "loss_full", "rouge_l")
        return _brief(numbers, shown) if numbers else None


@dataclass(frozen=True)
class Conducted:
    """What came of a round of several exchanges."""

    state: State
    """Of the server after the exchanges, before the clients' updates are aggregated into it."""
    results: Sequence[Update | Failure]
    """One per client."""


class Hall:
    """Where a method that needs several exchanges meets the clients of a round.

    A client stays on one node for the whole round, so that it finds its state there; a node is
    never sent a second message before it has answered the first.
    """

    def __init__(self, wire: "_Wire", grid: Grid) -> None:
        self._wire, self._grid = wire, grid
        self._at: list[int] = []

    @property
    def worker(self) -> str:
        """What a worker process has to build, as JSON (`fedlora.worker.WorkerSpec`)."""
        return self._wire.worker

    @property
    def source(self) -> str:
        """Hash of the server's sources."""
        return self._wire.source

    @property
    def wire(self) -> str:
        """Number format of adapters in messages."""
        return self._wire.session.rounds.wire

    def say(self, line: str) -> None:
        """Show one line to whoever watches."""
        self._wire.session.emit(line)

    def step(self, step: int, steps: int, loss: float) -> None:
        """Show how far a round is, and take its time."""
        self._wire.session.stepped(step, steps, loss)

    def exchange(
        self,
        clients: Sequence[Client],
        action: str,
        content: Callable[[Sequence[Client]], RecordDict],
    ) -> list[tuple[Sequence[Client], RecordDict | str]]:
        """Send every node its clients' share, and wait for all answers.

        Args:
            clients: whom to ask.
            action: of the client app: a message of type ``train.<action>``.
            content: what some of these clients are sent.

        Returns:
            Some clients and what their node answered, or why there is no answer.

        Raises:
            WorkerDied: if a worker process is gone, and with it the state of its clients.
        """
        self._at = self._at or _nodes(self._grid)
        by_node: dict[int, list[Client]] = {}
        for client in clients:
            by_node.setdefault(self._at[client.id % len(self._at)], []).append(client)
        kind = f"{MessageType.TRAIN}.{action}"
        messages = [Message(content(who), node, kind) for node, who in by_node.items()]
        self._wire.expect(list(by_node.values()))
        timeout = self._wire.session.rounds.timeout_s
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        self._wire.raise_if_dead()
        return self._wire.answers(replies)


class _Wire:
    """Jobs to messages and replies to results, with what is under way remembered by message id."""

    def __init__(self, session: Session, worker: str, source: str) -> None:
        self.session, self.worker, self.source = session, worker, source
        self.offset = 0
        self.asked: dict[str, tuple[str, Sequence[Job]]] = {}
        """What is under way, by message id."""
        self._unsent: list[tuple[str, Sequence[Job]]] = []
        self.dead = ""
        self.conducted: Conducted | None = None
        """What came of the training phase under way, if it took several exchanges."""
        self._talking: dict[str, Sequence[Client]] = {}
        self._untold: list[Sequence[Client]] = []

    def expect(self, parties: Sequence[Sequence[Client]]) -> None:
        """The messages of an exchange are about to be sent, one for each of these."""
        self.asked, self._unsent, self._untold = {}, [], list(parties)

    def answers(
        self, replies: Iterable[Message]
    ) -> list[tuple[Sequence[Client], RecordDict | str]]:
        """Replies of an exchange, by the clients that they speak of."""
        missing = dict(self._talking)
        found: list[tuple[Sequence[Client], RecordDict | str]] = []
        for reply in replies:
            who = missing.pop(reply.metadata.reply_to_message_id, None)
            if who is None:
                log.warning("a reply to a message that is not under way was left out")
            elif reply.has_error():
                found.append((who, _essence(reply.error.reason or "unknown")))
            else:
                found.append((who, reply.content))
        return found + [(who, "no reply came in time") for who in missing.values()]

    def arrays(self) -> ArrayRecord:
        """The global adapter at the population's largest ranks, as Flower's model arrays."""
        session = self.session
        adapter = session.method.global_adapter(session.state, session.setting.max_ranks)
        return ArrayRecord([encode_payload(adapter, session.rounds.wire)[0]])

    def messages(
        self, batches: Sequence[tuple[str, Sequence[Job]]], kind: str, grid: Grid
    ) -> list[Message]:
        """One message per batch, dealt round-robin over the registered nodes."""
        self.asked, self._unsent = {}, list(batches)
        if not batches:
            return []
        nodes = _nodes(grid)
        out = []
        wire = self.session.rounds.wire
        for i, (_, jobs) in enumerate(batches):
            content = encode_jobs(jobs, worker=self.worker, source=self.source, wire=wire)
            out.append(Message(content, nodes[i % len(nodes)], kind))
        return out

    def sent(self, message_ids: Sequence[str]) -> None:
        """Take note of the ids that the messages were given, in their order.

        Raises:
            RunError: if Flower did not take all of them.
        """
        if self._untold:
            self._talking = dict(zip(message_ids, self._untold, strict=True))
            self._untold = []
            return
        if len(message_ids) != len(self._unsent):
            raise RunError(f"Flower took {len(message_ids)} of {len(self._unsent)} messages")
        self.asked = dict(zip(message_ids, self._unsent, strict=True))

    def results(self, replies: Iterable[Message]) -> dict[str, list[Update | Evaluation | Failure]]:
        """Results by tag. Jobs whose message came back broken, or not at all, are failures."""
        missing = dict(self.asked)
        found: dict[str, list[Update | Evaluation | Failure]] = {
            tag: [] for tag, _ in self.asked.values()
        }
        for reply in replies:
            key = reply.metadata.reply_to_message_id
            if key not in missing:
                log.warning("a reply to a message that is not under way was left out: %s", key)
                continue
            tag, jobs = missing.pop(key)
            found[tag] += self._read(reply, {j.client.id: j.client for j in jobs})
        for tag, jobs in missing.values():
            found[tag] += [Failure(j.client, "NoReply", "timeout") for j in jobs]
        return found

    def _read(
        self, reply: Message, clients: dict[int, Client]
    ) -> Sequence[Update | Evaluation | Failure]:
        """The results of one reply, whatever it holds."""
        if reply.has_error():
            reason = reply.error.reason or f"error code {reply.error.code}"
            return [Failure(c, "WorkerError", _essence(reason), reason) for c in clients.values()]
        try:
            return decode_results(reply.content, clients)
        except Exception as error:  # a reply is foreign input: it must not end the run
            why = f"its reply cannot be read: {type(error).__name__}: {error}"
            return [Failure(c, "WorkerError", why) for c in clients.values()]

    def notice(self, reply: Message) -> None:
        """Take note of a reply as it comes: progress, or the death of a worker."""
        if not reply.has_error():
            with suppress(Exception):  # what is wrong with it is said when it is read
                self.session.heard(glance(reply.content))
            return
        reason = reply.error.reason or ""
        if any(mark in reason for mark in DEATH):
            self.dead = _essence(reason)

    def raise_if_dead(self) -> None:
        """Stop in the round in which a worker process died; what it lost is done again.

        Raises:
            WorkerDied: so that a launcher can go on in a new pool.
        """
        if self.dead:
            raise WorkerDied(
                f"a worker process died ({self.dead}) and Flower does not replace it. "
                f"{self.session.safe()}; the same command with resume=auto continues"
            )


def _brief(record: Mapping[str, float | int | str], keys: Iterable[str]) -> MetricRecord:
    """The numbers that Flower's own log repeats at the end; metrics.jsonl has all of them."""
    numbers = ((k, record[k]) for k in keys if k in record)
    return MetricRecord({k: v for k, v in numbers if isinstance(v, int | float)})


def _nodes(grid: Grid) -> list[int]:
    """Registered nodes, once their number has settled: they register while the server starts.

    Raises:
        RunError: if there is none for two minutes.
    """
    deadline, before = time.monotonic() + NODE_PATIENCE_S, -1
    while True:
        nodes = sorted(grid.get_node_ids())
        if nodes and len(nodes) == before:
            return nodes
        before = len(nodes)
        if time.monotonic() > deadline:
            raise RunError(f"no Flower node registered within {NODE_PATIENCE_S:.0f} s")
        time.sleep(0.05)


def _essence(reason: str) -> str:
    """The line of an error reply that a person wants to read."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "died" in line]
    return (telling or lines or ["unknown"])[-1][:300]


class _WatchedGrid(Grid):
    """A grid that takes note of every reply as it comes, and stops waiting when a worker died."""

    def __init__(self, grid: Grid, wire: _Wire) -> None:
        self._grid, self._wire = grid, wire

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(self, *args: object, **kwargs: object) -> Message:
        return self._grid.create_message(*args, **kwargs)  # type: ignore[arg-type]

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        self._wire.sent(ids)
        pending = set(ids)
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending and (deadline is None or time.monotonic() < deadline):
            arrived = list(self.pull_messages(pending))
            for reply in arrived:
                pending.discard(reply.metadata.reply_to_message_id)
                self._wire.notice(reply)
            replies += arrived
            if self._wire.dead:
                break
            if pending and not arrived:
                time.sleep(0.05)
        return replies
