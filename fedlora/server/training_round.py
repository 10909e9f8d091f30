"""One round of training: its jobs, the acceptance of replies, and its record."""

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from fedlora.algebra.state import Kept, State
from fedlora.core.errors import RejectedUpdate, RunError
from fedlora.core.payload import Payload
from fedlora.core.types import Client, Expected, Failure, LocalPlan, Setting, TrainJob, Update
from fedlora.server.byte_account import ByteAccount
from fedlora.server.client_state import WIRE, ClientStore
from fedlora.server.method import Method
from fedlora.server.schedule import Rounds
from fedlora.server.validation import check_update

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRound:
    """A round under way."""

    round: int
    jobs: Mapping[int, TrainJob]
    """Jobs by client id."""
    account: ByteAccount
    started: float
    """Start of the round in seconds of the monotonic clock."""


@dataclass(frozen=True)
class Replies:
    """The replies of a round, sorted by client id."""

    by_client: Mapping[int, Update | Failure]
    """One per job, as it arrived."""
    updates: Sequence[Update]
    """Accepted."""
    failures: Sequence[Failure]
    """All other clients."""


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


def begin(
    method: Method, state: State, jobs: Sequence[TrainJob], round: int, wire: str
) -> TrainingRound:
    """The round of these jobs, whose clock starts now."""
    account = ByteAccount.open(method, state, jobs, wire)
    return TrainingRound(round, {j.client.id: j for j in jobs}, account, time.monotonic())


def collect(
    current: TrainingRound, results: Iterable[Update | Failure]
) -> dict[int, Update | Failure]:
    """One result for each job, by client id; clients without a reply have failed."""
    found = {r.client.id: r for r in results}
    return {
        i: found[i] if i in found else Failure(job.client, "NoReply", "no reply came")
        for i, job in sorted(current.jobs.items())
    }


def validate(
    current: TrainingRound,
    by_client: Mapping[int, Update | Failure],
    rounds: Rounds,
    setting: Setting,
) -> Replies:
    """Check every update; a rejected update becomes a failure."""
    updates, failures = [], []
    for i, result in by_client.items():
        job = current.jobs[i]
        if isinstance(result, Failure):
            failures.append(result)
            continue
        try:
            expected = Expected(job.client, job.start, job.plan, setting.density)
            check_update(result, expected, rounds.max_update_norm)
            updates.append(result)
        except RejectedUpdate as error:
            failures.append(Failure(job.client, "RejectedUpdate", error.reason))
    return Replies(by_client, updates, failures)


def client_rows(current: TrainingRound, replies: Replies) -> list[dict[str, object]]:
    """One row per client for clients.jsonl, accepted clients first."""

    def row(client: Client) -> dict[str, object]:
        reply = replies.by_client[client.id]
        return {
            "round": current.round,
            "client": client.id,
            "tier": client.tier,
            "rank": client.ranks.label,
            "examples": client.num_examples,
            "bytes_down": current.account.down(reply),
            "bytes_up": current.account.up(reply),
        }

    rows = [row(u.client) | dict(u.metrics) for u in replies.updates]
    return rows + [
        row(f.client) | {"failure": f.kind, "message": f.message} for f in replies.failures
    ]


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
    needed = max(rounds.min_clients, rounds.min_success * len(current.jobs))
    if len(updates) < needed or not updates:
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
    wire. All other clients keep what they had.

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
