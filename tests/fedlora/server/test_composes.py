"""Parts that exclude each other are refused by their own rules, whatever else is on."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from fedlora.core.types import LocalPlan
from fedlora.server.composes import (
    MASKED,
    NOISE,
    SILOS,
    STALE,
    STATISTIC,
    Around,
    Part,
    Trait,
    check_composition,
)
from fedlora.server.method import Setup
from fedlora.server.postprocess import Bound
from fedlora.server.schedule import Rounds
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA


@dataclass(frozen=True)
class Picky(Part):
    """Goes with anything but a robust statistic and stale changes."""

    @property
    def traits(self) -> frozenset[str]:
        return frozenset({NOISE})

    @property
    def refuses(self) -> Mapping[str, str]:
        return {STATISTIC: "its sensitivity is not known; use a sum", STALE: "use rounds"}


@dataclass(frozen=True)
class Narrow(Part):
    """Refuses settings of other groups."""

    def check(self, around: Around) -> None:
        raise ValueError(f"min_success={around.rounds.min_success} is too little")


def around(strategy: FedIT | FlexLoRA | None = None) -> Around:
    return Around(strategy or FedIT(), Setup(LocalPlan()), Rounds())


def test_what_nobody_refuses_composes() -> None:
    check_composition({}, around(FlexLoRA()))
    check_composition(
        {"privacy=client": Picky(), "postprocess=bound": Bound(), "secagg=on": Trait(MASKED)},
        around(),
    )
    check_composition({"runtime=silos": Trait(SILOS)}, around(FlexLoRA()))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("trait", "why"), [(STATISTIC, "use a sum"), (STALE, "use rounds")])
def test_one_rule_is_enough_in_any_order(first: bool, trait: str, why: str) -> None:
    parts: dict[str, Part] = {"privacy=client": Picky(), "robust=median": Trait(trait)}
    if first:
        parts = dict(reversed(parts.items()))
    with pytest.raises(ValueError, match=rf"^privacy=client with robust=median: .*{why}$"):
        check_composition(parts, around())


def test_a_part_refuses_settings_and_methods_without_sums() -> None:
    with pytest.raises(ValueError, match=r"^narrow=on: min_success=0.5 is too little$"):
        check_composition({"narrow=on": Narrow()}, around())
    with pytest.raises(ValueError, match=r"^postprocess=bound: .*residual=carry"):
        check_composition({"postprocess=bound": Bound()}, around(FlexLoRA()))
