"""A round settled at once is the round lived through tick by tick."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.devices.clock import AWAY, LATE, settle
from fedlora.devices.time import Visit, charge
from fedlora.devices.trace import windows
from tests.fedlora.devices.worlds import TICK, visit


def live_through(visits, on, wanted, deadline):
    """Finishers in order, client -> (kind, tick) of the others, and the tick of the end.

    Args:
        visits: parts whose phases are whole ticks.
        on: whether a client is available during a tick.
        wanted: results that are enough.
        deadline: in ticks.
    """
    need = {v.client: round(v.seconds / TICK) for v in visits}
    wanted, finished, gone, t = min(wanted, len(need)), [], {}, 0
    while True:
        pending = [i for i in sorted(need) if i not in gone and i not in finished]
        for i in pending:
            if need[i] == t and len(finished) < wanted:
                finished.append(i)
        gone |= {i: t for i in pending if i not in finished and not on(i, t)}
        if len(finished) == wanted or t == deadline:
            break
        if len(gone) + len(finished) == len(need) and deadline == math.inf:
            break
        t += 1
    missed = {i: (AWAY, gone[i]) if i in gone else (LATE, t) for i in need if i not in finished}
    return finished, missed, t


PARTS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=8
)
SPANS = st.lists(st.integers(1, 60), min_size=8, max_size=8)


def check_like_a_simulator(parts, spans, wanted, deadline) -> None:
    """Law: the same finishers, failures and clock as a simulator of ticks, and the same charges."""
    visits = [visit(i, *p) for i, p in enumerate(parts)]
    period = 64 * TICK
    traces = [windows(period, [(0.0, n * TICK)]) for n in spans]
    stays = {v.client: traces[v.client].until(0.0) for v in visits}
    limit = deadline * TICK
    found = settle(visits, stays, wanted, limit)
    finished, missed, end = live_through(
        visits, lambda i, t: traces[i].is_on(t * TICK), wanted, deadline
    )
    assert [v.client for v in found.finished] == sorted(finished)
    assert {m.visit.client: (m.kind, m.after / TICK) for m in found.missed} == missed
    assert found.seconds == end * TICK
    for m in found.missed:
        ticks = [max(0, min(p, m.after / TICK - before)) for p, before in _phases(m.visit)]
        assert m.charge.compute == ticks[1] * TICK
        assert m.charge.transfer == (ticks[0] + ticks[2]) * TICK
        if m.kind == AWAY:
            assert (m.charge.bytes_down, m.charge.bytes_up) == (ticks[0], ticks[2])
    spent = [charge(v) for v in found.finished] + [m.charge for m in found.missed]
    assert sum(c.energy for c in spent) == pytest.approx(
        sum(3 * c.compute + 2 * c.transfer for c in spent)
    )


def _phases(v: Visit) -> list[tuple[int, int]]:
    """Ticks of each phase, and ticks before it."""
    down, compute, up = v.bytes_down, int(v.operations), v.bytes_up
    return [(down, 0), (compute, down), (up, down + compute)]


@given(PARTS, SPANS, st.integers(1, 8), st.one_of(st.integers(1, 50), st.just(math.inf)))
def test_a_round_is_what_a_simulator_of_ticks_lives_through(parts, spans, wanted, deadline):
    check_like_a_simulator(parts, spans, wanted, deadline)


@given(PARTS, SPANS, st.integers(1, 8), st.integers(1, 50), st.integers(0, 20))
def test_a_larger_deadline_loses_no_finisher(parts, spans, wanted, deadline, more):
    visits = [visit(i, *p) for i, p in enumerate(parts)]
    stays = {i: n * TICK for i, n in enumerate(spans)}
    few = settle(visits, stays, wanted, deadline * TICK)
    many = settle(visits, stays, wanted, (deadline + more) * TICK)
    assert {v.client for v in few.finished} <= {v.client for v in many.finished}


@given(PARTS, st.integers(1, 8))
def test_over_selection_with_nobody_late_is_a_round_of_the_first(parts, wanted):
    """Of those asked, the first ``wanted`` by (time, id) are the cohort."""
    visits = [visit(i, *p) for i, p in enumerate(parts)]
    stays = dict.fromkeys(range(len(parts)), math.inf)
    first = sorted(visits, key=lambda v: (v.seconds, v.client))[:wanted]
    over, plain = settle(visits, stays, wanted), settle(first, stays, wanted)
    assert over.finished == plain.finished
    assert over.seconds == plain.seconds
    assert all(m.kind == LATE and m.after == over.seconds for m in over.missed)


def check_deadline() -> None:
    """Law: a deadline counts from the start of its round, whatever the clock says."""
    visits, stays = [visit(i, 1, i, 1) for i in range(5)], dict.fromkeys(range(5), math.inf)
    early, late = (settle(visits, stays, 5, 0.5, begin) for begin in (0.0, 1e4))
    assert [v.client for v in early.finished] == [v.client for v in late.finished] == [0, 1, 2]
    assert [m.at for m in late.missed] == [1e4 + 0.5] * 2


def test_a_deadline_counts_from_the_start_of_its_round():
    check_deadline()


def test_order_of_the_clients_changes_nothing():
    random = np.random.default_rng(0)
    visits = [visit(i, *random.integers(1, 9, 3).tolist()) for i in range(9)]
    stays = {i: float(random.integers(1, 5)) for i in range(9)}
    whole = settle(visits, stays, 4, 2.0)
    for _ in range(5):
        assert settle([visits[i] for i in random.permutation(9)], stays, 4, 2.0) == whole


def test_a_round_that_asks_no_client_takes_no_time():
    assert settle([], {}, 3, 10.0).seconds == 0.0
