"""I7: how many vectors are exchanged, and that the draws are functions of their keys."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.techniques.switchlora.schedule import (
    decay,
    draw,
    expected,
)
from fedlora.techniques.switchlora.technique import SwitchTraining as Switching

SWITCHING = Switching()


def test_the_sum_of_draws_is_what_the_closed_form_says():
    r, total = 48, 3000
    means = [expected(SWITCHING, r, t, total) for t in range(total)]
    x = 0.3 ** (1 / (SWITCHING.ratio * total))
    assert math.fsum(means) == pytest.approx(
        r / SWITCHING.interval * x * (1 - x**total) / (1 - x), rel=1e-3
    )
    parts = [m - math.floor(m) for m in means]
    sigma = math.sqrt(math.fsum(f * (1 - f) for f in parts))
    drawn = sum(draw(1, "w", t, m) for t, m in enumerate(means))
    assert abs(drawn - math.fsum(means)) < 4 * sigma


def test_exchanges_are_a_third_as_frequent_after_the_share():
    assert decay(99, 1000, 0.1) == pytest.approx(0.3)
    assert decay(10**6, 1000, 0.1) == 1e-8


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 50))
def test_a_draw_rounds_and_repeats(seed, step, mean):
    k = draw(seed, "w", step, mean)
    assert k in (math.floor(mean), math.floor(mean) + 1)
    assert k == draw(seed, "w", step, mean)


def test_layers_draw_apart():
    drawn = [[draw(0, path, t, 0.5) for t in range(64)] for path in ("v", "w")]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"interval": 9.0}, "less than twice client.technique.freeze=5.*interval >= 10"),
        ({"freeze": -1}, "client.technique.freeze=-1"),
        ({"ratio": 0.0}, "client.technique.ratio"),
        ({"choice": "best"}, "client.technique.choice='best' is not one of"),
    ],
)
def test_impossible_settings_are_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        Switching(**wrong)
