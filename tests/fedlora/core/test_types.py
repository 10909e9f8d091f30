"""Values that check themselves: what is refused, and what equality means."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.checks import at_least
from fedlora.core.types import LocalPlan, Ranks
from fedlora.techniques.lora.self_pruning import SelfPrune

PATHS = ("l.0.q_proj", "l.0.up_proj", "l.1.q_proj")

patterns = st.permutations(PATHS).flatmap(
    lambda paths: st.lists(st.integers(1, 3), min_size=3, max_size=3).map(
        lambda ranks: Ranks(dict(zip(paths, ranks, strict=True)))
    )
)


@given(patterns, patterns)
def test_equal_ranks_are_equal_in_every_respect(one: Ranks, other: Ranks) -> None:
    """Whatever can be read off ranks, by name or by position, is the same where they are equal."""
    assert (one == other) == (list(one.items()) == list(other.items()))
    if one == other:
        assert hash(one) == hash(other)
        assert (one.label, list(one.values())) == (other.label, list(other.values()))
    again = Ranks(dict(one))
    assert again == one
    assert len({again, one}) == 1


def test_ranks_in_another_order_are_other_ranks() -> None:
    every = [Ranks(dict.fromkeys(paths, 2)) for paths in itertools.permutations(PATHS)]
    assert len(set(every)) == len(every)
    assert all(a != b for a, b in itertools.combinations(every, 2))
    assert every[0] != dict(every[0])


def test_labels_say_which_modules_are_larger() -> None:
    paper = {"attention": 30, "mlp": 200}
    swapped = {"attention": 200, "mlp": 30}
    assert Ranks(paper).label == "30/200"
    assert Ranks(swapped).label == "200/30"
    assert Ranks({"attention": 8, "mlp": 8}).label == "8"
    assert Ranks({"q": 2, "up": 1, "v": 2}).label == "2/1"


def test_ranks_in_words_are_no_fraction():
    assert Ranks({"q": 8, "up": 8}).text == "rank 8"
    assert Ranks({"q": 2, "up": 15, "v": 2}).text == "ranks 2 and 15"
    assert Ranks({"q": 2, "up": 15, "down": 7}).text == "ranks 2, 15 and 7"


@given(st.floats(-5, 5), st.floats(-5, 5), st.booleans())
def test_a_bound_is_a_bound(value: float, low: float, strict: bool) -> None:
    if value > low or (value == low and not strict):
        at_least("x", value, low, strict=strict)
    else:
        with pytest.raises(ValueError, match=r"x=.* must be >"):
            at_least("x", value, low, strict=strict)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["lr", "max_grad_norm", "weight_decay", "momentum", "eps"])
def test_a_plan_is_made_of_finite_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"client\.{name}={value} must be >=? 0 and finite"):
        dataclasses.replace(LocalPlan(), **{name: value})
    with pytest.raises(ValueError, match=r"weight=.* and finite"):
        SelfPrune(weight=value, gamma=0.5, min_rank=1)
