"""One instance of the protocol without messages: clients are members, the server is a function."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedlora.secagg.fixed import Codes
from fedlora.secagg.graph import Graph, graph_of, holders
from fedlora.secagg.protocol import Member, unmasked
from fedlora.secagg.stages import Stages, not_recovered, too_few


class Stopped(Exception):
    """The sum cannot be had."""


@dataclass
class Instance:
    """Clients 0..K-1 with these codes ``[K, D]``."""

    codes: Codes
    needed: int
    degree: int = 0
    name: str = "run|1|0"
    lost: Mapping[str, Collection[int]] = field(default_factory=dict)
    """Stage -> clients that do not answer it."""
    told: list[bytes] = field(default_factory=list)
    """All shares in the clear that the server has had, as ``<owner>|<kind>`` in `kinds`."""

    def __post_init__(self) -> None:
        self.members: dict[int, Member] = {}
        self.vectors: dict[int, Codes] = {}
        self.kinds: dict[int, set[str]] = {}

    def run(self) -> tuple[Codes, frozenset[int]]:
        """The sum, and the clients in it.

        Raises:
            Stopped: if too many are lost.
        """
        asked = frozenset(range(len(self.codes)))
        for i in asked:
            self.members[i] = Member.begin(i, self.name, self.needed)
        keys = {i: self.members[i].public for i in self._there(asked, "keys")}
        stages = self._checked(Stages(asked, frozenset(keys)), "keys")
        graph = graph_of(sorted(keys), self.degree, 0, 1, 0)
        boxes: dict[int, dict[int, bytes]] = {}
        for i in sorted(stages.keys):
            self.members[i], mine = self.members[i].shared({j: keys[j] for j in graph[i]})
            boxes[i] = mine
        shared = frozenset(self._there(stages.keys, "shares"))
        stages = self._checked(Stages(asked, stages.keys, shared), "shares")
        return self._sum(stages, graph, keys, boxes)

    def _sum(
        self,
        stages: Stages,
        graph: Graph,
        keys: Mapping[int, bytes],
        boxes: Mapping[int, Mapping[int, bytes]],
    ) -> tuple[Codes, frozenset[int]]:
        for i in sorted(self._enough(stages.shares, graph)):
            near = [j for j in graph[i] if j in stages.shares]
            member, vector = self.members[i].masked(self.codes[i], {j: boxes[j][i] for j in near})
            self.members[i], self.vectors[i] = member, vector
        there = frozenset(self._there(self.vectors, "vector"))
        stages = self._checked(Stages(*self._done(stages)[:3], there), "vector")
        told: dict[int, dict[int, bytes]] = {}
        for i in sorted(self._there(self._enough(stages.vector, graph), "unmask")):
            near = {i, *graph[i]}
            self.members[i], told[i] = self.members[i].revealed(
                sorted(near & stages.vector), sorted(near & stages.lost)
            )
            for j in told[i]:
                self.kinds.setdefault(j, set()).add("seed" if j in stages.vector else "key")
        stages = Stages(*self._done(stages)[:4], frozenset(told))
        if why := not_recovered(stages, graph, self.needed):
            raise Stopped(why)
        total = np.zeros(self.codes.shape[1], self.codes.dtype)
        for i in stages.vector:
            total += self.vectors[i]
        parts = sorted(stages.vector), sorted(stages.lost)
        found = unmasked(total, graph, keys, *parts, told, instance=self.name, needed=self.needed)
        return found, stages.vector

    def _there(self, clients: Collection[int], stage: str) -> list[int]:
        return [i for i in sorted(clients) if i not in self.lost.get(stage, ())]

    def _enough(self, clients: frozenset[int], graph: Graph) -> list[int]:
        return [i for i in clients if len(set(holders(graph, i)) & clients) >= self.needed]

    def _checked(self, stages: Stages, stage: str) -> Stages:
        if why := too_few(stages, stage, self.needed):
            raise Stopped(why)
        return stages

    @staticmethod
    def _done(stages: Stages) -> tuple[frozenset[int], ...]:
        return stages.asked, stages.keys, stages.shares, stages.vector, stages.unmask
