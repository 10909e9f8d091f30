"""Who shares masks and secrets with whom.

All clients of a round, or each with those that follow and precede it on a ring of random order
(Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020).
"""

from collections.abc import Collection, Mapping, Sequence

from fedlora.core.seeding import generator

Graph = Mapping[int, tuple[int, ...]]
"""Client id -> ids of its neighbours, in order; symmetric."""


def graph_of(clients: Sequence[int], degree: int, seed: int, round: int, exchange: int) -> Graph:
    """The neighbours of each client.

    Args:
        clients: ids.
        degree: of each, even; 0, or all others: complete.
        seed: of the run.
        round: counted from 1.
        exchange: of the round, counted from 0.
    """
    ids = sorted(clients)
    if not degree or degree >= len(ids) - 1:
        return {i: tuple(j for j in ids if j != i) for i in ids}
    ring = generator(seed, "secagg graph", round, exchange).permutation(len(ids)).tolist()
    found: dict[int, set[int]] = {i: set() for i in ids}
    for k, place in enumerate(ring):
        for step in range(1, degree // 2 + 1):
            one, other = ids[place], ids[ring[(k + step) % len(ring)]]
            found[one].add(other)
            found[other].add(one)
    return {i: tuple(sorted(found[i])) for i in ids}


def holders(graph: Graph, owner: int) -> list[int]:
    """Those who hold a share of a client's secrets, itself among them, in order: the first has the
    number 1."""
    return sorted((owner, *graph[owner]))


def unrecoverable(
    graph: Graph, owners: Collection[int], answered: Collection[int], needed: int
) -> int | None:
    """The first client whose secret too few shares came for; None: there is none.

    Args:
        graph: of the instance.
        owners: whose secrets are needed.
        answered: the clients that sent shares.
        needed: shares that recover a secret.
    """
    there = set(answered)
    short = (j for j in sorted(owners) if len(there & set(holders(graph, j))) < needed)
    return next(short, None)
