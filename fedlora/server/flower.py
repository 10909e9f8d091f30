"""A federated run over Flower: cohorts of jobs to messages, replies to results.

`FederatedRun` drives the hooks of a method through a Flower grid. The nodes of the grid are slots
that serve virtual clients, and the `Session` decides everything but the transport.
"""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeAlias

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.core.checks import one_line
from fedlora.core.errors import RunError
from fedlora.core.types import (
    Client,
    EvaluateJob,
    Evaluation,
    Failure,
    TrainJob,
    Update,
)
from fedlora.secagg.config import REAL
from fedlora.server.claims import checked
from fedlora.server.delivery import POLL_S, Delivery, Parcel, Phase
from fedlora.server.homes import Homes
from fedlora.server.incidents import EVALUATE, TRAIN, Incidents
from fedlora.server.method import ClientChannel, RoundOutcome
from fedlora.server.norm_bound import COHORT
from fedlora.server.secure_round import SecureRound
from fedlora.server.session import Session
from fedlora.server.training_round import UNASKED
from fedlora.server.workers import check_workers
from fedlora.wire.messages import decode_results, encode_jobs, glance
from fedlora.wire.tensors import NO_FORMAT, Format

log = logging.getLogger(__name__)

Job: TypeAlias = TrainJob | EvaluateJob

SETUP_PATIENCE_S = 600.0
"""Seconds that workers have at least to load the model, however short the deadline of a message."""
NODE_PATIENCE_S = 120.0
"""Seconds to wait for the first Flower node: on a busy machine Ray needs half a minute."""


