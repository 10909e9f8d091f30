"""The bound on a client's move: honest cohorts pass whatever their ranks and sizes, and a minority
can neither pass with a huge change nor have others refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.types import Client, Ranks, Update
from fedlora.server.norm_bound import Move, compare, furthest
from fedlora.techniques.lora.payload import LowRankPayload

FACTOR = 50.0


def move(i: int, weights: float, steps: int = 1, rank: int = 1, sent: float = 1.0) -> Move:
    client = Client(i, Ranks({"w": rank}), 10)
    return Move(Update(client, LowRankPayload({}), 10), weights, sent, steps, rank)


@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.sampled_from([1, 2, 8, 30, 200]), st.floats(1, 7)),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([0.5, 1.0]),
)
def test_honest_cohorts_pass_whatever_their_steps_and_ranks(clients, power):
    """AdamW's change grows as ``T / sqrt(r)``, SGD's as ``T / r``; texts differ by seven times."""
    moves = [move(i, T * x / r**power, T, r) for i, (T, r, x) in enumerate(clients)]
    assert all(m.weights > 0 for m in moves)
    bound = compare(moves, FACTOR)
    slow = [m for m in moves if m.update.client.id in bound.refused]
    assert not slow, [(m.steps, m.rank, m.weights, bound.median) for m in slow]


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_clients_are_not_compared(n):
    assert not compare([move(i, 10.0 ** (6 * i)) for i in range(n)], FACTOR).refused
    still = [move(2, 0.0, sent=0.0), move(3, 0.0, sent=0.0)]
    assert not compare([move(i, 10.0 ** (6 * i)) for i in range(n)] + still, FACTOR).refused


@given(
    honest=st.lists(st.floats(1, 10), min_size=2, max_size=20),
    hostile=st.floats(1e3, 1e6) | st.floats(1e-9, 1e-3),
)
def test_a_minority_is_refused_and_has_nobody_refused(honest, hostile):
    """Half of a cohort, less one client, is huge or tiny."""
    few = len(honest) - 1
    moves = [move(i, x) for i, x in enumerate(honest)]
    moves += [move(100 + i, hostile) for i in range(few)]
    refused = set(compare(moves, FACTOR).refused)
    assert refused == ({100 + i for i in range(few)} if hostile >= 1e3 and few else set())


def test_what_was_sent_counts_as_the_weights_do():
    moves = [move(i, 1.0) for i in range(4)] + [move(9, 1.0, sent=1e4)]
    assert "the change of what it sent" in compare(moves, FACTOR).refused[9]
    assert furthest(moves).update.client.id == 9


def test_a_norm_that_is_no_number_is_refused():
    """Of three clients that moved, one by NaN: comparisons with NaN are never true."""
    moves = [move(i, 1.0) for i in range(3)] + [move(9, math.inf)]
    assert list(compare(moves, FACTOR).refused) == [9]
