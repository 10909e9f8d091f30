"""Whether a client that was only sent what it missed holds the same state as the server."""

import logging
from collections.abc import Callable, Mapping

from fedlora.algebra.state import State
from fedlora.techniques.switchlora.replica import Replica, news

log = logging.getLogger(__name__)


class ReplicaAudit:
    """Keeps one replica up to date as a client's would be, and compares it with the server's state.

    The replica is no part of the server's state: a resumed run begins it again from the seed.

    Args:
        load: reads the replica that a server's state holds.
        every: rounds between two comparisons, at least 1.
    """

    def __init__(self, load: Callable[[State], Replica], every: int) -> None:
        self._load, self._every = load, every
        self.replica: Replica | None = None
        """The client's copy as of the last comparison; None: before the first."""

    def __call__(self, state: State) -> Mapping[str, float | int | str]:
        """Whether the two differ (1) or not (0), in every ``every``-th round; else an empty result.

        A replica that differs is replaced by the server's.
        """
        if int(state["round"]) % self._every:
            return {}
        server = self._load(state)
        replica = self._current(server)
        replica = replica.take(news(state, replica.round))
        same = replica.digest() == server.digest()
        if not same:
            log.warning(
                "round %d: a client that installed every round's result is not bitwise identical "
                "to the server; it was sent the whole state",
                server.round,
            )
        self.replica = replica if same else server
        return {"switch/replica_differs": int(not same)}

    def _current(self, server: Replica) -> Replica:
        """The copy of the last comparison, or a new one where there is none or it is ahead."""
        if self.replica is not None and self.replica.round <= server.round:
            return self.replica
        layers = server.layers
        shapes = {path: (len(x.b), x.a.shape[1]) for path, x in layers.items()}
        ranks = {path: x.rank for path, x in layers.items()}
        any_layer = next(iter(layers.values()))
        return Replica.begin(shapes, ranks, any_layer.scale * any_layer.rank, server.timetable)