class FederatedRun:
    """A session over virtual clients behind Flower nodes.

    Args:
        session: the run's method, state and records.
        worker: JSON description of what a worker process has to build.
        source: hash of this process's sources; workers with others refuse to work.
        journal: see `fedlora.server.delivery.Delivery`.
        homes: where clients are nodes of their own; None: nodes are slots for virtual clients.
    """

    def __init__(
        self,
        session: Session,
        *,
        worker: str,
        source: str,
        journal: Path | None = None,
        homes: Homes | None = None,
    ) -> None:
        self.session, self.worker, self.source = session, worker, source
        self.incidents = Incidents(session.folder)
        self.homes = homes
        self._journal = journal

    def start(self, grid: Grid) -> None:
        """Run the remaining rounds, and first the evaluation before them if it is due.

        Raises:
            RunError: if the run cannot go on. Completed rounds stay on disk.
            WorkerDied: as soon as a worker process died; a launcher can continue with new workers.
        """
        session = self.session
        log.info(
            "%s: %d clients, %d per round",
            type(session.method).__name__,
            len(session.roster.clients),
            session.roster.per_round,
        )
        if self.homes is None:  # silos have introduced themselves
            wire = session.rounds.wire
            empty = encode_jobs((), worker=self.worker, source=self.source, wire=wire)
            patience = max(session.rounds.timeout_s, SETUP_PATIENCE_S)
            check_workers(grid, nodes_of(grid), session.workers, empty, patience)
        delivery = Delivery(
            grid,
            session.workers,
            self.incidents,
            self._show,
            session.safe,
            session.emit,
            self._journal,
            poll_s=self.homes.poll_s if self.homes else POLL_S,
            homes=self.homes is not None,
        )
        if session.evaluation_missing():
            self._evaluate(session.done, delivery)
        for round in range(session.done + 1, session.rounds.rounds + 1):
            if session.stopped():
                break
            self._train(round, delivery)
            self._evaluate(round, delivery)

    def phase(self, round: int, name: str) -> Phase:
        """Where messages are sent now."""
        return Phase(round, name, self.session.rounds.timeout_s)

    def _train(self, round: int, delivery: Delivery) -> None:
        session, phase = self.session, self.phase(round, TRAIN)
        cohorts = session.train_cohorts(round)
        if self.homes:
            self.homes.refresh(delivery.grid)
        out = self._left_out([job for jobs in cohorts for job in jobs], phase)
        jobs = [job for jobs in cohorts for job in jobs if job.client.id not in out]
        jobs.sort(key=lambda job: job.client.id)
        channel = FlowerChannel(self, delivery, phase)
        outcome = None
        if jobs and session.secagg.kind == REAL:
            outcome = SecureRound(session.sum_plan(jobs), channel, session.store).run()
        elif jobs:
            outcome = session.method.run_round(session.state, jobs, channel)
        if outcome is None:
            found = self._results(cohorts, MessageType.TRAIN, delivery, phase)
            trained = [r for part in found for r in part if not isinstance(r, Evaluation)]
            outcome = RoundOutcome(session.state, trained)
        results = [*outcome.results, *out.values()]
        session.finish_training(results, outcome.state, outcome.summed)

    def _evaluate(self, round: int, delivery: Delivery) -> None:
        phase = self.phase(round, EVALUATE)
        batches = self.session.evaluate_cohorts(round)
        if self.homes and batches:
            self.homes.refresh(delivery.grid)
        found = self._results([jobs for _, jobs in batches], MessageType.EVALUATE, delivery, phase)
        results: dict[str, list[Evaluation | Failure]] = {tag: [] for tag, _ in batches}
        for (tag, jobs), part in zip(batches, found, strict=True):
            results[tag] += [r for r in part if not isinstance(r, Update)]
            results[tag] += self._left_out(jobs, phase).values()
        self.session.finish_evaluation(round, results)

    def _left_out(self, jobs: Sequence[Job], phase: Phase) -> dict[int, Failure]:
        """The clients of these jobs that are not sent anything, as failures."""
        out, kind = self._out(phase), UNASKED[0] if self.homes else UNASKED[1]
        clients = {job.client.id: job.client for job in jobs}
        return {i: Failure(c, kind, out[i]) for i, c in clients.items() if i in out}

    def _out(self, phase: Phase) -> dict[int, str]:
        """The clients that are not sent anything now, with the reason."""
        if self.homes:
            return self.homes.away()
        return self.incidents.left_out(phase.name, phase.round)

    def _results(
        self, batches: Sequence[Sequence[Job]], kind: str, delivery: Delivery, phase: Phase
    ) -> list[list[Update | Evaluation | Failure]]:
        """A message per batch, and one for each client that is sent its own; dealt round-robin over
        the nodes. The results batch by batch, without clients that are left out.

        Jobs whose message came back broken, or not at all, are failures. A reply repeats the nonce
        of these messages: one of an earlier round is no reply.
        """
        parts = [(i, part) for i, jobs in enumerate(batches) for part in self._parts(jobs, phase)]
        if not parts:
            return [[] for _ in batches]
        wire, nonce = self.session.rounds.wire, secrets.token_hex(8)
        up = self.session.compression.up if kind == MessageType.TRAIN else NO_FORMAT
        down = self.session.compression.down if kind == MessageType.TRAIN else NO_FORMAT
        written = partial(encode_jobs, source=self.source, wire=wire, nonce=nonce, up=up, down=down)
        parcels = []
        for (_, jobs), (node, worker) in zip(parts, self._routes(parts, delivery), strict=True):
            message = Message(written(jobs, worker=worker), node, kind)
            parcels.append(self.parcel(message, [job.client for job in jobs], phase))
        found: list[list[Update | Evaluation | Failure]] = [[] for _ in batches]
        for (i, jobs), reply in zip(parts, delivery.send(parcels, phase), strict=True):
            asked = {job.client.id: job for job in jobs}
            read = _read(reply, jobs, wire, nonce, up)
            found[i] += [checked(asked[r.client.id], r, self.session.store) for r in read]
        return found

    def _routes(
        self, parts: Sequence[tuple[int, Sequence[Job]]], delivery: Delivery
    ) -> list[tuple[int, str]]:
        """The node that each part of the batches is sent to, and what it is to open."""
        if self.homes:
            ids = [jobs[0].client.id for _, jobs in parts]
            return [(self.homes.nodes[i], self.homes.workers[i]) for i in ids]
        nodes = nodes_of(delivery.grid)
        return [(nodes[n % len(nodes)], self.worker) for n in range(len(parts))]

    def _parts(self, jobs: Sequence[Job], phase: Phase) -> list[list[Job]]:
        """A batch without the clients that are left out; those that are sent one to a message are
        parts of their own."""
        out = self._out(phase)
        if self.homes:
            return [[job] for job in jobs if job.client.id not in out]
        single = self.incidents.one_by_one(phase.name, phase.round)
        crowd = [job for job in jobs if job.client.id not in single | out.keys()]
        own = [[job] for job in jobs if job.client.id in single - out.keys()]
        return [part for part in (crowd, *own) if part]

    def parcel(self, message: Message, clients: Sequence[Client], phase: Phase) -> Parcel:
        """The message to some clients, sent alone if one of them may end its worker."""
        ids = tuple(client.id for client in clients)
        single = self.incidents.one_by_one(phase.name, phase.round)
        return Parcel(message, ids, alone=not single.isdisjoint(ids))

    def _show(self, reply: Message) -> None:
        with suppress(Exception):  # errors in it are reported when it is decoded
            self.session.on_reply(glance(reply.content))


