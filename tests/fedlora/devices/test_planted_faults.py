"""Faults in the time of devices: each is planted, and each is caught by the law that is named."""

from collections.abc import Callable
from typing import Any

import pytest

from fedlora.core.types import LocalPlan
from fedlora.devices import clock, time
from fedlora.devices.trace import Windows
from fedlora.server import virtual_time
from fedlora.server.buffered import BufferedTime
from tests.fedlora.devices.test_clock import check_deadline, check_like_a_simulator
from tests.fedlora.devices.test_time import check_hand, check_tokens
from tests.fedlora.devices.test_trace import check_no_memory
from tests.fedlora.server.test_virtual_time import (
    _float64,  # noqa: F401
    buffered,
    check_charges,
    check_late,
    check_resume,
    check_weights,
    windowed,
)
from tests.planted import planted

UP, DOWN = time.Visit.up.fget, time.Visit.down.fget
CURSOR = "self.__dict__.setdefault('at', [0]).append(0) or len(self.__dict__['at'])"
PARTS, SPANS = [(1, 9, 1), (1, 2, 3), (2, 2, 2)], [60] * 8


def simulated(tmp_path: Any) -> None:
    check_like_a_simulator(PARTS, SPANS, 2, 50)


def resumed(tmp_path: Any) -> None:
    check_resume(tmp_path, lambda: buffered(2, 5, windowed(1.0)))


FAULTS: dict[str, tuple[Callable[..., Any], str, str, Callable[[Any], None]]] = {
    "kbit for kB": (UP, "self.bytes_up /", "8 * self.bytes_up /", check_charges),
    "up and down swapped": (UP, "self.device.up", "self.device.down", lambda _: check_hand()),
    "latency once": (DOWN, "self.device.latency + ", "", lambda _: check_hand()),
    "tokens padded": (
        time.drawn_lengths,
        "inputs[np.concatenate(list(steps))]",
        "0 * inputs[np.concatenate(list(steps))] + inputs.max()",
        lambda _: check_tokens(LocalPlan(batch_size=2)),
    ),
    "deadline compared with the clock": (
        clock.settle,
        "min(deadline, stays[v.client])",
        "min(deadline - begin, stays[v.client])",
        lambda _: check_deadline(),
    ),
    "first by id": (
        clock.settle,
        "(v.seconds, v.client)",
        "(v.client, v.seconds)",
        simulated,
    ),
    "late client trained and averaged": (
        virtual_time.without,
        "if i not in out}",
        "}",
        check_late,
    ),
    "late clients not charged": (
        virtual_time.without,
        "charged=charged",
        "charged={i: (0, 0) for i in out}",
        lambda path: check_late_bytes(path),
    ),
    "staleness of the arrival's own version": (
        BufferedTime.combine,
        "self.queue.version - f.version",
        "0",
        check_weights,
    ),
    "buffer lost on resume": (
        BufferedTime.restore,
        "{c.client.id: c for c in changes}",
        "{}",
        resumed,
    ),
    "cursor in the trace": (
        Windows._place,
        "t % self.period",
        f"(t + ({CURSOR})) % self.period",
        lambda _: check_no_memory([(3, 9), (20, 30)], [1, 5, 9]),
    ),
}


def check_late_bytes(tmp_path: Any) -> None:
    """Law: a client that is asked and late has received its start."""
    from fedlora.run.tracking import read_jsonl
    from tests.fedlora.server.test_virtual_time import World, clock

    World().run(tmp_path, clock(deadline=20.0), until=1)
    rows = [r for r in read_jsonl(tmp_path / "clients.jsonl") if r.get("failure") == "Late"]
    assert rows
    assert all(r["bytes_down"] > 0 for r in rows)


@pytest.mark.parametrize("law", dict.fromkeys(fault[-1] for fault in FAULTS.values()))
def test_laws_hold_without_faults(tmp_path, law):
    law(tmp_path)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_breaks_its_law(tmp_path, name):
    function, right, wrong, law = FAULTS[name]
    with planted(function, right, wrong), pytest.raises(AssertionError):
        law(tmp_path)
