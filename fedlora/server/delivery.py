"""Sends messages through a Flower grid and waits: for replies, for deaths, not for ever.

At most two messages per worker are under way, so that a worker finds the next one waiting. The
deadline of a message runs from when it is among the oldest ones, one per worker: those are being
worked on. A message that exceeds it is dropped, and its worker counts as busy until it answers.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.core.errors import RunError
from fedlora.server.incidents import DEADLINE, DIED, Incident, Incidents, named

log = logging.getLogger(__name__)

AHEAD = 2
"""Messages under way per worker."""
POLL_S = 0.05
DEATH = (
    "ActorDied",
    "ActorUnavailable",
    "WorkerCrashed",
    "NodeDied",
    "OutOfMemoryError: Task was killed",
)
"""Texts in the errors of a dead worker process. Flower never replaces it, and every further message
to it would fail, so the run stops and continues from its checkpoint with new workers."""


@dataclass(frozen=True)
class Phase:
    """Where in a run messages are sent."""

    round: int
    name: str
    """``train`` or ``evaluate``."""
    timeout_s: float
    """Seconds that a worker has for one message."""


@dataclass(frozen=True)
class Parcel:
    """A message and the clients whose work is in it."""

    message: Message
    clients: tuple[int, ...]
    alone: bool = False
    """Whether it is under way by itself, because one of its clients may end its worker."""


@dataclass
class _UnderWay:
    parcel: Parcel
    since: float | None = None
    """When a worker took it, as far as the server can know; monotonic clock, seconds."""


@dataclass
class Delivery:
    """The transport of one run.

    Args:
        grid: of Flower.
        workers: processes that work at once.
        incidents: of the run.
        on_reply: is called with each reply that is no error, when it arrives.
        safe: says what of the run is on disk, for messages.
        emit: shows one line.
        journal: file that names the message that is being worked on; ``None``: none is written.
        poll_s: seconds between two looks for replies.
        homes: whether every message has a node with no other client: all are under way at
            once, each has a deadline of its own, and what happens to one ends nothing.
    """

    grid: Grid
    workers: int
    incidents: Incidents
    on_reply: Callable[[Message], None]
    safe: Callable[[], str]
    emit: Callable[[str], None]
    journal: Path | None = None
    poll_s: float = POLL_S
    homes: bool = False
    _late: set[str] = field(default_factory=set)
    """Dropped messages that were not answered: each keeps a worker busy."""

    def send(self, parcels: Sequence[Parcel], phase: Phase) -> list[Message | None]:
        """Send and wait; the reply to each in their order, ``None`` where none came in time.

        Raises:
            RunError: if Flower did not take all messages, or workers die whatever they are sent.
            WorkerDied: as soon as a worker process died, or none is left that answers; a launcher
                can continue with new workers.
        """
        replies: dict[int, Message] = {}
        ahead = 1 if self.journal else AHEAD * self.workers
        ahead = len(parcels) if self.homes else ahead
        try:
            self._batch([p for p in parcels if not p.alone], phase, ahead, replies)
            for parcel in parcels:
                if parcel.alone:
                    self._batch([parcel], phase, 1, replies)
        finally:
            if self.journal:
                self.journal.unlink(missing_ok=True)
        return [replies.get(id(p)) for p in parcels]

    def _batch(
        self, parcels: Iterable[Parcel], phase: Phase, ahead: int, replies: dict[int, Message]
    ) -> None:
        """Send, never more than ``ahead`` at once, and add what comes back to the replies."""
        waiting, under_way = deque(parcels), dict[str, _UnderWay]()
        while waiting or under_way:
            while waiting and len(under_way) < ahead:
                self._push(waiting.popleft(), phase, under_way, bool(replies))
            arrived = list(self.grid.pull_messages([*under_way, *self._late]))
            lost = [p for reply in arrived for p in self._arrive(reply, under_way, replies)]
            if lost:
                self._died(lost, phase, bool(replies))
            self._drop_overdue(under_way, phase, bool(replies))
            blocked = len(self._late) >= self.workers and not self.homes
            if (waiting or under_way) and blocked:
                raise self.incidents.blocked(phase.name, phase.round, self.safe())
            if under_way and not arrived:
                time.sleep(self.poll_s)

    def _push(
        self, parcel: Parcel, phase: Phase, under_way: dict[str, _UnderWay], answered: bool
    ) -> None:
        if self.journal:
            kept = _incident(phase, DIED, [parcel], answered)
            self.journal.write_text(json.dumps(asdict(kept)), encoding="utf-8")
        ids = list(self.grid.push_messages([parcel.message]))
        if len(ids) != 1:
            raise RunError("Flower did not take a message")
        under_way[ids[0]] = _UnderWay(parcel)

    def _arrive(
        self, reply: Message, under_way: dict[str, _UnderWay], replies: dict[int, Message]
    ) -> list[Parcel]:
        """Take a reply; the parcel that was lost if it tells of a dead worker."""
        key = reply.metadata.reply_to_message_id
        if key in self._late:
            self._late.discard(key)
            return []
        found = under_way.pop(key, None)
        if found is None:
            log.warning("a reply to a message that is not under way was left out: %s", key)
            return []
        if reply.has_error():
            reason = reply.error.reason or ""
            if not self.homes and any(mark in reason for mark in DEATH):
                return [found.parcel]
        else:
            self.on_reply(reply)
        replies[id(found.parcel)] = reply
        return []

    def _died(self, lost: Sequence[Parcel], phase: Phase, answered: bool) -> None:
        raise self.incidents.died(_incident(phase, DIED, lost, answered), self.safe())

    def _drop_overdue(self, under_way: dict[str, _UnderWay], phase: Phase, answered: bool) -> None:
        """Start the clocks of the oldest messages, and drop those whose time is over."""
        now = time.monotonic()
        free = len(under_way) if self.homes else max(0, self.workers - len(self._late))
        for key, one in list(under_way.items())[:free]:
            if one.since is None:
                one.since = now
            elif now - one.since > phase.timeout_s:
                del under_way[key]
                self._late.add(key)
                if not self.homes:  # a silo that was late once is asked again in the next round
                    self.incidents.add(_incident(phase, DEADLINE, [one.parcel], answered))
                self.emit(
                    f"round {phase.round}: no answer within {phase.timeout_s:g} s "
                    f"(federation.timeout_s) for clients {named(one.parcel.clients)}"
                )


def _incident(phase: Phase, kind: str, parcels: Sequence[Parcel], answered: bool) -> Incident:
    clients = tuple(sorted({c for p in parcels for c in p.clients}))
    alone = len(parcels) == 1 and parcels[0].alone and len(clients) == 1
    return Incident(phase.round, phase.name, kind, clients, alone, answered)
