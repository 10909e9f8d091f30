"""Who did what in one instance of the protocol, and whether its sum can be had."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from fedlora.secagg.config import KEYS, SHARES, STAGES, UNMASK, VECTOR
from fedlora.secagg.graph import Graph, holders, unrecoverable


@dataclass(frozen=True)
class Stages:
    """Clients by the last stage that they have done. Each set holds the next one."""

    asked: frozenset[int]
    keys: frozenset[int] = frozenset()
    """Sent keys."""
    shares: frozenset[int] = frozenset()
    """Sent shares."""
    vector: frozenset[int] = frozenset()
    """Sent vectors: those whose sum it is."""
    unmask: frozenset[int] = frozenset()
    """Sent shares of others."""

    @property
    def lost(self) -> frozenset[int]:
        """Those in whose place masks have to be taken out."""
        return self.shares - self.vector

    def lost_in(self, client: int) -> str:
        """The stage before the sum in which a client was lost; empty: it is in the sum."""
        sets = zip((KEYS, SHARES, VECTOR), (self.keys, self.shares, self.vector), strict=True)
        return next((stage for stage, there in sets if client not in there), "")

    def owners(self, graph: Graph) -> list[int]:
        """The clients of which a secret is needed: all in the sum, and the lost that have masks
        with them."""
        return sorted(self.vector | {j for j in self.lost if self.vector & set(graph[j])})


def too_few(stages: Stages, stage: str, needed: int) -> str:
    """Why an instance cannot go on after a stage; empty: it can.

    Args:
        stages: as far as they are known.
        stage: just done.
        needed: ``t``.
    """
    there = getattr(stages, stage)
    if len(there) >= needed:
        return ""
    return (
        f"secure aggregation needs {needed} of {len(stages.asked)} clients, and {len(there)} are "
        f"left after stage {stage} (secagg.threshold)"
    )


def not_recovered(stages: Stages, graph: Graph, needed: int) -> str:
    """Why the sum cannot be unmasked; empty: it can."""
    owner = unrecoverable(graph, stages.owners(graph), stages.unmask, needed)
    if owner is None:
        return ""
    there = len(set(holders(graph, owner)) & stages.unmask)
    return (
        f"secure aggregation cannot unmask its sum: {there} of those who hold shares of client "
        f"{owner}'s secret answered stage {UNMASK}, {needed} are needed (secagg.threshold)"
    )


def simulated_stages(
    asked: Collection[int],
    trained: Collection[int],
    graph_of: Callable[[Collection[int]], Graph],
    lost: Callable[[int, str], bool],
    needed: int,
) -> tuple[Stages, Graph, str]:
    """The stages of an instance whose clients are lost as planned, and why it fails, if it does.

    A client does not go on if too few of those who hold its shares are left, as in the protocol.

    Args:
        asked: clients of the instance.
        trained: those that have an update.
        graph_of: the graph over those that have sent keys.
        lost: whether a client is lost in a stage on purpose.
        needed: ``t``.
    """
    sets = dict.fromkeys(STAGES, frozenset[int]())
    now = frozenset(asked)
    graph: Graph = {}
    found = Stages(now)
    for stage in STAGES:
        before, here = now, set(now)
        if stage != KEYS:
            here = {i for i in here if len(set(holders(graph, i)) & before) >= needed}
        if stage == VECTOR:
            here &= set(trained)
        now = frozenset(i for i in here if not lost(i, stage))
        sets[stage] = now
        if stage == KEYS:
            graph = graph_of(now)
        found = Stages(frozenset(asked), *(sets[s] for s in STAGES))
        if stage != UNMASK and (why := too_few(found, stage, needed)):
            return found, graph, why
    return found, graph, not_recovered(found, graph, needed)
