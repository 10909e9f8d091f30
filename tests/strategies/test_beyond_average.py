"""A method says itself that its server goes beyond the average, and is exempt from what then fails;
one that does not say so is caught. FedDyn (arXiv:2111.04263) is the one that there is."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from fedlora.algebra.factor_average import GLOBAL
from fedlora.algebra.state import State, under
from fedlora.core.types import Update
from strategies.drift import FedDyn
from strategies.fedit import FedIT
from tests.strategies.laws import (
    DOUBLE,
    LAWS,
    Law,
    a_lone_client_gets_its_update_back,
    examples_are_what_is_averaged,
    idle_clients_leave_the_model,
    idle_clients_of_unequal_rank_leave_the_model,
    why_not,
)

EXEMPT: Sequence[Law] = (
    a_lone_client_gets_its_update_back,
    examples_are_what_is_averaged,
    idle_clients_leave_the_model,
    idle_clients_of_unequal_rank_leave_the_model,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Silent(FedDyn):
    """FedDyn that does not say what it does."""

    @property
    def beyond_average(self) -> str:
        return ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Eager(FedIT):
    """A method of another class that goes beyond the average: half a step more."""

    @property
    def beyond_average(self) -> str:
        return "it goes half a step further"

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        after, before = dict(super().aggregate(state, updates)), under(state, GLOBAL)
        for name, old in before.items():
            if name.endswith(("/a", "/b")):
                new = after[f"{GLOBAL}{name}"]
                after[f"{GLOBAL}{name}"] = new + 0.5 * (new - old)
        return after

    @property
    def needs_updates(self) -> str:
        return "its step is no sum; choose strategy=fedit"

    def adds(self, *_: object) -> None:
        return None


@pytest.mark.parametrize("law", EXEMPT, ids=lambda law: law.__name__)
def test_who_says_so_is_exempt_whatever_its_class(law: Law) -> None:
    for method in (FedDyn(), Eager()):
        assert why_not(law, method) == method.beyond_average != ""
    assert not why_not(law, FedIT()) and not why_not(law, Silent())


@pytest.mark.parametrize("law", EXEMPT, ids=lambda law: law.__name__)
def test_feddyn_needs_each_exemption(law: Law) -> None:
    with pytest.raises(AssertionError):
        law(FedDyn(), 1, DOUBLE)


LEFT = [law for law in LAWS if not why_not(law, Eager())]


@pytest.mark.parametrize("law", LEFT, ids=lambda law: law.__name__)
def test_a_new_method_of_this_kind_passes_what_is_left(law: Law) -> None:
    law(Eager(), 1, DOUBLE)


def test_who_says_nothing_is_caught() -> None:
    for method in (Silent(), type("Quiet", (Eager,), {"beyond_average": ""})()):
        caught = []
        for law in (law for law in EXEMPT if not why_not(law, method)):
            try:
                law(method, 1, DOUBLE)
            except AssertionError:
                caught.append(law)
        assert a_lone_client_gets_its_update_back in caught
