"""The schedule of buffered asynchrony in virtual time (FedBuff, Nguyen et al., arXiv:2106.06639).

At most ``concurrency`` clients are at work, or have sent results that wait. Each starts from the
version of the model that the server has then, and its result waits in a buffer. When ``size``
results have arrived, the server makes the next version of them and fills up to ``concurrency``
again; it also does so when fewer clients are at work than the buffer still waits for, because some
went away or were too late.

When a result arrives follows from devices and tokens alone, so the schedule is known before anybody
trains, and all clients that start from one version train together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.core.errors import RunError
from fedlora.devices.clock import Missed, missing
from fedlora.devices.table import Fleet
from fedlora.devices.time import Visit

FINISHED = "Finished"


@dataclass(frozen=True)
class Flight:
    """A client at work, or a result on its way."""

    client: int
    version: int
    """The version of the model from which it started, counted from 0."""
    ends: float
    """Virtual time in seconds at which its result arrives, or it is given up."""
    kind: str = FINISHED
    """`FINISHED`, or why no result arrives (`fedlora.devices.clock`)."""


@dataclass(frozen=True)
class Queue:
    """What the server waits for: the state of the schedule between two versions."""

    now: float = 0.0
    version: int = 0
    draws: int = 0
    """Draws of clients so far."""
    flights: tuple[Flight, ...] = ()
    """By (end, client)."""

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` understands."""
        rows = [[f.client, f.version, f.ends, f.kind] for f in self.flights]
        return {"now": self.now, "version": self.version, "draws": self.draws, "flights": rows}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Queue":
        """The inverse of `to_json`."""
        flights = tuple(Flight(*row) for row in values["flights"])
        return Queue(values["now"], values["version"], values["draws"], flights)


@dataclass(frozen=True)
class Version:
    """What happens until the next version is made."""

    started: tuple[Visit, ...]
    """Clients that start from the present version and whose results will arrive."""
    missed: tuple[Missed, ...]
    """Clients that start from it and whose results will not, each with its own time."""
    arrived: tuple[Flight, ...]
    """The results of which the next version is made, in the order of their arrival."""
    after: Queue
    """When it has been made."""


Start = Callable[[Sequence[int], int, int], Sequence[Visit]]
"""Draws at most so many of some clients, in the draw of this number, and gives their parts."""


@dataclass(frozen=True)
class Buffer:
    """The rule of the schedule."""

    fleet: Fleet
    size: int
    """Results of which a version is made."""
    concurrency: int
    """Clients at work at once, those included whose results wait in the buffer."""
    deadline: float = math.inf
    """Seconds after which a client's result is no longer waited for."""

    def ready(self, queue: Queue, clients: Sequence[int]) -> tuple[list[int], int]:
        """The clients that could start from a version when it has just been made, and how many of
        them do."""
        busy = {f.client for f in queue.flights}
        on = self.fleet.trace.on([i for i in clients if i not in busy], queue.now)
        return on, self._free(queue.flights, on)

    def _free(self, flights: Sequence[Flight], on: Sequence[int]) -> int:
        return max(0, min(self.concurrency - len(flights), len(on)))

    def advance(self, queue: Queue, clients: Sequence[int], start: Start) -> Version:
        """All that happens until the next version.

        No client starts twice from one version. If all have been asked and nothing is on its way,
        the version is made of what has arrived.

        Args:
            queue: after the present version was made.
            clients: ids that may be asked.
            start: draws clients from those that are available and idle.

        Raises:
            RunError: if no client is ever available again.
        """
        now, draws, flights = queue.now, queue.draws, list(queue.flights)
        started: list[Visit] = []
        missed: list[Missed] = []
        arrived: list[Flight] = []

        def fill() -> None:
            """Ask as many clients as may work besides those that do."""
            nonlocal draws
            on = self.fleet.trace.on(idle(), now)
            wanted = self._free(flights, on)
            if not wanted:
                return
            draws += 1
            for visit in start(on, wanted, draws):
                lost = self._lost(visit, now)
                (missed.append(lost) if lost else started.append(visit))
                ends, kind = (lost.at, lost.kind) if lost else (now + visit.seconds, FINISHED)
                flights.append(Flight(visit.client, queue.version, ends, kind))
            flights.sort(key=_order)

        def idle() -> list[int]:
            """Clients that neither are at work nor have been asked by this version."""
            busy = {f.client for f in flights} | {f.client for f in arrived}
            busy |= {v.client for v in started} | {m.visit.client for m in missed}
            return [i for i in clients if i not in busy]

        fill()
        while len(arrived) < self.size:
            if len(flights) < self.size - len(arrived):
                fill()
            if flights:
                first = flights.pop(0)
                now = max(now, first.ends)
                arrived += [first] if first.kind == FINISHED else []
            elif left := idle():
                now = self._opening(left, now)
                fill()
            else:
                break
        after = Queue(now + self.fleet.server_seconds, queue.version + 1, draws, tuple(flights))
        return Version(tuple(started), tuple(missed), tuple(arrived), after)

    def _lost(self, visit: Visit, now: float) -> Missed | None:
        """Why a client that starts now will not arrive; None: it will."""
        stays = self.fleet.trace.stays(visit.client, now)
        if visit.seconds <= min(stays, self.deadline):
            return None
        return missing(visit, stays, self.deadline, now)

    def _opening(self, clients: Sequence[int], now: float) -> float:
        begin = self.fleet.trace.opens(clients, now)
        if begin == math.inf:
            raise RunError(
                f"no client that could start is available at {now:,.0f} s of virtual time or "
                "later: devices.trace leaves none"
            )
        return begin


def _order(flight: Flight) -> tuple[float, int]:
    return flight.ends, flight.client
