"""The devices of a run: its virtual clock, and the ranks that they allow."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import ConfigError
from fedlora.core.types import LocalPlan, TrainJob
from fedlora.data.store import TokenStore
from fedlora.devices.ranks import ByDevice, Demand, largest
from fedlora.devices.table import Devices, Fleet
from fedlora.devices.time import Cost, drawn_lengths
from fedlora.models.modules import ModelInfo
from fedlora.models.spec import ModelSpec
from fedlora.population.ranks import RankDistribution, module_ranks
from fedlora.population.sampling import Population, members
from fedlora.server.buffered import Buffered, BufferedTime
from fedlora.server.schedule import Rounds
from fedlora.server.virtual_time import VirtualTime
from fedlora.split.whole import WholeModel
from fedlora.wire.codec import WIRE_BYTES


class Asked(Protocol):
    """The groups that are looked at (`simulations.app.parts.Parts`)."""

    @property
    def seed(self) -> int: ...
    @property
    def devices(self) -> Devices | None: ...
    @property
    def client(self) -> LocalPlan: ...
    @property
    def ranks(self) -> RankDistribution: ...
    @property
    def population(self) -> Population: ...
    @property
    def federation(self) -> Rounds: ...
    @property
    def buffered(self) -> Buffered | None: ...


@dataclass(frozen=True)
class Timed:
    """Clients with devices."""

    clock: VirtualTime
    files: str
    """Identity of the files that describe them; empty: they are drawn."""
    assigned: list[str | None] | None
    """Tier by client id, where devices decide on ranks; None: they do not."""


def timed_clients(
    parts: Asked, model: ModelSpec, info: ModelInfo, store: TokenStore, emit: Callable[[str], None]
) -> Timed | None:
    """The devices of the clients, stated in one line; None: they have none.

    Raises:
        ConfigError: for a file that makes no sense, a model that no formula covers, or devices none
            of which can train.
    """
    if parts.devices is None:
        return None
    count = len(members(parts.population, store.clients))
    fleet = parts.devices.fleet(count, parts.population.drawn_by(parts.seed))
    emit(f"devices: {fleet.text}")
    cost = cost_of(model, info, parts.client.dropout > 0)
    ranks, assigned = parts.ranks, None
    if isinstance(ranks, ByDevice):
        assigned = ranks_by_device(parts, ranks, fleet, cost, info, store)
        found = Counter(name or "none" for name in assigned)
        emit("ranks by device: " + ", ".join(f"{n:,} clients {t}" for t, n in found.most_common()))
        if not any(assigned):
            raise ConfigError(
                f"ranks=by_device: none of the {count} devices has memory and time for rank 1; "
                "raise ranks.share, ranks.slack or federation.deadline, or lower client.batch_size"
            )

    def lengths(job: TrainJob) -> NDArray[np.int64]:
        where = {"seed": job.seed, "round": job.round, "client": job.client.id}
        return drawn_lengths(store, job.plan, **where)

    rounds = parts.federation
    given = (fleet, cost, lengths, rounds.over, rounds.deadline)
    clock = BufferedTime(*given, parts.buffered) if parts.buffered else VirtualTime(*given)
    return Timed(clock, parts.devices.fingerprint(), assigned)


def cost_of(model: ModelSpec, info: ModelInfo, dropout: bool) -> WholeModel:
    """What the base model costs a client, by formula.

    Raises:
        ConfigError: if none covers it.
    """
    base_bytes = 2 if model.dtype == "bfloat16" else 4
    try:
        return WholeModel(
            model.skeleton(),
            info.blocks,
            head=not info.classifies,
            dropout=dropout,
            base_bytes=base_bytes,
        )
    except ValueError as error:
        raise ConfigError(
            f"devices: the time of {info.name} is not known by formula ({error}); use devices=none"
        ) from error


def ranks_by_device(
    parts: Asked, rule: ByDevice, fleet: Fleet, cost: Cost, info: ModelInfo, store: TokenStore
) -> list[str | None]:
    """The tier of each client, by id; None: its device cannot train."""
    tiers = rule.resolve(info.modules, info.parameters)
    ladder = {t.name: module_ranks(t, info.modules, clamp=rule.clamp) for t in tiers}
    return [
        largest(
            Demand.of(store, parts.client, parts.seed, client),
            device,
            cost,
            ladder,
            rule,
            deadline=parts.federation.deadline,
            scalar_bytes=WIRE_BYTES[parts.federation.wire],
        )
        for client, device in enumerate(fleet.devices)
    ]
