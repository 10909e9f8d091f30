"""Clients that are nodes of their own: where each is now, and what it is told.

In a simulation a node is a slot that serves any client. A silo is one client for the whole run; its
node can go and come back, with node authentication under the same id, without it under another.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.serverapp import Grid

FindSilos = Callable[[Grid, Sequence[int]], Mapping[int, int]]
"""Grid and ids of unknown nodes -> client id by node id, of those that are clients of the run."""


@dataclass
class Homes:
    """The nodes of a run's clients.

    Args:
        names: of the clients, by id.
        workers: what each is told about the run (`fedlora.silo.site.Assignment`), by client id.
        nodes: node ids by client id, as they are at first.
        find: finds clients among nodes that are not known.
        poll_s: seconds between two looks for replies.
    """

    names: Mapping[int, str]
    workers: Mapping[int, str]
    nodes: dict[int, int]
    find: FindSilos
    poll_s: float = 1.0
    _strangers: set[int] = field(default_factory=set)
    _online: frozenset[int] = frozenset()

    def refresh(self, grid: Grid) -> None:
        """Look which nodes are connected, and find clients that came back as other nodes."""
        self._online = frozenset(grid.get_node_ids())
        new = sorted(self._online - {*self.nodes.values()} - self._strangers)
        lost = self.away()
        if not (new and lost):
            return
        found = self.find(grid, new)
        self.nodes |= {client: node for node, client in found.items() if client in lost}
        self._strangers.update(node for node in new if node not in found)

    def away(self) -> dict[int, str]:
        """The clients that are not connected, with the reason why they are sent nothing."""
        return {
            client: f"silo {self.names[client]} is not connected"
            for client, node in self.nodes.items()
            if node not in self._online
        }


def wait_for_nodes(grid: Grid, count: int, patience_s: float, poll_s: float) -> list[int]:
    """The connected nodes, as soon as there are so many, or those that there are in the end.

    Args:
        grid: of Flower.
        count: of nodes.
        patience_s: seconds to wait for them.
        poll_s: seconds between two looks.
    """
    deadline = time.monotonic() + patience_s
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= count or time.monotonic() > deadline:
            return nodes
        time.sleep(poll_s)
