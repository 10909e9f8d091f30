"""A synchronous round in virtual time: whose results arrive, whose do not, and when it ends.

All of it follows from the clients' times (`fedlora.devices.time`) before anybody trains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.devices.time import Charge, Visit, charge

LATE, AWAY = "Late", "WentAway"
"""Why a result does not arrive: the round was over, or the client was no longer available."""


@dataclass(frozen=True)
class Missed:
    """A client that was asked and whose result does not arrive."""

    visit: Visit
    kind: str
    """`LATE` or `AWAY`."""
    after: float
    """Seconds from its start at which its part ends."""
    begin: float = 0.0
    """Virtual time of its start, in seconds."""

    @property
    def at(self) -> float:
        """Virtual time at which its part ends."""
        return self.begin + self.after

    @property
    def charge(self) -> Charge:
        """What it has spent until then."""
        return charge(self.visit, self.after, away=self.kind == AWAY)


@dataclass(frozen=True)
class Outcome:
    """A round that has been settled."""

    finished: tuple[Visit, ...]
    """Those whose results count, by client id."""
    missed: tuple[Missed, ...]
    """All others that were asked, by client id."""
    seconds: float
    """From the start until the server goes on."""


def settle(
    visits: Sequence[Visit],
    stays: Mapping[int, float],
    wanted: int,
    deadline: float = math.inf,
    begin: float = 0.0,
) -> Outcome:
    """The outcome of a synchronous round.

    A client can finish if it stays available for its whole time and that is not above the deadline.
    The first ``wanted`` of these, by (time, id), finish. The round ends with the last of them; if
    fewer than wanted can, at the deadline, or, without one, when the server has heard of all.

    Args:
        visits: the clients that are asked.
        stays: client id -> for how many seconds from the start it stays available.
        wanted: how many results are enough; of fewer clients asked, all.
        deadline: seconds from the start.
        begin: virtual time of the start.
    """
    able = [v for v in visits if v.seconds <= min(deadline, stays[v.client])]
    able.sort(key=lambda v: (v.seconds, v.client))
    wanted = min(wanted, len(visits))
    finished = able[:wanted]
    if len(finished) == wanted:
        end = finished[-1].seconds if finished else 0.0
    elif deadline < math.inf:
        end = deadline
    else:
        end = max(min(v.seconds, stays[v.client]) for v in visits)
    done = {v.client for v in finished}
    missed = [missing(v, stays[v.client], end, begin) for v in visits if v.client not in done]
    return Outcome(
        tuple(sorted(finished, key=lambda v: v.client)),
        tuple(sorted(missed, key=lambda m: m.visit.client)),
        end,
    )


def missing(visit: Visit, stays: float, end: float, begin: float = 0.0) -> Missed:
    """A client whose result does not arrive before the server gives up.

    Args:
        visit: its part.
        stays: for how many seconds it stays available.
        end: when the server gives up, in seconds from its start.
        begin: virtual time of its start.
    """
    if stays < visit.seconds and stays <= end:
        return Missed(visit, AWAY, stays, begin)
    return Missed(visit, LATE, end, begin)
