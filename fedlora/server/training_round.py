"""One round of training: its jobs, the acceptance of replies, and its record."""

import logging
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch

from fedlora.algebra.state import Kept, State
from fedlora.attack.base import Squad
from fedlora.core.checks import one_line
from fedlora.core.errors import RejectedUpdate, RunError
from fedlora.core.payload import Payload
from fedlora.core.recall import Recall
from fedlora.core.types import Client, Expected, Failure, LocalPlan, Setting, TrainJob, Update
from fedlora.server.byte_account import ByteAccount
from fedlora.server.client_state import HOME, STARTS, WIRE, ClientStore
from fedlora.server.gauge import turned_back
from fedlora.server.method import Method
from fedlora.server.norm_bound import COHORT, Move, NormBound, compare, furthest, move, steps_of
from fedlora.server.schedule import Rounds
from fedlora.server.validation import absurd, check_update
from fedlora.wire.recall import FORGOTTEN

log = logging.getLogger(__name__)


UNASKED = ("Unavailable", "LeftOut")
"""Kinds of failures of clients that were sent nothing."""


@dataclass(frozen=True)
class TrainingRound:
    """A round under way."""

    round: int
    jobs: Mapping[int, TrainJob]
    """Jobs by client id."""
    account: ByteAccount
    started: float
    """Start of the round in seconds of the monotonic clock."""
    absent: Mapping[int, Failure] = field(default_factory=dict)
    """Clients that were asked and have no job, for their results would not arrive in time
    (`fedlora.server.virtual_time`)."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """What the round's record says of virtual time."""
    about: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    """Client id -> more of its row in clients.jsonl."""


@dataclass(frozen=True)
class Replies:
    """The replies of a round, sorted by client id."""

    by_client: Mapping[int, Update | Failure]
    """One per job, as it arrived."""
    moves: Sequence[Move]
    """Accepted updates, and how far each has moved."""
    failures: Sequence[Failure]
    """All other clients."""
    bound: NormBound
    """What the accepted ones were compared with."""

    @property
    def asked(self) -> frozenset[int]:
        """The clients that were sent something."""
        unasked = {f.client.id for f in self.failures if f.kind in UNASKED}
        return frozenset(self.by_client.keys() - unasked)

    @property
    def updates(self) -> list[Update]:
        """The accepted updates."""
        return [m.update for m in self.moves]

    def without(self, refused: Mapping[int, str]) -> "Replies":
        """The replies after some accepted updates have been refused.

        Args:
            refused: client id -> why.
        """
        kept = [m for m in self.moves if m.update.client.id not in refused]
        more = [
            _rejected(m.update.client, refused[m.update.client.id])
            for m in self.moves
            if m.update.client.id in refused
        ]
        return replace(self, moves=kept, failures=[*self.failures, *more])

    def only(self, clients: Collection[int], lost: Sequence[Failure]) -> "Replies":
        """The replies whose updates went into a secure sum.

        Args:
            clients: in the sum.
            lost: failures of the others that were accepted.
        """
        kept = [m for m in self.moves if m.update.client.id in clients]
        return replace(self, moves=kept, failures=[*self.failures, *lost])

    def without_furthest(self, why: str) -> "Replies":
        """The replies without the update that moved furthest.

        Args:
            why: what is wrong with the model that all of them give.
        """
        culprit = furthest(self.moves)
        return self.without(
            {
                culprit.update.client.id: (
                    f"with it, {why}; of all updates it moved furthest (norm {culprit.weights:.4g})"
                )
            }
        )


