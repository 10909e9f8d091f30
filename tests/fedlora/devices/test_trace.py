"""Availability: by intervals as by a grid, whatever was asked before."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.errors import ConfigError
from fedlora.devices.trace import TICK, Trace, Windows, daily, read_trace, windows

PERIOD = 40
INTERVALS = st.lists(
    st.tuples(st.integers(0, PERIOD - 1), st.integers(1, PERIOD)).map(
        lambda p: (p[0], min(PERIOD, p[0] + p[1]))
    ),
    max_size=5,
)


def grid(intervals) -> list[bool]:
    """Whether a client is available in each second of the period."""
    return [any(s <= t < e for s, e in intervals) for t in range(PERIOD)]


def check_like_a_grid(intervals, start: int) -> None:
    """Law: answers are those of a look at every second."""
    cells, found = grid(intervals), windows(PERIOD, intervals)
    assert found.is_on(start) == cells[start % PERIOD]
    rest = range(start, start + 2 * PERIOD)
    ends = next((t for t in rest if not cells[t % PERIOD]), math.inf)
    assert found.until(start) == (math.inf if all(cells) else ends)
    assert found.opens(start) == next((t for t in rest if cells[t % PERIOD]), math.inf)


@given(INTERVALS, st.integers(0, 5 * PERIOD))
def test_intervals_are_like_a_grid_of_seconds(intervals, start):
    check_like_a_grid(intervals, start)


@given(INTERVALS, st.floats(0, 1e9))
def test_a_client_is_available_when_it_opens_and_until_it_says(intervals, t):
    """At clocks whose last bits are coarse, too: a run that waits for an opening goes on."""
    found = windows(PERIOD, intervals)
    opens = found.opens(t)
    if opens < math.inf:
        assert found.is_on(opens)
        assert found.until(opens) > opens
    assert found.opens(t) >= t - TICK


def check_no_memory(intervals, asked) -> None:
    """Law: an answer depends on the time alone, never on what was asked before."""
    used, fresh = windows(PERIOD, intervals), windows(PERIOD, intervals)
    for t in asked:
        used.opens(t), used.until(t), used.is_on(t)
    assert [used.is_on(t) for t in range(50)] == [fresh.is_on(t) for t in range(50)]


@given(INTERVALS, st.lists(st.integers(0, 200), max_size=6))
def test_answers_do_not_depend_on_what_was_asked_before(intervals, asked):
    check_no_memory(intervals, asked)


@pytest.mark.parametrize("on", [0.1, 0.5, 0.93])
def test_a_daily_client_is_available_for_its_fraction_in_one_piece(on):
    for one in daily(20, on, 1000.0, 3).windows:
        assert sum(e - s for s, e in zip(one.starts, one.ends, strict=True)) == pytest.approx(
            on * 1000
        )
        begin = one.opens(one.until(0.0)) if one.is_on(0.0) else one.opens(0.0)
        assert one.until(begin) - begin == pytest.approx(on * 1000)


def test_several_clients_open_with_the_first():
    found = Trace((windows(10, [(3, 4)]), windows(10, [(7, 9)]), windows(10, [])))
    assert found.on([0, 1, 2], 3.5) == [0]
    assert found.opens([0, 1, 2], 5.0) == 7.0
    assert found.opens([2], 5.0) == math.inf
    assert found.stays(1, 7.5) == 1.5
    assert Windows(1.0).until(5.0) == math.inf


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"id": 0, "period": 10, "on": [[5, 3]]}', "line 1: .5.0, 3.0. is no interval"),
        ('{"id": 0, "period": 0, "on": []}', "period=0.0 must be a positive"),
        ('{"id": 0, "on": []}', "'period' is missing"),
        ("{", "line 1"),
        ('{"id": 7, "period": 10, "on": []}', "no line for client 0"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, line, why):
    file = tmp_path / "trace.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ConfigError, match=why):
        read_trace(file, 1)


def test_a_file_says_when_clients_are_available(tmp_path):
    file = tmp_path / "trace.jsonl"
    rows = [{"id": i, "period": 10, "on": [[i, i + 1]]} for i in (1, 0)]
    file.write_text("\n".join(json.dumps(r) for r in rows))
    assert read_trace(file, 2).on([0, 1], 11.5) == [1]
