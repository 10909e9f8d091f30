"""The time and energy of one client's part of a round, by formula.

    T = latency + down / β↓ + Σ t (a + b t) / F + latency + up / β↑          seconds

``down`` and ``up`` are the bytes that are counted for it, ``β`` its bandwidths, ``F`` the
operations per second that it sustains. A sequence of ``t`` tokens takes ``t (a + b t)`` operations:
``a`` for linear layers, adapters and output embedding, ``b t`` for attention
(`fedlora.split.cost`). The sequences are those that the client will draw, a function of (seed,
round, client), so that the time is known before it trains. Padding is no work: what a real client
computes are its tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora.core.types import LocalPlan, Ranks
from fedlora.data.batches import step_indices, subset
from fedlora.data.store import TokenStore
from fedlora.devices.table import Device


class Work(NamedTuple):
    """Operations of one token of a sequence of length ``t``: ``a + b t``, forward and backward."""

    a: float
    b: float

    def of(self, lengths: NDArray[np.int64]) -> float:
        """Operations of whole sequences, given their lengths."""
        t = lengths.astype(np.float64)
        return float(self.a * t.sum() + self.b * (t * t).sum())


class Cost(Protocol):
    """What training costs a client, by its ranks (`fedlora.split.whole.WholeModel`)."""

    def work(self, ranks: Ranks) -> Work:
        """Operations of one token."""

    def memory(self, ranks: Ranks, tokens: int) -> float:
        """Bytes during a step of so many tokens."""

    def adapter(self, ranks: Ranks) -> int:
        """Scalars of the adapters."""


@dataclass(frozen=True)
class Visit:
    """One client's part of a round, all of it known before it begins."""

    client: int
    device: Device
    bytes_down: int
    bytes_up: int
    operations: float

    @property
    def down(self) -> float:
        """Seconds until it has received its start."""
        return self.device.latency + self.bytes_down / self.device.down

    @property
    def compute(self) -> float:
        """Seconds in which it trains."""
        return self.operations / self.device.flops

    @property
    def up(self) -> float:
        """Seconds until the server has received its result."""
        return self.device.latency + self.bytes_up / self.device.up

    @property
    def seconds(self) -> float:
        """``T``, from the start of the round."""
        return self.down + self.compute + self.up


class Charge(NamedTuple):
    """What a client has spent."""

    bytes_down: int = 0
    bytes_up: int = 0
    compute: float = 0.0
    """Seconds."""
    transfer: float = 0.0
    """Seconds, latencies included."""
    energy: float = 0.0
    """Joules: ``watts · compute + radio_watts · transfer``."""


def charge(visit: Visit, after: float | None = None, *, away: bool = False) -> Charge:
    """What a client has spent when its part of a round ends.

    Seconds and energy end with it. A message that has begun when the server gives up is on its way
    and counts whole; of one that ends because the client goes away, the bytes that have passed.

    Args:
        visit: the client's part.
        after: seconds after which it ends; None: it is completed.
        away: whether it ends because the client goes away.
    """
    d = visit.device
    end = visit.seconds if after is None else after
    down = min(end, visit.down)
    compute = min(max(0.0, end - visit.down), visit.compute)
    computed = after is None or end >= visit.down + visit.compute
    up = min(max(0.0, end - visit.down - visit.compute), visit.up)
    sent_down = _passed(visit.bytes_down, d.down, down - d.latency) if away else visit.bytes_down
    sent_up = _passed(visit.bytes_up, d.up, up - d.latency) if away else visit.bytes_up
    energy = d.watts * compute + d.radio_watts * (down + up)
    return Charge(sent_down, sent_up if computed else 0, compute, down + up, energy)


def _passed(size: int, rate: float, seconds: float) -> int:
    """Bytes of a message that have passed after so many seconds of it."""
    return min(size, int(max(0.0, seconds) * rate))


def drawn_lengths(
    store: TokenStore, plan: LocalPlan, *, seed: int, round: int, client: int
) -> NDArray[np.int64]:
    """``[sequences]``: the tokens of each sequence that a client trains on in a round, repetitions
    included: those that enter the model, which are all but the last of a text that is continued.

    Args:
        store: what clients hold.
        plan: of the client.
        seed: of the run.
        round: counted from 1.
        client: id.
    """
    usable = store.supervised(client, "train", plan.loss) > 0
    held = store.sizes(client, "train")[usable, 0]
    chosen = subset(len(held), plan.max_examples, seed, "subset", round, client)
    lengths = held[chosen]
    if not len(lengths):
        return np.zeros(0, dtype=np.int64)
    steps = step_indices(
        len(lengths), plan, seed=seed, round=round, client=client, lengths=lengths.tolist()
    )
    inputs = lengths if store.labels else np.maximum(1, lengths - 1)
    return np.asarray(inputs[np.concatenate(list(steps))], dtype=np.int64)
