"""What clients have missed of a base that moves."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.server.base_changes import missed_scalars, nothing_sent, with_round
from tests.generators import setting

SHAPE = (40, 30)


def of_ranks(rounds: list[int]) -> torch.Tensor:
    """``sent`` of one module."""
    sent = torch.zeros(0, 1, dtype=torch.int64)
    for r in rounds:
        sent = with_round(sent, [r])
    return sent


def test_each_round_costs_its_factors_and_all_of_them_never_more_than_the_weight() -> None:
    """NEWS-2: one client of rank 1 a round on a 40 x 30 layer."""
    sent = of_ranks([1] * 20)
    assert [missed_scalars(sent, 20 - k, [SHAPE]) for k in (0, 1, 2, 3)] == [0, 70, 140, 210]
    assert missed_scalars(sent, 0, [SHAPE]) == 1200 == min(70 * 20, 40 * 30)
    assert missed_scalars(of_ranks([]), -1, [SHAPE]) == 1200


@given(st.lists(st.integers(0, 30), max_size=12), st.data())
def test_what_is_missed_is_bounded_by_its_parts(ranks: list[int], data: st.DataObject) -> None:
    """Fewer known rounds cost no less, and two parts cost no less than both together."""
    sent = of_ranks(ranks)
    first = data.draw(st.integers(0, len(ranks)))
    second = data.draw(st.integers(first, len(ranks)))
    both, later = (missed_scalars(sent, t, [SHAPE]) for t in (first, second))
    between = missed_scalars(sent[:second], first, [SHAPE])
    assert later <= both <= between + later
    assert both <= 40 * 30


def test_modules_are_counted_one_by_one() -> None:
    sent = with_round(nothing_sent(setting()), [1, 100, 2])
    shapes = [(m.d_out, m.d_in) for m in setting().modules]
    assert missed_scalars(sent, 0, shapes) == (6 + 5) + 9 * 7 + 2 * (5 + 8)
