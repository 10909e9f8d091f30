"""The server's side of Flower's wire: cohorts of jobs to messages, replies to results.

What is under way is remembered by message id, so that a reply that never comes is a failure of the
clients it was to speak of. Only `strategies.base` and the link of split rounds use this.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedlora.algebra.state import State
from fedlora.core.errors import RunError, WorkerDied
from fedlora.core.types import (
    Client,
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.server.session import Session
from fedlora.wire.codec import (
    decode_results,
    encode_jobs,
    encode_payload,
    glance,
)

log = logging.getLogger(__name__)

Job: TypeAlias = TrainJob | EvaluateJob

NODE_PATIENCE_S = 120.0
"""How long to wait for the first Flower node: on a busy machine Ray needs half a minute."""
DEATH = ("ActorDied", "ActorUnavailable", "WorkerCrashed", "OutOfMemoryError: Task was killed")
"""Marks of a worker process that is gone. Flower never replaces it: it would fail every further
message it is given, so the run stops and goes on from its checkpoint in a new pool."""


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

    def __init__(self, carrier: "Carrier", grid: Grid) -> None:
        self._carrier, self._grid = carrier, grid
        self._at: list[int] = []

    @property
    def worker(self) -> str:
        """What a worker process has to build, as JSON (`fedlora.engine.worker.WorkerSpec`)."""
        return self._carrier.worker

    @property
    def source(self) -> str:
        """Hash of the server's sources."""
        return self._carrier.source

    @property
    def wire(self) -> str:
        """Number format of adapters in messages."""
        return self._carrier.session.rounds.wire

    def say(self, line: str) -> None:
        """Show one line to whoever watches."""
        self._carrier.session.emit(line)

    def step(self, step: int, steps: int, loss: float) -> None:
        """Show how far a round is, and take its time."""
        self._carrier.session.stepped(step, steps, loss)

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
        self._carrier.expect(list(by_node.values()))
        timeout = self._carrier.session.rounds.timeout_s
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        self._carrier.raise_if_dead()
        return self._carrier.answers(replies)


class Carrier:
    """Jobs to messages and replies to results, with what is under way remembered by message id.

    Args:
        session: the run that is served.
        worker: JSON description of what a worker process has to build.
        source: hash of this process's sources; workers with others refuse to work.
    """

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
        adapter = session.global_payload(session.setting.max_ranks)
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


class WatchedGrid(Grid):
    """A grid that takes note of every reply as it comes, and stops waiting when a worker died."""

    def __init__(self, grid: Grid, carrier: Carrier) -> None:
        self._grid, self._carrier = grid, carrier

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
        self._carrier.sent(ids)
        pending = set(ids)
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while pending and (deadline is None or time.monotonic() < deadline):
            arrived = list(self.pull_messages(pending))
            for reply in arrived:
                pending.discard(reply.metadata.reply_to_message_id)
                self._carrier.notice(reply)
            replies += arrived
            if self._carrier.dead:
                break
            if pending and not arrived:
                time.sleep(0.05)
        return replies
