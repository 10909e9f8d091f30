"""Populations of clients that can all train."""

from fedlora.core.types import Client, Ranks
from fedlora.population.sampling import Roster
from tests.fedlora.population.test_workload import Held


def roster(trainable: int = 12, per_round: int = 4, apart: int = 0) -> Roster:
    """Clients of whom the last ``apart`` never train."""
    n = trainable + apart
    clients = tuple(Client(i, Ranks({"q_proj": 2}), 5) for i in range(n))
    ids = tuple(range(trainable))
    return Roster(clients, ids, {"seen": ids}, per_round, tuple(Held(5, 50) for _ in clients), 3)
