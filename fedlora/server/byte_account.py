"""The traffic of a round for real clients, independent of what the simulation itself sends."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedlora.algebra.init import sample_a
from fedlora.algebra.state import State
from fedlora.core.payload import plain_factors
from fedlora.core.types import Failure, TrainJob, Update
from fedlora.server.method import Method
from fedlora.wire.codec import WIRE_BYTES


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

    @classmethod
    def open(
        cls, method: Method, state: State, jobs: Sequence[TrainJob], wire: str
    ) -> "ByteAccount":
        """The account of a round that begins from a state."""
        drawn = {id(j.start): seeded_bytes(j, wire) for j in jobs}
        down = {j.client.id: method.bytes_down(state, j, wire) - drawn[id(j.start)] for j in jobs}
        return cls(method, state, {j.client.id: j for j in jobs}, down, wire)

    def up(self, result: Update | Failure) -> int:
        """The bytes that a client sent, accepted or not; 0 for a failed client."""
        if not isinstance(result, Update):
            return 0
        plan = self.jobs[result.client.id].plan
        sent = self.method.bytes_up(self.state, result, plan, self.wire)
        return sent + _exchanged(result, "exchanged_up")

    def down(self, result: Update | Failure) -> int:
        """The bytes that a client received: its start and, in a split round, all later messages."""
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


def seeded_bytes(job: TrainJob, wire: str) -> int:
    """The bytes of a start's frozen factors ``A`` that a client draws itself.

    A factor that the plan does not train and that is, bit for bit, the initial one of the run's
    seed has never changed. Factors that have, by another rule of averaging or a singular value
    decomposition, must be sent.
    """
    factors = None if job.plan.train_a else plain_factors(job.start)
    scalars = sum(
        f.a.numel()
        for path, f in (factors or {}).items()
        if torch.equal(f.a, sample_a(job.seed, path, *f.a.shape))
    )
    return scalars * WIRE_BYTES[wire]


def _exchanged(result: Update, name: str) -> int:
    """Bytes of a split round's other messages; 0 if a rejected client claims what is no finite
    number >= 0."""
    value: object = result.metrics.get(name, 0.0)
    known = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return int(value) if known else 0  # type: ignore[call-overload]