def training_jobs(
    method: Method,
    state: State,
    clients: Sequence[Client],
    plan: LocalPlan,
    *,
    seed: int,
    round: int,
    kept: Callable[[int], Kept | None] = lambda _: None,
) -> list[TrainJob]:
    """The jobs of a round, one per client.

    Clients of one variant that keep nothing share start and plan.

    Args:
        method: its hooks are called.
        state: at the start of the round.
        clients: as they stand in the population; they are enlisted here.
        plan: of the configuration, for this round.
        seed: of the run.
        round: counted from 1.
        kept: what a client of this id keeps.

    Raises:
        RunError: if clients of one variant would start differently; looked at in rounds 1, 2, 4, 8
            and so on.
    """
    jobs, shared = [], Shared[tuple[Payload, LocalPlan]](_alike_jobs, check=round.bit_count() == 1)
    for client in [method.enlist(state, c) for c in clients]:
        mine = kept(client.id)

        def made(client: Client = client, mine: Kept | None = mine) -> tuple[Payload, LocalPlan]:
            start = method.technique.payload(method.client_start(state, client, mine))
            return start, method.plan(state, client, plan)

        key = variant_key(method, state, client, mine)
        jobs.append(TrainJob(seed, round, client, *shared.get(key, client, made)))
    return jobs


V = TypeVar("V")


@dataclass
class Shared(Generic[V]):
    """What clients of one variant share, made once.

    With ``check``, it is made a second time for the second client of each variant and compared: a
    method whose starts depend on the client and whose `Method.variant` does not would have all
    clients but the first train from what is meant for another.
    """

    alike: Callable[[V, V], bool]
    check: bool

    def __post_init__(self) -> None:
        self._made: dict[Hashable, tuple[V, int, bool]] = {}

    def get(self, key: Hashable, client: Client, make: Callable[[], V]) -> V:
        """The value of a variant.

        Args:
            key: of the variant.
            client: whose it is.
            make: makes it for this client.

        Raises:
            RunError: if this client's is another than that of the first client of the variant.
        """
        if key not in self._made:
            self._made[key] = make(), client.id, not self.check
        value, first, checked = self._made[key]
        if not checked and client.id != first:
            if not self.alike(value, make()):
                raise RunError(
                    f"the method gives clients {first} and {client.id} different starts, plans or "
                    "adapters under one variant: its variant(state, client) must return what they "
                    "depend on (client.id, if each client has its own)"
                )
            self._made[key] = value, first, True
        return value


def same_payload(one: Payload, other: Payload) -> bool:
    """Whether two payloads hold the same tensors, bit for bit."""
    a, b = dict(one.tensors()), dict(other.tensors())
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def _alike_jobs(one: tuple[Payload, LocalPlan], other: tuple[Payload, LocalPlan]) -> bool:
    return one[1] == other[1] and same_payload(one[0], other[0])


def variant_key(method: Method, state: State, client: Client, kept: Kept | None) -> Hashable:
    """The key under which enlisted clients share a payload: the variant, and the client's id if the
    client keeps something of its own."""
    variant = method.variant(state, client)
    return (variant, None if kept is None else client.id)


def with_residuals(jobs: Iterable[TrainJob], store: ClientStore) -> list[TrainJob]:
    """The jobs with the rounding errors of their clients' earlier replies, for error feedback."""
    return [replace(job, residual=store.get(job.client.id, WIRE) or {}) for job in jobs]


def with_recalls(jobs: Iterable[TrainJob], store: ClientStore, feedback: bool) -> list[TrainJob]:
    """The jobs of clients that keep what the wire needs themselves.

    Args:
        jobs: of the round.
        store: knows in which round each client's last reply was accepted.
        feedback: whether rounding errors are fed back.
    """
    since = {job.client.id: store.round(job.client.id, HOME) for job in jobs}
    return [replace(job, recall=Recall(since[job.client.id], feedback)) for job in jobs]


def begin(
    method: Method,
    state: State,
    jobs: Sequence[TrainJob],
    round: int,
    wire: str,
    down: Mapping[int, int] | None = None,
) -> TrainingRound:
    """The round of these jobs, whose clock starts now (`ByteAccount.open`)."""
    account = ByteAccount.open(method, state, jobs, wire, down)
    return TrainingRound(round, {j.client.id: j for j in jobs}, account, time.monotonic())


