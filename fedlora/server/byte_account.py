"""The traffic of a round for real clients, independent of what the simulation itself sends."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedlora.algebra.state import State
from fedlora.core.types import Failure, TrainJob, Update
from fedlora.secagg.cost import Traffic
from fedlora.server.method import Method


@dataclass(frozen=True)
class ByteAccount:
    """Bytes of one round, by client."""

    method: Method
    state: State
    """From which the round began."""
    jobs: Mapping[int, TrainJob]
    starts: Mapping[int, int]
    """Client id -> bytes that it receives before it trains."""
    wire: str
    """Number format of payloads."""
    charged: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Client id -> bytes down and up of clients that were asked and did not train
    (`fedlora.server.virtual_time`)."""
    sums: Mapping[int, Traffic] | None = None
    """Client id -> the bytes of its secure sum, which are all that it sends and receives; None:
    updates are sent."""

    @classmethod
    def open(
        cls,
        method: Method,
        state: State,
        jobs: Sequence[TrainJob],
        wire: str,
        down: Mapping[int, int] | None = None,
    ) -> "ByteAccount":
        """The account of a round that begins from a state.

        Args:
            method: counts what is sent as values.
            state: of the round's start.
            jobs: of the round.
            wire: number format.
            down: client id -> bytes of its compressed start; None: starts are values.
        """
        if down is None:
            down = {j.client.id: method.bytes_down(state, j, wire) for j in jobs}
        return cls(method, state, {j.client.id: j for j in jobs}, down, wire)

    def up(self, result: Update | Failure) -> int:
        """The bytes that a client sent, accepted or not; 0 for a failed client."""
        if result.client.id in self.charged:
            return self.charged[result.client.id][1]
        if self.sums is not None:
            return _whole(self.sums, result.client.id, lambda t: t.up)
        if not isinstance(result, Update):
            return 0
        plan = self.jobs[result.client.id].plan
        if result.sent_bytes:
            return result.sent_bytes + result.payload.index_bytes()
        sent = self.method.bytes_up(self.state, result, plan, self.wire)
        return sent + _exchanged(result, "exchanged_up")

    def down(self, result: Update | Failure) -> int:
        """The bytes that a client received: its start and, in a split round, all later messages."""
        if result.client.id in self.charged:
            return self.charged[result.client.id][0]
        if self.sums is not None:
            return _whole(self.sums, result.client.id, lambda t: t.down)
        start = self.starts[result.client.id]
        if not isinstance(result, Update):
            return start
        return start + _exchanged(result, "exchanged_down")

    def record(self, replies: Mapping[int, Update | Failure]) -> dict[str, int]:
        """The round's sums.

        Args:
            replies: by client id, one for each job.
        """
        return {
            "wire/up_bytes": sum(self.up(r) for r in replies.values()),
            "wire/down_bytes": sum(self.down(r) for r in replies.values()),
        }


def _whole(
    sums: Mapping[int, Traffic], client: int, side: Callable[[Traffic], Mapping[str, int]]
) -> int:
    """The bytes of all stages; 0 for a client that was not asked."""
    return sum(side(sums[client]).values()) if client in sums else 0


def _exchanged(result: Update, name: str) -> int:
    """Bytes of a split round's other messages; 0 if a rejected client claims what is no finite
    number >= 0."""
    value: object = result.metrics.get(name, 0.0)
    known = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return int(value) if known else 0  # type: ignore[call-overload]
