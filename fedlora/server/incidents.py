"""Messages that ended or blocked their worker process, and what follows for their clients.

A worker that a client ends (a segmentation fault, ``os._exit``) takes all clients of its message
with it, and cannot say which one it was. So

1. the first death in a phase of a round costs a restart from the checkpoint, and nothing else;
2. after the second, the clients of the lost messages are sent one to a message in that phase;
3. a client that ends its worker alone is left out of that phase from this round on.

A message that exceeds its deadline costs its clients that phase of the round at once; in later
rounds they are sent one to a message, and one that exceeds it alone is left out.

The record is a file of the run folder, so a continued run makes the same decisions.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora.core.checks import one_of
from fedlora.core.errors import ClientsSuspected, RunError, WorkerDied
from fedlora.core.files import write_file

FILE = "incidents.json"
DIED, DEADLINE = "died", "deadline"
TRAIN, EVALUATE = "train", "evaluate"
SECOND = 2
"""The death in a phase of a round after which clients are sent one to a message."""
HOPELESS = 6
"""Incidents of a kind in a phase of a round, without a reply to any message, after which the run
stops: workers fail whatever they are sent."""


@dataclass(frozen=True)
class Incident:
    """A message without a reply."""

    round: int
    phase: str
    """`TRAIN` or `EVALUATE`."""
    kind: str
    """`DIED` or `DEADLINE`."""
    clients: tuple[int, ...]
    """The clients of the message, or of all messages that were lost together."""
    alone: bool = False
    """Whether the message was sent alone and had a single client: then it is that client's."""
    answered: bool = False
    """Whether another message of the phase had been answered before."""

    def __post_init__(self) -> None:
        one_of("phase", self.phase, (TRAIN, EVALUATE))
        one_of("kind", self.kind, (DIED, DEADLINE))
        for name, kind in (("round", int), ("alone", bool), ("answered", bool)):
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name}={getattr(self, name)!r} is not of type {kind.__name__}")
        if not all(type(c) is int for c in self.clients):
            raise ValueError(f"clients={self.clients!r} are not all client ids")

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> "Incident":
        """The inverse of `dataclasses.asdict`."""
        return Incident(**{**row, "clients": tuple(row["clients"])})


class Incidents:
    """The incidents of a run.

    Args:
        folder: the run folder.

    Raises:
        RunError: if the file is there and cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._all: list[Incident] = []
        if not self._file.exists():
            return
        try:
            rows = json.loads(self._file.read_text(encoding="utf-8"))
            if not isinstance(rows, list):
                raise ValueError("it holds no list")
            self._all = [Incident.from_json(row) for row in rows]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{self._file} cannot be read ({type(error).__name__}: {error}); it says which "
                "clients ended their worker process. Delete it to let all clients take part again"
            ) from error

    def add(self, incident: Incident) -> None:
        """Record an incident, on disk before this returns."""
        self._all.append(incident)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._file, json.dumps([asdict(i) for i in self._all], indent=1) + "\n")

    def one_by_one(self, phase: str, round: int) -> frozenset[int]:
        """The clients that are sent one to a message in this phase of this round."""
        deaths = self._of(phase, round, DIED)
        lost = [i.clients for i in deaths] if len(deaths) >= SECOND else []
        lost += [
            i.clients
            for i in self._all
            if (i.phase, i.kind) == (phase, DEADLINE) and i.round < round
        ]
        return frozenset(c for clients in lost for c in clients)

    def left_out(self, phase: str, round: int) -> dict[int, str]:
        """The clients that are not sent anything in this phase of this round, with the reason."""
        found: dict[int, str] = {}
        for i in self._all:
            what = "ended its worker process" if i.kind == DIED else "exceeded its deadline"
            if i.phase != phase or i.round > round:
                continue
            if i.alone:
                reason = f"it {what} in round {i.round}, alone in its message; it is left out"
                found |= dict.fromkeys(i.clients, reason)
            elif i.kind == DEADLINE and i.round == round:
                found |= dict.fromkeys(i.clients, f"its message {what}")
        return found

    def died(self, incident: Incident, safe: str) -> RunError:
        """Record a death; the error with which the run ends, for the launcher to go on from.

        Args:
            incident: of kind `DIED`.
            safe: what of the run is on disk, for the message.
        """
        self.add(incident)
        who = named(incident.clients)
        where = f"round {incident.round}, {incident.phase}"
        deaths = self._of(incident.phase, incident.round, DIED)
        if _hopeless(deaths):
            return RunError(
                f"{where}: worker processes ended {len(deaths)} times and answered no message, "
                f"whichever client they were sent. {safe}"
            )
        if incident.alone:
            return ClientsSuspected(
                f"{where}: client {who} ended its worker process, alone in its message, and is "
                f"left out from now on. {safe}; the same command with resume=auto continues"
            )
        if len(deaths) >= SECOND:
            return ClientsSuspected(
                f"{where}: a worker process ended again ({len(deaths)} times); clients {who} are "
                f"sent one to a message next. {safe}; the same command with resume=auto continues"
            )
        return WorkerDied(
            f"{where}: a worker process ended while it had clients {who}, and Flower does not "
            f"replace it. {safe}; the same command with resume=auto continues"
        )

    def blocked(self, phase: str, round: int, safe: str) -> RunError:
        """The error of a run all of whose workers exceeded a deadline; see `died`."""
        late = self._of(phase, round, DEADLINE)
        if _hopeless(late):
            return RunError(
                f"round {round}, {phase}: {len(late)} messages exceeded their deadline "
                f"(federation.timeout_s) and none was answered. {safe}"
            )
        return ClientsSuspected(
            f"round {round}, {phase}: no worker process is left that answers. {safe}; the same "
            "command with resume=auto continues without the clients that block them"
        )

    def _of(self, phase: str, round: int, kind: str) -> list[Incident]:
        return [i for i in self._all if (i.phase, i.round, i.kind) == (phase, round, kind)]


def _hopeless(incidents: Sequence[Incident]) -> bool:
    return len(incidents) >= HOPELESS and not any(i.answered for i in incidents)


def named(clients: Iterable[int], most: int = 8) -> str:
    """Client ids in words, not too many."""
    ids = sorted(clients)
    rest = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(map(str, ids[:most])) + rest
