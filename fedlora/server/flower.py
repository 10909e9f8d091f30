"""A federated run over Flower: cohorts of jobs to messages, replies to results.

`FederatedRun` drives the hooks of a method through a Flower grid. The nodes of the grid are slots
that serve virtual clients, and the `Session` decides everything but the transport.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.core.errors import RunError, WorkerDied
from fedlora.core.types import (
    Client,
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.server.method import ClientChannel, RoundOutcome
from fedlora.server.session import Session
from fedlora.server.workers import check_workers
from fedlora.wire.codec import decode_results, encode_jobs, glance

log = logging.getLogger(__name__)

Job: TypeAlias = TrainJob | EvaluateJob

NODE_PATIENCE_S = 120.0
"""Seconds to wait for the first Flower node: on a busy machine Ray needs half a minute."""
DEATH = ("ActorDied", "ActorUnavailable", "WorkerCrashed", "OutOfMemoryError: Task was killed")
"""Texts in the errors of a dead worker process. Flower never replaces it, and every further message
to it would fail, so the run stops and continues from its checkpoint with new workers."""


class FederatedRun:
    """A session over virtual clients behind Flower nodes.

    Args:
        session: the run's method, state and records.
        worker: JSON description of what a worker process has to build.
        source: hash of this process's sources; workers with others refuse to work.
    """

    def __init__(self, session: Session, *, worker: str, source: str) -> None:
        self.session, self.worker, self.source = session, worker, source
        self._dead = ""
        """Why a worker process died; empty: none did."""

    def start(self, grid: Grid) -> None:
        """Run the remaining rounds, and first the evaluation before them if it is due.

        Raises:
            RunError: if the run cannot go on. Completed rounds stay on disk.
        """
        session = self.session
        log.info(
            "%s: %d clients, %d per round",
            type(session.method).__name__,
            len(session.roster.clients),
            session.roster.per_round,
        )
        empty = encode_jobs((), worker=self.worker, source=self.source, wire=session.rounds.wire)
        check_workers(grid, nodes_of(grid), session.workers, empty, session.rounds.timeout_s)
        if session.evaluation_missing():
            self._evaluate(session.done, grid)
        for round in range(session.done + 1, session.rounds.rounds + 1):
            self._train(round, grid)
            self._evaluate(round, grid)

    def _train(self, round: int, grid: Grid) -> None:
        session = self.session
        cohorts = session.train_cohorts(round)
        jobs = sorted((job for jobs in cohorts for job in jobs), key=lambda job: job.client.id)
        outcome = session.method.run_round(session.state, jobs, FlowerChannel(self, grid))
        if outcome is None:
            found = self._results(cohorts, MessageType.TRAIN, grid)
            results = [r for part in found for r in part if not isinstance(r, Evaluation)]
            outcome = RoundOutcome(session.state, results)
        session.finish_training(outcome.results, outcome.state)

    def _evaluate(self, round: int, grid: Grid) -> None:
        batches = self.session.evaluate_cohorts(round)
        found = self._results([jobs for _, jobs in batches], MessageType.EVALUATE, grid)
        results: dict[str, list[Evaluation | Failure]] = {tag: [] for tag, _ in batches}
        for (tag, _), part in zip(batches, found, strict=True):
            results[tag] += [r for r in part if not isinstance(r, Update)]
        self.session.finish_evaluation(round, results)

    def _results(
        self, batches: Sequence[Sequence[Job]], kind: str, grid: Grid
    ) -> list[Sequence[Update | Evaluation | Failure]]:
        """One message per batch, dealt round-robin over the nodes; the results batch by batch.

        Jobs whose message came back broken, or not at all, are failures.
        """
        if not batches:
            return []
        nodes, wire = nodes_of(grid), self.session.rounds.wire
        messages = [
            Message(
                encode_jobs(jobs, worker=self.worker, source=self.source, wire=wire),
                nodes[i % len(nodes)],
                kind,
            )
            for i, jobs in enumerate(batches)
        ]
        return [
            _read(reply, jobs)
            for jobs, reply in zip(batches, self.deliver(messages, grid), strict=True)
        ]

    def deliver(self, messages: Sequence[Message], grid: Grid) -> list[Message | None]:
        """Send messages and wait; the reply to each in their order, ``None`` where none came.

        Raises:
            RunError: if Flower did not take all of them.
            WorkerDied: as soon as a worker process died; a launcher can continue with new workers.
        """
        ids = list(grid.push_messages(messages))
        if len(ids) != len(messages):
            raise RunError(f"Flower took {len(ids)} of {len(messages)} messages")
        replies: dict[str, Message] = {}
        pending = set(ids)
        deadline = time.monotonic() + self.session.rounds.timeout_s
        while pending and time.monotonic() < deadline:
            arrived = list(grid.pull_messages(pending))
            for reply in arrived:
                key = reply.metadata.reply_to_message_id
                if key not in pending:
                    log.warning("a reply to a message that is not under way was left out: %s", key)
                    continue
                pending.discard(key)
                replies[key] = reply
                self._notice(reply)
            self._raise_if_dead()
            if pending and not arrived:
                time.sleep(0.05)
        return [replies.get(i) for i in ids]

    def _notice(self, reply: Message) -> None:
        """Handle a reply when it arrives: show progress, or note the death of a worker."""
        if not reply.has_error():
            with suppress(Exception):  # errors in it are reported when it is decoded
                self.session.on_reply(glance(reply.content))
            return
        reason = reply.error.reason or ""
        if any(mark in reason for mark in DEATH):
            self._dead = essence(reason)

    def _raise_if_dead(self) -> None:
        if self._dead:
            raise WorkerDied(
                f"a worker process died ({self._dead}) and Flower does not replace it. "
                f"{self.session.safe()}; the same command with resume=auto continues"
            )


class FlowerChannel(ClientChannel):
    """The channel to the clients of one round: one message per node and action."""

    def __init__(self, run: FederatedRun, grid: Grid) -> None:
        self.worker, self.source, self.wire = run.worker, run.source, run.session.rounds.wire
        self._run, self._grid = run, grid
        self._nodes: list[int] = []

    def say(self, line: str) -> None:
        """Show one line to the user."""
        self._run.session.emit(line)

    def on_step(self, step: int, steps: int, loss: float) -> None:
        """Show how far the round is."""
        self._run.session.on_step(step, steps, loss)

    def exchange(
        self,
        clients: Sequence[Client],
        action: str,
        content: Callable[[Sequence[Client]], RecordDict],
    ) -> list[tuple[Sequence[Client], RecordDict | str]]:
        """See `ClientChannel.exchange`: client ``i`` lives on node ``i`` modulo their number."""
        self._nodes = self._nodes or nodes_of(self._grid)
        by_node: dict[int, list[Client]] = {}
        for client in clients:
            by_node.setdefault(self._nodes[client.id % len(self._nodes)], []).append(client)
        kind = f"{MessageType.TRAIN}.{action}"
        messages = [Message(content(who), node, kind) for node, who in by_node.items()]
        replies = self._run.deliver(messages, self._grid)
        return [(w, _answer(r)) for w, r in zip(by_node.values(), replies, strict=True)]


def _answer(reply: Message | None) -> RecordDict | str:
    if reply is None:
        return "no reply came in time"
    if reply.has_error():
        return essence(reply.error.reason or "unknown")
    return reply.content


def _read(reply: Message | None, jobs: Sequence[Job]) -> Sequence[Update | Evaluation | Failure]:
    """The results of one reply to these jobs, whatever it holds."""
    clients = {j.client.id: j.client for j in jobs}
    if reply is None:
        return [Failure(c, "NoReply", "timeout") for c in clients.values()]
    if reply.has_error():
        reason = reply.error.reason or f"error code {reply.error.code}"
        return [Failure(c, "WorkerError", essence(reason), reason) for c in clients.values()]
    try:
        starts = {j.client.id: j.start for j in jobs if isinstance(j, TrainJob)}
        return decode_results(reply.content, clients, starts)
    except Exception as error:  # a reply is foreign input: it must not end the run
        why = f"its reply cannot be read: {type(error).__name__}: {error}"
        return [Failure(c, "WorkerError", why) for c in clients.values()]


def nodes_of(grid: Grid) -> list[int]:
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


def essence(reason: str) -> str:
    """The most informative line of an error reply."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "died" in line]
    return (telling or lines or ["unknown"])[-1][:300]
