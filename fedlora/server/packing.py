"""Jobs into messages of even work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedlora.population.sampling import deal

J = TypeVar("J")

MOST_PER_MESSAGE = 256
"""Clients in one message, unless asked otherwise. A worker and the server hold a reply in memory
whole (half a MiB per client of the default run, tens for larger models), progress is seen by
replies alone, and a process that dies loses a whole message: with all clients of a large population
in one round, a worker's part of the round would be too much of all three."""


@dataclass(frozen=True)
class Packing:
    """How many messages a round's jobs are cut into."""

    workers: int
    """Processes that work at once, as far as the server knows."""
    messages_per_worker: int = 4
    """Into how many messages a worker's part of a round is cut: as the engine likes it."""
    clients_per_message: int = 0
    """Most clients in one message; 0: as many as the engine likes, up to `MOST_PER_MESSAGE`."""

    @property
    def most(self) -> int:
        """Clients that one message may hold."""
        return self.clients_per_message or MOST_PER_MESSAGE

    def count(self, jobs: int) -> int:
        """Into how many messages so many jobs go."""
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
        large as the model, and what comes back are a few numbers per client."""
        hands = deal(weights, min(2 * self.workers, self.count(len(jobs))))
        return [[jobs[i] for i in hand] for hand in hands]
