"""The devices of a simulation's clients: a user's table, or drawn from the seed.

No data set of devices ships with fedlora. Speed and bandwidth are lognormal unless a table names
them, memory is of a few classes, availability is daily; all of it is configuration, and
`Fleet.text` states it with the result.
"""

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora.core.checks import at_least, is_real
from fedlora.core.errors import ConfigError
from fedlora.core.seeding import generator
from fedlora.devices.trace import Trace, always, daily, read_trace

COLUMNS = ("id", "flops", "memory", "up", "down", "latency", "watts")
"""Columns of a table; all are required but the last two."""
OPTIONAL = ("latency", "watts", "radio_watts")


@dataclass(frozen=True)
class Device:
    """What one client computes and communicates with."""

    flops: float
    """Floating-point operations per second that it sustains in training."""
    memory: float
    """Bytes."""
    up: float
    """Bytes per second that it sends."""
    down: float
    """Bytes per second that it receives."""
    latency: float = 0.0
    """Seconds before the first byte of a message, in each direction."""
    watts: float = 0.0
    """Power while it computes; 0: not known."""
    radio_watts: float = 0.0
    """Power while it sends or receives; 0: not known."""

    def __post_init__(self) -> None:
        for name in ("flops", "memory", "up", "down"):
            at_least(name, getattr(self, name), 0, strict=True)
        for name in ("latency", "watts", "radio_watts"):
            at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class Fleet:
    """The devices of a population."""

    devices: tuple[Device, ...]
    """By client id."""
    trace: Trace
    """When each is available."""
    server_seconds: float = 0.0
    """Seconds of the server between two rounds."""

    @property
    def text(self) -> str:
        """Its devices in one line: median, with the 10 % and 90 % quantiles."""

        def spread(values: Sequence[float], scale: float, unit: str) -> str:
            low, middle, high = (_digits(v / scale) for v in np.quantile(values, [0.1, 0.5, 0.9]))
            return f"{middle} {unit} ({low} to {high})"

        d = self.devices
        parts = [
            spread([x.flops for x in d], 1e9, "GFLOP/s"),
            spread([x.memory for x in d], 1e9, "GB"),
            "up " + spread([x.up for x in d], 1e3, "kB/s"),
            "down " + spread([x.down for x in d], 1e3, "kB/s"),
        ]
        return f"{len(d):,} devices: {', '.join(parts)}; {self.trace.text}"


@dataclass(frozen=True)
class Devices:
    """How the devices of a run are made (``devices=lognormal``)."""

    table: str = ""
    """A CSV file with one row per client, ``id,flops,memory,up,down`` and, if they are known,
    ``latency,watts,radio_watts``; empty: drawn from the seed."""
    trace: str = ""
    """A JSON-lines file ``{"id": 0, "period": 604800, "on": [[start, end], ...]}`` in seconds, one
    line per client; empty: by ``available`` and ``period``."""
    flops: Mapping[str, float] = field(default_factory=lambda: {"median": 2.0e10, "sigma": 1.0})
    """Sustained training operations per second, lognormal: ``median`` and ``sigma`` of the log."""
    up: Mapping[str, float] = field(default_factory=lambda: {"median": 6.0e5, "sigma": 0.8})
    """Bytes per second, lognormal."""
    down: Mapping[str, float] = field(default_factory=lambda: {"median": 2.0e6, "sigma": 0.8})
    """Bytes per second, lognormal."""
    memory: tuple[Mapping[str, float], ...] = (
        {"bytes": 2.0e9, "fraction": 0.2},
        {"bytes": 4.0e9, "fraction": 0.4},
        {"bytes": 8.0e9, "fraction": 0.4},
    )
    """Classes; fractions sum to 1, and each client draws its class."""
    latency: float = 0.05
    """Seconds, in each direction."""
    watts: float = 0.0
    """While computing; 0: no energy is recorded."""
    radio_watts: float = 0.0
    """While sending or receiving."""
    available: float = 1.0
    """Fraction of the period in which a client is available, in one piece that begins at an instant
    of its own; 1: always."""
    period: float = 86400.0
    """Seconds."""
    server_seconds: float = 1.0
    """Seconds of the server between two rounds."""

    def __post_init__(self) -> None:
        for name in ("flops", "up", "down"):
            _check_lognormal(f"devices.{name}", getattr(self, name))
        _check_classes(self.memory)
        for name in ("latency", "watts", "radio_watts", "server_seconds"):
            at_least(f"devices.{name}", getattr(self, name), 0)
        at_least("devices.period", self.period, 0, strict=True)
        if not 0 < self.available <= 1:
            raise ValueError(f"devices.available={self.available!r} must lie in (0, 1]; 1: always")
        if self.trace and self.available != 1:
            raise ValueError(
                f"devices.available={self.available} has no effect: devices.trace={self.trace} "
                "says when clients are available"
            )

    def fleet(self, clients: int, seed: int) -> Fleet:
        """The devices of so many clients.

        Args:
            clients: they have the ids ``0..clients - 1``.
            seed: of the population.

        Raises:
            ConfigError: naming a file, the line, and what is wrong with it.
        """
        devices = (
            read_table(Path(self.table), clients) if self.table else self._drawn(clients, seed)
        )
        if self.trace:
            trace = read_trace(Path(self.trace), clients)
        else:
            part, all_on = self.available, always(clients)
            trace = all_on if part == 1 else daily(clients, part, self.period, seed)
        return Fleet(devices, trace, self.server_seconds)

    def _drawn(self, clients: int, seed: int) -> tuple[Device, ...]:
        """Every quantity has a stream of its own, so that one can change without the others."""

        def lognormal(name: str) -> NDArray[np.float64]:
            how, z = getattr(self, name), generator(seed, f"devices/{name}").normal(size=clients)
            return np.asarray(how["median"] * np.exp(how["sigma"] * z), dtype=np.float64)

        bounds = np.cumsum([c["fraction"] for c in self.memory])
        u = generator(seed, "devices/memory").random(clients) * bounds[-1]
        held = np.array([c["bytes"] for c in self.memory])[np.searchsorted(bounds, u, side="right")]
        columns = (lognormal("flops"), held, lognormal("up"), lognormal("down"))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        rest = (self.latency, self.watts, self.radio_watts)
        return tuple(Device(f, m, up, down, *rest) for f, m, up, down in rows)

    def fingerprint(self) -> str:
        """Identity of the files' contents; empty without files.

        Raises:
            ConfigError: for a file that cannot be read.
        """
        named = (("table", self.table), ("trace", self.trace))
        found = [hashlib.sha256(read(Path(f), f"devices.{k}")).hexdigest() for k, f in named if f]
        return "-".join(digest[:16] for digest in found)


