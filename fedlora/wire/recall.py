"""What a client on a machine of its own keeps there between rounds, so that the server need not.

    start     what it was sent last, which the next compressed start is a change of
    withheld  what rounding has kept back of its replies, for error feedback

A reply may be lost, refused or late after the client has kept something. So it keeps by round, and
each message says which round counts: that of its last reply that was accepted. A client that no
longer has that round's memory says so in place of a reply (`FORGOTTEN`); the server then takes it
for one that holds nothing, and its next start is whole.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.payload import Payload
from fedlora.core.recall import CompressedStart, Recall
from fedlora.core.types import EvaluateJob, TrainJob
from fedlora.wire.change import Named, restored
from fedlora.wire.codec import described, flatten, opened
from fedlora.wire.tensors import Format

FORGOTTEN = "Forgotten"
"""The kind of failure of a client that has lost what it kept."""


class Forgotten(RuntimeError):
    """A client no longer has what a message builds on."""


@dataclass(frozen=True)
class Held:
    """What a client keeps of one round; tensors by name, float32, on the CPU."""

    start: Named
    withheld: Named


HELD_NOTHING = Held({}, {})


class Memory(Protocol):
    """What a client keeps of one run, by round."""

    def held(self, round: int) -> Held:
        """What it kept in a round; nothing of round 0.

        Raises:
            Forgotten: if it no longer has it.
        """

    def keep(self, round: int, held: Held, since: int) -> None:
        """Keep this of a round. What is older than the round ``since`` may be forgotten."""

    def drawn(self, seed: int, name: str, *shape: int) -> Tensor:
        """A frozen tensor that follows from the run's seed."""


def digest(tensors: Named) -> str:
    """SHA-256 over names, shapes and float32 bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        found.update(f"{name}\0{tuple(t.shape)}\0".encode())
        found.update(np.ascontiguousarray(flatten({name: t}, "float32")).tobytes())
    return found.hexdigest()


def compressed(job: TrainJob | EvaluateJob) -> CompressedStart | None:
    """The start of a client that keeps itself what it was sent last; None: it travels whole."""
    recall = job.recall if isinstance(job, TrainJob) else None
    return None if recall is None else recall.start


def recalls_to_json(jobs: Iterable[TrainJob | EvaluateJob], down: Format) -> dict[str, Any]:
    """What clients are told of their own memories, by client id; the bytes of compressed starts
    travel beside it.

    Args:
        jobs: of a message.
        down: the format of compressed starts.
    """
    return {
        str(job.client.id): _to_json(job, job.recall, down)
        for job in jobs
        if isinstance(job, TrainJob) and job.recall is not None
    }


def _to_json(job: TrainJob, recall: Recall, down: Format) -> dict[str, Any]:
    found: dict[str, Any] = {"since": recall.since, "feedback": recall.feedback}
    if (told := recall.start) is None:
        return found
    start = described(job.start if job.sent is None else job.sent, down.kind)
    return found | {"start": start, "seeded": list(told.seeded), "digest": told.digest}


@dataclass(frozen=True)
class Recalls:
    """What a message says of its clients' memories, as a client reads it."""

    entries: Mapping[str, Any]
    """As `recalls_to_json` wrote them."""
    changes: Mapping[str, NDArray[np.uint8]]
    """The bytes of compressed starts, by client id."""
    down: Format
    """Their format."""
    memory: Memory | None
    """The memory of the client that reads the message; None: no entry asks for one."""

    def of(self, client: int, seed: int) -> "Remembered":
        """What a job builds on; nothing if its client is told of no memory.

        Args:
            client: its id.
            seed: of the run.

        Raises:
            Forgotten: if the memory that counts is gone, or is not what the server takes it for.
        """
        entry, memory = self.entries.get(str(client)), self.memory
        if entry is None or memory is None:
            return Remembered()
        since, feedback = entry["since"], entry["feedback"]
        held = memory.held(since)
        withheld = held.withheld if feedback else None
        if "start" not in entry:
            return Remembered(Recall(since, feedback), None, withheld)
        if digest(held.start) != entry["digest"]:
            raise Forgotten(
                f"what was kept in round {since} is not what the server has sent: the next start "
                "will be whole"
            )
        header, data = json.loads(entry["start"]), self.changes[str(client)]
        shapes = {str(name): tuple(shape) for name, *shape in header["tensors"]}
        known = {name: memory.drawn(seed, name, *shapes[name]) for name in entry["seeded"]}
        told = restored(self.down.decode(data, shapes), {**known, **held.start})
        start = CompressedStart(data, tuple(entry["seeded"]), entry["digest"])
        return Remembered(Recall(since, feedback, start), opened(header, told), withheld)


@dataclass(frozen=True)
class Remembered:
    """What a job builds on, of what its client keeps."""

    recall: Recall | None = None
    start: Payload | None = None
    """None: it travels whole."""
    withheld: Named | None = None
    """What rounding has withheld so far; None: no account is kept."""
