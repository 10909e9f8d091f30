"""Faults of released code of FLoRA, FedEx-LoRA and FedMomentum, and the laws that catch them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fedlora.algebra.state import State
from fedlora.core.types import Factors, Update
from fedlora.techniques.lora.payload import LowRankPayload
from strategies.rebase import Rebase
from tests.strategies.laws import DISTRIBUTIONS, close
from tests.strategies.test_planted_faults import with_hook
from tests.strategies.test_rebase import (
    FEDEX,
    FEDEX_OWN,
    FLORA,
    MOMENTUM,
    NAMES,
    after_one,
    cohort_of,
    g_of,
    mean_of,
    pair_of,
    the_global_model_is_the_mean_of_the_clients,
)


def residual_transposed(rule: Rebase, right: Callable[..., State], *arguments: Any) -> State:
    """CERT-Lab/fedex-lora: invisible in the shapes of a square layer (FEDEX-7)."""
    state = dict(right(*arguments))
    pair = pair_of(state)
    return state | {"shift/w/d": pair.delta() + (g_of(state) - pair.delta()).T}


def residual_without_scale(rule: Rebase, right: Callable[..., State], *arguments: Any) -> State:
    """FedLLM-Factory's FedEx and FedMomentum (FEDEX-8, FMOM-2)."""
    state = dict(right(*arguments))
    pair = pair_of(state)
    rest = (g_of(state) - pair.delta()) / pair.scale
    return state | {"shift/w/d": pair.delta() + rest}


def one_scale_for_the_stack(
    rule: Rebase, right: Callable[..., State], state: State, updates: Sequence[Update]
) -> State:
    """The released code of FLoRA at unequal ranks of one alpha (FLORA-6)."""
    ranks = [u.adapter["w"].rank for u in updates]
    wrong = []
    for u in updates:
        f = u.adapter["w"]
        scale = f.alpha * len(ranks) / sum(ranks) / f.scale
        spoilt = LowRankPayload({"w": Factors(f.a, scale * f.b, f.alpha)})
        wrong.append(dataclasses.replace(u, payload=spoilt))
    return right(state, wrong)


def means_unweighted(
    rule: Rebase, right: Callable[..., State], state: State, updates: Sequence[Update]
) -> State:
    """Products are weighted and factors are not; the residual is taken against the weighted."""
    weighted = dict(right(state, updates))
    plain = pair_of(right(state, [dataclasses.replace(u, num_examples=1) for u in updates]))
    rest = g_of(weighted) - pair_of(weighted).delta()
    return weighted | {"shift/w/d": rest + plain.delta()}


def held_counted_twice(
    rule: Rebase, right: Callable[..., State], state: State, updates: Sequence[Update]
) -> State:
    """Clients' products are added whole, with what they had started from."""
    after = dict(right(state, updates))
    for key in (k for k in after if k.startswith("hold/") and k.endswith("/a")):
        path = key[len("hold/") : -len("/a")]
        held = Factors(state[key], state[f"hold/{path}/b"], float(state["alpha"]))
        after[f"shift/{path}/d"] = after[f"shift/{path}/d"] + held.delta()
    return after


@pytest.mark.parametrize("rule", [FEDEX, FEDEX_OWN, MOMENTUM], ids=NAMES[2:5])
def test_a_fault_of_later_rounds_is_caught(rule: Rebase) -> None:
    broken = with_hook(rule, "aggregate", held_counted_twice)
    with pytest.raises(AssertionError, match="round 1"):
        the_global_model_is_the_mean_of_the_clients(broken, DISTRIBUTIONS["uniform"])


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        (FEDEX, residual_transposed),
        (FEDEX, residual_without_scale),
        (FEDEX, means_unweighted),
        (Rebase(hold="svd", heterogeneous="smallest"), residual_without_scale),
        (Rebase(hold="svd", heterogeneous="smallest"), residual_transposed),
        (FLORA, one_scale_for_the_stack),
    ],
)
def test_a_planted_fault_is_caught(rule: Rebase, fault: Callable[..., State]) -> None:
    """On a square layer, where shapes do not tell."""
    ranks = (2, 3, 1, 4) if rule is FLORA else (2, 2, 2, 2)
    updates = cohort_of(ranks, 10, 10)
    right, broken = rule, with_hook(rule, "aggregate", fault)
    close(g_of(after_one(right, updates, 10, 10)), mean_of(updates))
    with pytest.raises(AssertionError, match="error"):
        close(g_of(after_one(broken, updates, 10, 10)), mean_of(updates), tolerance=1e-3)
