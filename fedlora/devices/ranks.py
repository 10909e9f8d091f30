"""Ranks by device: the largest that a client's memory and time allow (``ranks=by_device``).

    r_k = max { r in 1, 2, 4, ..., top: memory(r) <= share · memory_k, T_k(r) <= slack · deadline }

``memory`` is that of a step on as many tokens as the client's longest examples can have in one
forward pass. ``T_k`` is its time in a round, with the sequences of round 1 and plain factors of
rank ``r`` in both directions, for what a method sends depends on the ranks of all clients. A client
for which no rank is small enough never trains; it can be evaluated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fedlora.core.checks import at_least
from fedlora.core.types import LocalPlan, Module, Ranks
from fedlora.data.store import TokenStore
from fedlora.devices.table import Device
from fedlora.devices.time import Cost, Visit, drawn_lengths
from fedlora.population.ranks import RankDistribution, Tier, module_ranks


@dataclass(frozen=True)
class ByDevice(RankDistribution):
    """The ladder of ranks, and how much of a device it may take."""

    top: int = 32
    """The largest rank of the ladder 1, 2, 4, ..., top."""
    share: float = 0.5
    """Fraction of a device's memory that training may take."""
    slack: float = 1.0
    """Fraction of ``federation.deadline`` that a client's time may take."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("ranks.top", self.top, 1)
        for name in ("share", "slack"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"ranks.{name}={getattr(self, name)!r} must lie in (0, 1]")
        for f in fields(RankDistribution):
            if f.name not in ("alpha", "clamp") and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"ranks.{f.name}={getattr(self, f.name)!r} has no effect: under "
                    "ranks=by_device the devices decide; leave it out"
                )

    def resolve(self, modules: Sequence[Module], model_parameters: int) -> tuple[Tier, ...]:
        """The ladder, one tier ``r8`` for each rank that some module can hold, ascending. Fractions
        are equal and mean nothing: devices decide."""
        most = min(self.top, max(m.max_rank for m in modules)) if self.clamp else self.top
        steps = [2**i for i in range(int(math.log2(most)) + 1)]
        steps += [most] if steps[-1] < most else []
        tiers = tuple(Tier(f"r{r}", 1 / len(steps), r, r) for r in steps)
        for tier in tiers:
            module_ranks(tier, modules, clamp=self.clamp)
        return tiers


@dataclass(frozen=True)
class Demand:
    """What a client has to do in a round, whatever its rank."""

    tokens_at_once: int
    """Tokens of its largest forward pass, padding included."""
    lengths: NDArray[np.int64]
    """Tokens of each sequence of a round."""

    @classmethod
    def of(cls, store: TokenStore, plan: LocalPlan, seed: int, client: int) -> "Demand":
        """The demand of a client in round 1.

        Args:
            store: what clients hold.
            plan: of all clients.
            seed: of the run.
            client: id.
        """
        held = store.sizes(client, "train")[:, 0]
        rows = min(plan.micro_batch_size or plan.batch_size, len(held))
        longest = int(held.max()) if len(held) else 0
        lengths = drawn_lengths(store, plan, seed=seed, round=1, client=client)
        return cls(rows * longest, lengths)


def largest(
    demand: Demand,
    device: Device,
    cost: Cost,
    tiers: Mapping[str, Ranks],
    rule: ByDevice,
    *,
    deadline: float = math.inf,
    scalar_bytes: int = 4,
) -> str | None:
    """The name of a client's tier; None if not even the smallest fits.

    Args:
        demand: of the client.
        device: of the client.
        cost: of the model.
        tiers: name -> ranks, ascending.
        rule: limits.
        deadline: seconds of a round.
        scalar_bytes: bytes of a scalar on the wire.
    """
    found = None
    for name, ranks in tiers.items():
        if cost.memory(ranks, demand.tokens_at_once) > rule.share * device.memory:
            break
        sent = cost.adapter(ranks) * scalar_bytes
        visit = Visit(0, device, sent, sent, cost.work(ranks).of(demand.lengths))
        if visit.seconds > rule.slack * deadline:
            break
        found = name
    return found
