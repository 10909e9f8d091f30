"""What cannot be timed on devices or buffered, refused before anything is loaded."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

from fedlora.core.errors import ConfigError
from fedlora.devices.ranks import ByDevice
from fedlora.devices.table import Devices
from fedlora.population.ranks import RankDistribution
from fedlora.server.buffered import Buffered
from fedlora.server.method import Method
from fedlora.server.schedule import BUFFERED, Rounds
from fedlora.wire.tensors import Compression
from simulations.app.refusals import refuse
from simulations.app.silo_runtime import SiloRuntime


class Asked(Protocol):
    """The groups that are looked at (`simulations.app.parts.Parts`)."""

    @property
    def strategy(self) -> Method: ...
    @property
    def devices(self) -> Devices | None: ...
    @property
    def ranks(self) -> RankDistribution: ...
    @property
    def federation(self) -> Rounds: ...
    @property
    def runtime(self) -> object: ...
    @property
    def compression(self) -> Compression: ...
    @property
    def buffered(self) -> Buffered | None: ...
    @property
    def resolved(self) -> dict[str, Any]: ...


def check_devices(parts: Asked) -> None:
    """Refuse combinations whose time would not be known, or which would have no effect.

    Raises:
        ConfigError: one sentence that says why and what to use instead.
    """
    try:
        buffered = parts.buffered
    except ValueError as error:
        raise ConfigError(str(error)) from error
    refuse(_without_devices(parts) if parts.devices is None else _with_devices(parts))
    if buffered:
        refuse(_buffered(parts))


def _without_devices(parts: Asked) -> Iterator[tuple[bool, str]]:
    """Conditions with the sentences that refuse them."""
    rounds = parts.federation
    asked = {
        f"federation.over={rounds.over}": rounds.over != 1,
        f"federation.deadline={rounds.deadline}": rounds.deadline < math.inf,
        "ranks=by_device": isinstance(parts.ranks, ByDevice),
        "federation.mode=buffered": rounds.mode == BUFFERED,
    }
    silos = isinstance(parts.runtime, SiloRuntime)
    instead = "runtime=silos has none; leave it out" if silos else "use devices=lognormal"
    for words, given in asked.items():
        yield given, f"{words} needs devices, which are what takes time and memory: {instead}"


def _with_devices(parts: Asked) -> Iterator[tuple[bool, str]]:
    yield (
        isinstance(parts.runtime, SiloRuntime),
        "devices with runtime=silos: real clients take the time that they take, and devices are "
        "modelled; use devices=none",
    )
    yield (
        type(parts.strategy).run_round is not Method.run_round,
        f"devices: clients of {parts.strategy.label} exchange messages at every step, and the time "
        "of a client is that of one message each way; use devices=none",
    )
    yield (
        parts.compression.acts,
        "devices with compression: how many bytes a compressed change has is known once it is "
        "made, and who is late must be known before; use federation.wire=bfloat16, or devices=none",
    )
    yield (
        _acts(parts, "secagg"),
        "devices with secagg: its messages are in no client's time; use devices=none, or "
        "secagg=none",
    )
    yield (
        _acts(parts, "privacy"),
        "devices with privacy: its accountant counts on cohorts in which no device has a say, and "
        "here late clients stay out; use devices=none, or privacy=none",
    )


def _buffered(parts: Asked) -> Iterator[tuple[bool, str]]:
    rounds, mode = parts.federation, "federation.mode=buffered"
    yield (
        rounds.over != 1,
        f"federation.over={rounds.over} has no effect with {mode}, where federation.concurrency "
        "says how many clients are at work; leave it at 1",
    )
    yield bool(parts.strategy.needs_updates), f"{mode}: {parts.strategy.needs_updates}"


def _acts(parts: Asked, group: str) -> bool:
    """Whether a group that another room brings is on: its default sets nothing but a class or a
    kind ``none``."""
    given = parts.resolved.get(group) or {}
    return bool(given) and given.get("kind") != "none" and len(given) > 1