def read(file: Path, key: str) -> bytes:
    """A file's bytes.

    Raises:
        ConfigError: naming the key and the file.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}={file}: {error.strerror}") from error


def read_table(file: Path, clients: int) -> tuple[Device, ...]:
    """The devices of a CSV file, by client id; rows of clients that do not exist are ignored.

    Raises:
        ConfigError: naming the file, the line, and what is wrong with it.
    """
    lines = read(file, "devices.table").decode("utf-8-sig", errors="replace").splitlines()
    rows = csv.DictReader(lines)
    heads = [h.strip() for h in rows.fieldnames or []]
    missing = [c for c in COLUMNS if c not in (*heads, *OPTIONAL)]
    unknown = [h for h in heads if h not in (*COLUMNS, *OPTIONAL)]
    if missing or unknown:
        raise ConfigError(
            f"{file}: its first line must name the columns {','.join(COLUMNS)}; "
            + (f"{missing[0]} is missing" if missing else f"{unknown[0]!r} is none of them")
        )
    found: dict[int, Device] = {}
    for row in rows:
        where = f"{file}, line {rows.line_num}"
        try:
            values = {h: float(str(row[raw]).strip()) for h, raw in zip(heads, row, strict=False)}
            number = int(values.pop("id"))
            device = Device(**values)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: {error}") from error
        if number in found:
            raise ConfigError(f"{where}: client {number} has a row already")
        found[number] = device
    if lacking := [i for i in range(clients) if i not in found]:
        raise ConfigError(
            f"{file} has no row for client {lacking[0]} ({len(lacking)} of {clients} clients have "
            "none): ids are 0 to population.clients - 1"
        )
    return tuple(found[i] for i in range(clients))


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _check_lognormal(key: str, how: Mapping[str, float]) -> None:
    _check_keys(key, how, ("median", "sigma"))
    at_least(f"{key}.median", how["median"], 0, strict=True)
    at_least(f"{key}.sigma", how["sigma"], 0)


def _check_classes(classes: Sequence[Mapping[str, float]]) -> None:
    for i, one in enumerate(classes):
        _check_keys(f"devices.memory[{i}]", one, ("bytes", "fraction"))
        at_least(f"devices.memory[{i}].bytes", one["bytes"], 0, strict=True)
        at_least(f"devices.memory[{i}].fraction", one["fraction"], 0, strict=True)
    total = math.fsum(c["fraction"] for c in classes)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"devices.memory: fractions sum to {total:g}, not 1")


def _check_keys(key: str, value: object, names: tuple[str, ...]) -> None:
    fits = isinstance(value, Mapping) and set(value) == set(names)
    if not (isinstance(value, Mapping) and fits and all(map(is_real, value.values()))):
        raise ValueError(f"{key}={value!r} must have the numbers {' and '.join(names)}")
