"""Bytes of a secure sum by stage, without headers.

    stage     k sends                 k is sent
    keys      64                      -
    shares    48 d                    64 d
    vector    D b / 8                 its job, 48 d', the bases of a second exchange
    unmask    16 (d' + 1)             8 (d' + 1)

``d`` are the neighbours that sent keys, ``d'`` those of them that finished stage 2.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedlora.secagg.config import KEYS, SHARES, STAGES, UNMASK, VECTOR
from fedlora.secagg.graph import Graph
from fedlora.secagg.stages import Stages

SECRET, SHARE, KEY, TAG = 16, 16, 32, 16
"""Bytes of a secret, of a share of one, of a key, and of what sealing adds."""
PUBLIC = 2 * KEY
"""Bytes of a client's public keys: that of masks, that of the channel for shares."""
BOX = 2 * SHARE + TAG
"""Bytes of a sealed pair of shares."""
ID = 8
"""Bytes of a client's id in a list."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client by stage."""

    up: Mapping[str, int]
    down: Mapping[str, int]


def traffic(
    stages: Stages, graph: Graph, client: int, *, vector: int, job: int, bases: int = 0
) -> Traffic:
    """The bytes of one client in one instance; what it was sent and did not answer counts too.

    Args:
        stages: of the instance.
        graph: over those that sent keys.
        client: its id.
        vector: bytes of its vector.
        job: bytes of what it is sent to train, and of the state that its summand is made with.
        bases: bytes of the bases that a second exchange begins with.
    """
    up, down = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0)
    near = graph.get(client, ())
    there = len(set(near) & stages.shares)
    if client in stages.keys:
        up[KEYS], down[SHARES] = PUBLIC, PUBLIC * len(near)
    if client in stages.shares:
        up[SHARES], down[VECTOR] = BOX * len(near), BOX * there + job + bases
    if client in stages.vector:
        up[VECTOR], down[UNMASK] = vector, ID * (there + 1)
    if client in stages.unmask:
        up[UNMASK] = SHARE * (there + 1)
    return Traffic(up, down)


def summed(found: Collection[Traffic]) -> Traffic:
    """The traffic of several clients, or of several instances, together."""
    return Traffic(
        {s: sum(t.up[s] for t in found) for s in STAGES},
        {s: sum(t.down[s] for t in found) for s in STAGES},
    )