def collect(
    current: TrainingRound, results: Iterable[Update | Failure]
) -> dict[int, Update | Failure]:
    """One result for each job, by client id; clients without a reply have failed, and of several
    results of a client the first counts."""
    found = dict[int, Update | Failure]()
    for result in results:
        found.setdefault(result.client.id, result)
    return {
        i: found[i] if i in found else Failure(job.client, "NoReply", "no reply came")
        for i, job in sorted(current.jobs.items())
    }


def with_collusion(
    squad: Squad, current: TrainingRound, by_client: Mapping[int, Update | Failure]
) -> dict[int, Update | Failure]:
    """The results after the attackers have seen all of them (`Attack.together`)."""
    updates = {i: r for i, r in by_client.items() if isinstance(r, Update)}
    starts = {i: job.start for i, job in current.jobs.items()}
    return {**by_client, **squad.together(current.round, updates, starts)}


def validate(
    current: TrainingRound,
    by_client: Mapping[int, Update | Failure],
    rounds: Rounds,
    setting: Setting,
) -> Replies:
    """Check every update by itself, then all against each other; a rejected update becomes a
    failure."""
    moves, failures = [], []
    for i, result in by_client.items():
        job = current.jobs[i]
        if isinstance(result, Failure):
            failures.append(result)
            continue
        try:
            expected = Expected(job.client, job.start, job.plan, setting.density)
            check_update(result, expected, rounds.max_update_norm)
            _check_residual(result, job)
            if rounds.rebalance:
                result = turned_back(result, job.start, job.plan)
            moved = move(result, expected)
            _check_factors(moved, rounds.max_factor_norm)
            moves.append(moved)
        except RejectedUpdate as error:
            failures.append(_rejected(job.client, error.reason))
    replies = Replies(by_client, moves, failures, NormBound({}))
    if rounds.norm_bound != COHORT:
        return replies
    bound = compare(moves, rounds.norm_factor)
    return replace(replies.without(bound.refused), bound=bound)


def _check_factors(moved: Move, most: float) -> None:
    """Refuse an update whose tensors have moved further than ``most``; 0: any."""
    if most and not moved.sent <= most:
        raise RejectedUpdate(
            moved.update.client.id,
            f"the change of what it sent has norm {moved.sent:.6g}, above "
            f"federation.max_factor_norm={most:g}",
        )


def withheld(
    current: TrainingRound, by_client: Mapping[int, Update | Failure], setting: Setting
) -> Replies:
    """The replies of a round whose updates went into a secure sum: nothing of them is known but
    their clients' reports."""
    moves, failures = [], []
    for i, result in by_client.items():
        if isinstance(result, Failure):
            failures.append(result)
            continue
        job = current.jobs[i]
        expected = Expected(job.client, job.start, job.plan, setting.density)
        steps = steps_of(job.client.num_examples, expected)
        moves.append(Move(result, math.nan, math.nan, steps, 1))
    return Replies(by_client, moves, failures, NormBound({}))


def _rejected(client: Client, reason: str) -> Failure:
    return Failure(client, "RejectedUpdate", one_line(reason, 1000))


def _check_residual(update: Update, job: TrainJob) -> None:
    """Refuse a rounding error that was not asked for, or fits nothing that was sent: it is stored
    and sent to the client again."""
    residual = update.residual
    if residual is None:
        return
    before = job.residual
    reason = "" if before is not None else "it holds a rounding error that was not asked for"
    known = (*job.start.tensors(), *(before or {}).items(), *update.payload.tensors())
    shapes = {name: t.shape for name, t in known}
    for name, t in residual.items():
        if shapes.get(name) != t.shape:
            reason = reason or f"its rounding error {name} fits no tensor"
    if reason := reason or absurd(residual.items()):
        raise RejectedUpdate(job.client.id, reason)