class FlowerChannel(ClientChannel):
    """The channel to the clients of one round: one message per node and action."""

    def __init__(self, run: FederatedRun, delivery: Delivery, phase: Phase) -> None:
        rounds = run.session.rounds
        self.worker, self.source, self.wire = run.worker, run.source, rounds.wire
        self.norm_factor = rounds.norm_factor if rounds.norm_bound == COHORT else 0.0
        self._run, self._delivery, self._phase = run, delivery, phase
        self._nodes: list[int] = []

    def worker_of(self, clients: Sequence[Client]) -> str:
        """See `ClientChannel.worker_of`: a silo is told what is meant for it."""
        homes = self._run.homes
        return homes.workers[clients[0].id] if homes else self.worker

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
        """See `ClientChannel.exchange`: client ``i`` lives on node ``i`` modulo their number, or is
        a node of its own."""
        homes, incidents, phase = self._run.homes, self._run.incidents, self._phase
        if homes is None:
            self._nodes = self._nodes or nodes_of(self._delivery.grid)
        single = incidents.one_by_one(phase.name, phase.round)
        out = homes.away() if homes else incidents.left_out(phase.name, phase.round)
        groups: dict[tuple[int, int | None], list[Client]] = {}
        for client in (c for c in clients if c.id not in out):
            node = homes.nodes[client.id] if homes else self._nodes[client.id % len(self._nodes)]
            own = client.id if client.id in single else None
            groups.setdefault((node, own), []).append(client)
        kind = f"{MessageType.TRAIN}.{action}"
        parcels = [
            self._run.parcel(Message(content(who), node, kind), who, phase)
            for (node, _), who in groups.items()
        ]
        replies = self._delivery.send(parcels, phase)
        answers = [_answer(reply) for reply in replies]
        dropped = [((c,), out[c.id]) for c in clients if c.id in out]
        return [*zip(groups.values(), answers, strict=True), *dropped]


def _answer(reply: Message | None) -> RecordDict | str:
    if reply is None:
        return "no reply came in time"
    if reply.has_error():
        return essence(reply.error.reason or "unknown")
    return reply.content


def _read(
    reply: Message | None, jobs: Sequence[Job], wire: str, nonce: str, up: Format
) -> Sequence[Update | Evaluation | Failure]:
    """The results of one reply to these jobs, whatever it holds."""
    clients = {j.client.id: j.client for j in jobs}
    if reply is None:
        return [Failure(c, "NoReply", "no reply came in time") for c in clients.values()]
    if reply.has_error():
        reason = reply.error.reason or f"error code {reply.error.code}"
        return [Failure(c, "WorkerError", essence(reason), reason) for c in clients.values()]
    try:
        starts = {j.client.id: j.start for j in jobs if isinstance(j, TrainJob)}
        return decode_results(reply.content, clients, starts, wire=wire, nonce=nonce, up=up)
    except Exception as error:  # a reply is foreign input: it must not end the run
        why = one_line(f"its reply cannot be read: {type(error).__name__}: {error}")
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
