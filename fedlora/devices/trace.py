"""When clients are available: intervals of a period that repeats. Pure: a time in, an answer out.

A client is available in ``[start, end)`` of each of its intervals. Answers depend on the client and
the time alone, never on what was asked before.
"""

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.core.errors import ConfigError
from fedlora.core.seeding import generator

TICK = 1e-6
"""Seconds: an instant that is nearer to an opening than this is that opening. The sum of a clock
and a waiting time is rounded."""


@dataclass(frozen=True)
class Windows:
    """The availability of one client; intervals are sorted, apart, and within the period."""

    period: float
    """Seconds."""
    starts: tuple[float, ...] = (0.0,)
    ends: tuple[float, ...] = (math.inf,)

    @property
    def always(self) -> bool:
        """Whether it is never unavailable."""
        return self.starts[:1] == (0.0,) and self.ends[:1] >= (self.period,)

    def is_on(self, t: float) -> bool:
        """Whether the client is available at a time, in seconds."""
        return self.always or self._interval(self._place(t)) >= 0

    def until(self, t: float) -> float:
        """The time at which the interval ends that contains ``t``; ``t`` itself if none does;
        infinite if the client is always available."""
        if self.always:
            return math.inf
        x = self._place(t)
        i = self._interval(x)
        if i < 0:
            return t
        end = self.ends[i]
        if end >= self.period and self.starts[0] == 0:  # it goes on in the next period
            end = self.period + self.ends[0]
        return t + (end - x)

    def opens(self, t: float) -> float:
        """The first time from ``t`` on at which the client is available; infinite if it never
        is."""
        if self.is_on(t):
            return t
        if not self.starts:
            return math.inf
        x = self._place(t)
        i = bisect_right(self.starts, x)
        ahead = self.starts[i] if i < len(self.starts) else self.period + self.starts[0]
        return t + (ahead - x)

    def _place(self, t: float) -> float:
        """The time within the period."""
        x = t % self.period
        i = bisect_left(self.starts, x)
        if i < len(self.starts) and self.starts[i] - x <= TICK:
            return self.starts[i]
        if self.starts and self.period + self.starts[0] - x <= TICK:
            return self.starts[0]
        return x

    def _interval(self, x: float) -> int:
        """The index of the interval that holds a time of the period; -1: none."""
        i = bisect_right(self.starts, x) - 1
        return i if i >= 0 and x < self.ends[i] else -1


@dataclass(frozen=True)
class Trace:
    """The availability of a population."""

    windows: tuple[Windows, ...]
    """By client id."""
    text: str = "always available"
    """In words."""

    def on(self, clients: Sequence[int], t: float) -> list[int]:
        """Those of some clients that are available at a time, in their order."""
        return [i for i in clients if self.windows[i].is_on(t)]

    def opens(self, clients: Sequence[int], t: float) -> float:
        """The first time from ``t`` on at which any of some clients is available; infinite if
        none ever is."""
        return min((self.windows[i].opens(t) for i in clients), default=math.inf)

    def stays(self, client: int, t: float) -> float:
        """For how many seconds from ``t`` on a client stays available."""
        return self.windows[client].until(t) - t


def always(clients: int) -> Trace:
    """All clients, always."""
    return Trace((Windows(1.0),) * clients)


def daily(clients: int, on: float, period: float, seed: int) -> Trace:
    """Each client for one piece of every period, which begins at an instant of its own.

    Args:
        clients: how many.
        on: fraction of the period, in (0, 1).
        period: seconds.
        seed: of the instants.
    """
    begins = generator(seed, "devices/on").random(clients) * period
    found = []
    for begin in begins.tolist():
        end = begin + on * period
        pieces = [(begin, min(end, period)), (0.0, max(0.0, end - period))]
        found.append(windows(period, [p for p in pieces if p[1] > p[0]]))
    text = f"each available for {on:.0%} of every {period:,.0f} s"
    return Trace(tuple(found), text)


def windows(period: float, intervals: Sequence[tuple[float, float]]) -> Windows:
    """Intervals in any order, those that touch or overlap joined.

    Raises:
        ValueError: for a period that is not positive, or an interval that is empty or lies outside.
    """
    if not 0 < period < math.inf:
        raise ValueError(f"period={period!r} must be a positive number of seconds")
    starts: list[float] = []
    ends: list[float] = []
    for start, end in sorted(intervals):
        if not 0 <= start < end <= period:
            raise ValueError(
                f"[{start}, {end}] is no interval of the period: 0 <= start < end <= {period}"
            )
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return Windows(float(period), tuple(map(float, starts)), tuple(map(float, ends)))


def read_trace(file: Path, clients: int) -> Trace:
    """The availability of a JSON-lines file; lines of clients that do not exist are ignored.

    Raises:
        ConfigError: naming the file, the line, and what is wrong with it.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"devices.trace={file}: {error}") from error
    found: dict[int, Windows] = {}
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            number, intervals = int(row["id"]), [(float(a), float(b)) for a, b in row["on"]]
            one = windows(float(row["period"]), intervals)
        except (ValueError, TypeError, KeyError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ConfigError(
                f"{file}, line {i}: {why}; a line is "
                '{"id": 0, "period": 604800, "on": [[start, end], ...]}'
            ) from error
        if number in found:
            raise ConfigError(f"{file}, line {i}: client {number} has a line already")
        found[number] = one
    if lacking := [i for i in range(clients) if i not in found]:
        raise ConfigError(
            f"{file} has no line for client {lacking[0]} ({len(lacking)} of {clients} clients have "
            "none)"
        )
    return Trace(tuple(found[i] for i in range(clients)), f"availability of {file.name}")
