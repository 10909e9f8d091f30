"""The schedule of buffered asynchrony: who is at work, what arrives, and when."""

import json
import math

import numpy as np
import pytest

from fedlora.core.errors import RunError
from fedlora.devices.buffer import Buffer, Flight, Queue
from fedlora.devices.trace import windows
from tests.fedlora.devices.worlds import TICK, fleet, trace, visit


def world(seed: int, clients: int = 12):
    """Parts by client and version, and windows of availability."""
    random = np.random.default_rng(seed)
    spans = [(float(s), float(s + n)) for s, n in random.integers(1, 40, (clients, 2))]
    traces = trace(*(windows(100.0, [s]) for s in spans))

    def part(client: int, draw: int):
        own = np.random.default_rng([seed, client, draw])
        return visit(client, *own.integers(1, 60, 3).tolist())

    return traces, part


def go(buffer: Buffer, clients, part, versions: int, queue: Queue = Queue()):  # noqa: B008
    """So many versions."""
    found = []
    for _ in range(versions):

        def start(ids, count, draw):
            own = np.random.default_rng([draw, 7])
            chosen = sorted(own.choice(len(ids), count, replace=False).tolist())
            return [part(ids[i], draw) for i in chosen]

        found.append(buffer.advance(queue, clients, start))
        queue = found[-1].after
    return found


@pytest.mark.parametrize("seed", range(6))
def test_every_client_that_starts_arrives_once_or_is_missed_once(seed):
    traces, part = world(seed)
    buffer = Buffer(fleet(12, traces, server=0.5), 3, 6, deadline=20.0)
    versions = go(buffer, range(12), part, 12)
    begun = {(v.client, n) for n, one in enumerate(versions) for v in one.started}
    arrived = [(f.client, f.version) for one in versions for f in one.arrived]
    left = {(f.client, f.version) for f in versions[-1].after.flights if f.kind == "Finished"}
    assert len(arrived) == len(set(arrived))
    assert set(arrived) | left == begun
    assert not set(arrived) & left


@pytest.mark.parametrize("seed", range(6))
def test_a_version_is_made_of_the_first_results_and_time_never_goes_back(seed):
    traces, part = world(seed)
    buffer = Buffer(fleet(12, traces, server=0.5), 3, 6, deadline=20.0)
    now = 0.0
    for n, one in enumerate(go(buffer, range(12), part, 12)):
        ends = [(f.ends, f.client) for f in one.arrived]
        assert ends == sorted(ends)
        waiting = [f for f in one.after.flights if f.kind == "Finished"]
        if ends:
            assert all((f.ends, f.client) > ends[-1] for f in waiting)
            assert one.after.now >= ends[-1][0] + 0.5
        assert all(f.version <= n for f in one.arrived)
        assert one.after.now >= now + 0.5
        now = one.after.now
        assert one.after.version == n + 1
        assert len([f for f in one.after.flights if f.ends > now]) <= 6


def test_with_as_many_results_as_clients_at_work_rounds_are_synchronous():
    """``K = M``: nothing is ever stale, and a version ends with its last client."""
    buffer = Buffer(fleet(5, server=1.0), 5, 5)
    _, part = world(3, 5)
    for n, one in enumerate(go(buffer, range(5), part, 4)):
        assert {f.version for f in one.arrived} == {n}
        assert not one.after.flights
        assert len(one.started) == 5


def test_one_result_a_version_is_fedasync():
    """Three clients of 1, 2 and 4 ticks: who comes first starts again first."""
    buffer = Buffer(fleet(3), 1, 3)
    versions = go(buffer, range(3), lambda i, draw: visit(i, 0, 2**i, 0), 5)
    assert [f.client for one in versions for f in one.arrived] == [0, 0, 1, 0, 0]
    assert [one.after.now / TICK for one in versions] == [1, 2, 2, 3, 4]
    ages = [n - f.version for n, one in enumerate(versions) for f in one.arrived]
    assert ages == [0, 0, 2, 1, 0]


def test_a_queue_survives_json():
    queue = Queue(3.5, 2, 4, (Flight(1, 0, 4.25), Flight(3, 1, 5.0, "Late")))
    assert Queue.from_json(json.loads(json.dumps(queue.to_json()))) == queue


@pytest.mark.parametrize("seed", range(3))
def test_a_schedule_goes_on_from_any_version(seed):
    traces, part = world(seed)
    buffer = Buffer(fleet(12, traces, server=0.5), 3, 6)
    whole = go(buffer, range(12), part, 8)
    again = go(buffer, range(12), part, 5, Queue.from_json(whole[2].after.to_json()))
    assert again == whole[3:]


def test_nobody_who_is_ever_available_ends_the_run():
    buffer = Buffer(fleet(2, trace(windows(10.0, []), windows(10.0, []))), 1, 2)
    with pytest.raises(RunError, match="available at 0 s of virtual time"):
        go(buffer, range(2), lambda i, draw: visit(i, 1, 1, 1), 1)


def test_clients_that_all_go_away_make_an_empty_version_and_time_passes():
    short = trace(*(windows(100.0, [(0.0, 1.0)]) for _ in range(3)))
    buffer = Buffer(fleet(3, short, server=1.0), 2, 3)
    (one,) = go(buffer, range(3), lambda i, draw: visit(i, 8, 8, 8), 1)
    assert not one.arrived
    assert [m.kind for m in one.missed] == ["WentAway"] * 3
    assert one.after.now == 2.0
    assert math.isfinite(one.after.now)
