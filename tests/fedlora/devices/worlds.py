"""Small devices and costs whose times are exact in binary."""

from dataclasses import replace

import numpy as np

from fedlora.core.types import Ranks
from fedlora.devices.table import Device, Fleet
from fedlora.devices.time import Visit, Work
from fedlora.devices.trace import Trace, Windows, always

TICK = 0.125
"""Seconds of a step of the simulators of these tests."""
DEVICE = Device(flops=8.0, memory=1e9, up=8.0, down=8.0, watts=3.0, radio_watts=2.0)
"""A byte, or an operation, takes one `TICK`."""


def visit(client: int, down: int, compute: int, up: int, **device) -> Visit:
    """A client's part of so many ticks in each phase."""
    return Visit(client, replace(DEVICE, **device), down, up, float(compute))


def fleet(clients: int, trace: Trace | None = None, server: float = 0.0, **device) -> Fleet:
    """So many equal devices."""
    return Fleet((replace(DEVICE, **device),) * clients, trace or always(clients), server)


def trace(*windows: Windows) -> Trace:
    return Trace(windows)


class Plain:
    """A cost whose numbers can be added up by hand."""

    def work(self, ranks: Ranks) -> Work:
        return Work(float(max(ranks.values())), 0.5)

    def memory(self, ranks: Ranks, tokens: int) -> float:
        return 100.0 * max(ranks.values()) + tokens

    def adapter(self, ranks: Ranks) -> int:
        return 10 * max(ranks.values())


def sevens(n: int) -> np.ndarray:
    """The lengths of so many sequences of seven tokens."""
    return np.full(n, 7, dtype=np.int64)
