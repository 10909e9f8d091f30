"""Splits a round's jobs into messages of equal work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedlora.population.sampling import deal

J = TypeVar("J")

MOST_PER_MESSAGE = 256
"""Clients in one message, unless asked otherwise. A worker and the server hold a whole reply in
memory (half a MiB per client in the default run, tens of MiB for larger models), progress is shown
per reply, and a process that dies loses a whole message. A large population in one round would
otherwise make messages too large for all three."""


@dataclass(frozen=True)
class Packing:
    """Decides into how many messages a round's jobs are split."""

    workers: int
    """Processes that work at once, as far as the server knows."""
    messages_per_worker: int = 4
    """Messages into which a worker's part of a round is split; the engine's preference."""
    clients_per_message: int = 0
    """Most clients in one message; 0: the engine's preference, up to `MOST_PER_MESSAGE`."""

    @property
    def most(self) -> int:
        """Clients that one message may hold."""
        return self.clients_per_message or MOST_PER_MESSAGE

    def count(self, jobs: int) -> int:
        """The number of messages for this number of jobs."""
        needed = -(-jobs // self.most)
        if self.clients_per_message:
            return needed
        return max(needed, min(jobs, self.messages_per_worker * self.workers))

    def training(self, jobs: Sequence[J], weights: Sequence[float]) -> list[list[J]]:
        """Training jobs by message, split by the work that each will probably need."""
        hands = deal(weights, self.count(len(jobs)), self.most)
        return [[jobs[i] for i in hand] for hand in hands]

    def evaluation(self, jobs: Sequence[J], weights: Sequence[float]) -> list[list[J]]:
        """Evaluation jobs by message. Fewer messages than in training: the full adapter can be as
        large as the model, and a reply holds only a few scalars per client."""
        hands = deal(weights, min(2 * self.workers, self.count(len(jobs))))
        return [[jobs[i] for i in hand] for hand in hands]