def client_rows(current: TrainingRound, replies: Replies) -> list[dict[str, object]]:
    """One row per client for clients.jsonl, accepted clients first. What the server knows wins over
    what a client says."""

    by_client = {**replies.by_client, **current.absent}

    def row(client: Client, said: Mapping[str, object]) -> dict[str, object]:
        reply = by_client[client.id]
        known: dict[str, object] = {
            "round": current.round,
            "client": client.id,
            "tier": client.tier,
            "rank": client.ranks.label,
            "bytes_down": current.account.down(reply),
            "bytes_up": current.account.up(reply),
            **current.about.get(client.id, {}),
        }
        return {"round": current.round, "examples": client.num_examples, **said} | known

    rows = [
        row(m.update.client, m.update.metrics)
        | ({"change_norm": m.weights} if math.isfinite(m.weights) else {})
        for m in replies.moves
    ]
    return rows + [
        row(f.client, {}) | {"failure": f.kind, "message": f.message}
        for f in (*replies.failures, *current.absent.values())
    ]


def enough(current: TrainingRound, replies: Replies, rounds: Rounds) -> bool:
    """Whether as many clients succeeded as a round needs; one that asked no client needs none."""
    return len(replies.moves) >= fewest(rounds, len(current.jobs))


def fewest(rounds: Rounds, asked: int) -> int:
    """How many of the clients that a round asks must succeed; of none: none."""
    if not asked:
        return 0
    return math.ceil(max(rounds.min_clients, rounds.min_success * asked, 1))


def require_enough(
    current: TrainingRound, replies: Replies, rounds: Rounds, emit: Callable[[str], None], safe: str
) -> None:
    """Show the first failures, and stop a run that has too many.

    Args:
        current: the round.
        replies: its results.
        rounds: how many clients must succeed.
        emit: shows one line.
        safe: what a run that stops here has kept, for the message.

    Raises:
        RunError: if too few clients succeeded.
    """
    updates, failures = replies.updates, replies.failures
    for f in failures[:5]:
        tier = f"{f.client.tier}, " if f.client.tier else ""
        emit(
            f"round {current.round}: client {f.client.id} ({tier}{f.client.ranks.text}) "
            f"failed: {f.kind}: {f.message}"
        )
        if f.traceback:
            log.debug("client %d: %s", f.client.id, f.traceback)
    if len(failures) > 5:
        emit(f"round {current.round}: and {len(failures) - 5} more, see clients.jsonl")
    if not enough(current, replies, rounds):
        first = f"; first failure: {failures[0].kind}: {failures[0].message}" if failures else ""
        raise RunError(
            f"round {current.round}: only {len(updates)} of {len(current.jobs)} clients succeeded "
            f"(min_success={rounds.min_success}, min_clients={rounds.min_clients})"
            f"{first}. {safe}"
        )


def stage_kept(
    method: Method, state: State, current: TrainingRound, replies: Replies, store: ClientStore
) -> None:
    """Stage what accepted clients keep: the method's client state and the rounding error of the
    wire. All other clients keep what they had, but for those that say that they have lost it.

    Args:
        method: its `kept` is called.
        state: the state at the start of the round.
        current: the round.
        replies: its results.
        store: writes them at the end of the round.
    """
    for update in replies.updates:
        job = current.jobs[update.client.id]
        before = store.get(job.client.id)
        kept = method.kept(state, job.client, before, job.start, update)
        if kept is not None and kept is not before:
            store.stage(job.client.id, kept)
        if update.residual is not None:
            store.stage(job.client.id, update.residual, WIRE)
        if job.recall is not None:
            store.stage(job.client.id, {}, HOME)
    for i, reply in replies.by_client.items():
        sent = current.jobs[i].sent
        if sent is not None and isinstance(reply, Update):  # it has arrived
            store.stage(i, dict(sent.tensors()), STARTS)
        lost = isinstance(reply, Failure) and reply.kind == FORGOTTEN
        if lost and current.jobs[i].recall is not None:
            for namespace in (HOME, STARTS):
                store.stage(i, None, namespace)
