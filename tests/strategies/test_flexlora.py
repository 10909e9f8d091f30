"""FlexLoRA: exact before truncation, best after it; what is lost, what can be carried over."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fedlora.algebra.linalg import (
    BACKENDS,
    SPLITS,
    coverage,
    covered_weights,
    exactness_gap,
    normalize,
    stack,
    svd,
)
from fedlora.algebra.server_optimizer import FedAvgM
from fedlora.algebra.spectrum import geometric
from fedlora.algebra.state import State
from fedlora.core.types import Factors, Ranks, Setting, Update
from strategies.flexlora import FlexLoRA
from tests.generators import (
    dense,
    seeds,
    setting,
    single_module_setting,
    vector_updates,
    weighted_delta,
)
from tests.strategies.laws import after_rounds, close, cohort


def truncated(w: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def whole(state: State, rule: FlexLoRA | None = None) -> dict[str, Tensor]:
    return dense((rule or FlexLoRA()).global_update(state))


def untouched(rule: FlexLoRA, state: State, population: Setting) -> list[Update]:
    """A round in which nobody trains."""
    return [
        Update(client=c, payload=rule.client_start(state, c), num_examples=c.num_examples)
        for c in population.clients
    ]


def test_v1_through_the_hooks() -> None:
    population = single_module_setting(6, 5, (1, 2, 3), alpha=4.0)
    rule = FlexLoRA()
    state = rule.aggregate(rule.init_state(population), vector_updates((1, 2, 3)))
    w = whole(state)["w"]
    assert float(w.square().sum()) == pytest.approx(5.61351370077, rel=1e-11)
    for r, norm in ((1, 0.468264563483), (2, 1.08946873226), (5, 2.96160685396)):
        f = rule.global_update(state, Ranks({"w": r}))["w"]
        assert float(f.b.norm()) == pytest.approx(norm, rel=1e-11)
        close(f.delta(), truncated(w, r))


def test_v5_through_the_hooks() -> None:
    population = single_module_setting(6, 5, (1, 2, 3), alpha=4.0)
    rule = FlexLoRA(weighting="covered")
    state = rule.aggregate(rule.init_state(population), vector_updates((1, 2, 3)))
    assert float(whole(state)["w"].norm()) == pytest.approx(4.02866748949, rel=1e-11)


@pytest.mark.parametrize("trains", [False, True])
@given(seed=seeds)
def test_singular_values_are_those_of_the_geometric_prediction(trains: bool, seed: int) -> None:
    """Clients add the same to each direction that they hold, in every round or in the first."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, 3, generator=g, dtype=torch.float64))[0] for n in (6, 5))
    added = torch.rand(3, generator=g, dtype=torch.float64).add(0.1).sort(descending=True).values
    population = single_module_setting(6, 5, (1, 2, 3), alpha=4.0)
    rule, measured, covers = FlexLoRA(), [], []
    state = rule.init_state(population)
    for t in range(5):
        some = population.clients[t % 2 :] if t else population.clients
        updates = []
        for c in some:
            start, r = rule.client_start(state, c)["w"], c.ranks["w"]
            end = start.delta() + float(trains or not t) * (u[:, :r] * added[:r]) @ v[:, :r].T
            left, s, right = torch.linalg.svd(end, full_matrices=False)
            sent = Factors(right[:r], (left[:, :r] * s[:r]) / start.scale, start.alpha)
            updates.append(Update(client=c, payload={"w": sent}, num_examples=c.num_examples))
        state = rule.aggregate(state, updates)
        measured.append(torch.linalg.svdvals(whole(state)["w"])[:3])
        weights = normalize([c.num_examples for c in some])
        covers.append(coverage(weights, [c.ranks["w"] for c in some]))
    wanted = geometric(measured[0], covers, refilled=trains)
    close(torch.stack(measured), wanted)


@pytest.mark.parametrize("split", SPLITS)
@given(seed=seeds)
def test_every_rank_gets_the_best_of_it(split: str, seed: int) -> None:
    """P1 to P3 through the hooks, for every split and every tier."""
    population, rule = setting(), FlexLoRA(svd_split=split)
    state, updates = after_rounds(rule, population, seed)
    after = rule.aggregate(state, updates)
    p = normalize([u.num_examples for u in updates])
    for path, w in whole(after, rule).items():
        close(w, weighted_delta([u.adapter[path] for u in updates], p))
    for c in population.clients:
        for path, f in rule.client_start(after, c).items():
            close(f.delta(), truncated(whole(after)[path], c.ranks[path]))


def test_in_the_first_round_everybody_gets_a_prefix_of_one_initialisation() -> None:
    population, rule = setting(), FlexLoRA()
    state = rule.init_state(population)
    largest = rule.client_start(state, population.clients[3])
    for c in population.clients:
        for path, f in rule.client_start(state, c).items():
            assert torch.equal(f.a, largest[path].a[: f.rank])
            assert not bool(f.b.any())


def test_a_is_orthonormal_beyond_the_rank_of_the_update_too() -> None:
    """P6, P12: a lone client of the smallest tier, starts for the largest."""
    population, rule = setting(), FlexLoRA()
    state = rule.init_state(population)
    after = rule.aggregate(state, cohort(rule, state, population, seed=4)[:1])
    for f in rule.client_start(after, population.clients[3]).values():
        eye = torch.eye(f.rank, dtype=torch.float64)
        close(f.a @ f.a.T, eye)
        assert not bool(f.b[:, 2:].any())


def test_untrained_directions_are_forgotten_or_carried() -> None:
    """P18, P21: a cohort of small clients that does not train."""
    big = setting(("T4", "T4"))
    small = dataclasses.replace(big, clients=setting(("T2", "T2")).clients)
    for weighting in ("all", "covered"):
        drop = FlexLoRA(weighting=weighting)
        carry = FlexLoRA(weighting=weighting, residual="carry")
        state, _ = after_rounds(drop, big, seed=5)
        w = whole(state)
        kept = whole(carry.aggregate(state, untouched(carry, state, small)))
        left = whole(drop.aggregate(state, untouched(drop, state, small)))
        for path in w:
            close(kept[path], w[path])
            close(left[path], truncated(w[path], 2))
            lost = svd(w[path]).s[2:].square().sum()
            gone = (w[path] - left[path]).square().sum()
            assert float(gone) == pytest.approx(float(lost), rel=1e-12)


@given(seed=seeds)
def test_carrying_adds_what_the_clients_could_not_hold(seed: int) -> None:
    """P18: ``W + Σ p_k (s_k B_k A_k - T_{r_k}(W))``; like drop where every rank holds W."""
    population, carry, drop = setting(), FlexLoRA(residual="carry"), FlexLoRA()
    state, updates = after_rounds(carry, population, seed)
    w, after = whole(state), whole(carry.aggregate(state, updates))
    p = normalize([u.num_examples for u in updates])
    for path in w:
        want = w[path].clone()
        for share, u in zip(p, updates, strict=True):
            f = u.adapter[path]
            want += share * (f.delta() - truncated(w[path], f.rank))
        close(after[path], want)
    smallest = drop.aggregate(
        drop.init_state(population), cohort(drop, drop.init_state(population), population, seed)[:1]
    )
    able = [u for u in cohort(drop, smallest, population, seed + 1) if u.client.tier != "T1"]
    able = [u for u in able if all(r >= 2 for r in u.client.ranks.values())]
    one, two = whole(carry.aggregate(smallest, able)), whole(drop.aggregate(smallest, able))
    for path in one:
        close(one[path], two[path])


def test_carrying_by_slices_follows_its_equation() -> None:
    """With rank-partitioned weights: ``W + Σ_k Σ_i w_k^i (update - start)_i``."""
    population, rule = setting(), FlexLoRA(weighting="covered", residual="carry")
    state, updates = after_rounds(rule, population, seed=6)
    after = whole(rule.aggregate(state, updates))
    p = normalize([u.num_examples for u in updates])
    for path, w in whole(state).items():
        fs = [u.adapter[path] for u in updates]
        weights = covered_weights(p, [f.rank for f in fs])
        starts = [rule.client_start(state, u.client)[path] for u in updates]
        b, a = stack(fs, weights)
        b0, a0 = stack(starts, weights)
        close(after[path], w + b @ a - b0 @ a0)


def test_equal_ranks_make_the_weightings_equal() -> None:
    """P20."""
    population = setting(("T3",) * 4)
    state, updates = after_rounds(FlexLoRA(), population, seed=7)
    one, two = (whole(FlexLoRA(weighting=w).aggregate(state, updates)) for w in ("all", "covered"))
    for path in one:
        close(one[path], two[path])


@pytest.mark.parametrize("residual", ["drop", "carry"])
def test_server_momentum_of_zero_is_plain_averaging(residual: str) -> None:
    population = setting()
    plain = FlexLoRA(residual=residual)
    other = FlexLoRA(residual=residual, server_optimizer=FedAvgM(lr=1.0, momentum=0.0))
    left, right = plain.init_state(population), other.init_state(population)
    for t in range(3):
        updates = cohort(plain, left, population, seed=t)
        left, right = plain.aggregate(left, updates), other.aggregate(right, updates)
    one, two = whole(left, plain), whole(right, other)
    for path in one:
        close(one[path], two[path])


def test_server_momentum_acts_on_the_dense_update() -> None:
    population = setting()
    rule = FlexLoRA(server_optimizer=FedAvgM(lr=0.5, momentum=0.9))
    state = rule.init_state(population)
    w: dict[str, Any] = dict.fromkeys(whole(state), 0.0)
    v = dict(w)
    for t in range(3):
        updates = cohort(rule, state, population, seed=t)
        state = rule.aggregate(state, updates)
        p = normalize([u.num_examples for u in updates])
        for path in w:
            target = weighted_delta([u.adapter[path] for u in updates], p)
            v[path] = 0.9 * v[path] + (target - w[path])
            w[path] = w[path] + 0.5 * v[path]
            close(whole(state, rule)[path], w[path])


@pytest.mark.parametrize(
    ("backend", "tolerance"), [("dense", 1e-12), ("core", 1e-12), ("gram", 1e-6), ("random", 1e-6)]
)
def test_backends_give_the_same_starts(backend: str, tolerance: float) -> None:
    """P11 through the hooks. The sketch keeps what the largest client can hold.

    Two backends are not exact: Gram matrices square the condition number, a sketch approximates.
    """
    population = setting()
    state, updates = after_rounds(FlexLoRA(), population, seed=8)
    one, two = (FlexLoRA(backend=b).aggregate(state, updates) for b in ("auto", backend))
    for c in population.clients:
        starts = FlexLoRA().client_start(one, c), FlexLoRA().client_start(two, c)
        for x, y in zip(*(dense(s).values() for s in starts), strict=True):
            close(y, x, tolerance)


def test_one_step_of_sgd_from_the_first_start() -> None:
    """P19: with B = 0, A does not move and dB = -lr s g (A x)ᵀ."""
    population, rule = setting(), FlexLoRA()
    f = next(iter(rule.client_start(rule.init_state(population), population.clients[3]).values()))
    a, b = f.a.double().requires_grad_(), f.b.double().requires_grad_()
    x, g = torch.arange(5.0).double(), torch.arange(6.0).double() - 2
    (f.scale * (b @ (a @ x)) @ g).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert not bool(a.grad.any())
    close(b.grad, f.scale * torch.outer(g, (a @ x).detach()))


def test_options_are_checked() -> None:
    for key, value in {
        "weights": "n",
        "weighting": "some",
        "svd_split": "c",
        "residual": "keep",
        "backend": "fast",
    }.items():
        with pytest.raises(ValueError, match=rf"strategy\.{key}='{value}' is not one of"):
            FlexLoRA(**{key: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="promises to keep: choose residual=drop, or backend="):
        FlexLoRA(residual="carry", backend="random")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "random"])
def test_whoever_may_carry_carries_everything(backend: str) -> None:
    """P21 with more in W than even the largest client holds: nobody trains, nothing is lost."""
    population = single_module_setting(9, 8, (1, 2, 2))
    rule = FlexLoRA(residual="carry", backend=backend)
    state, _ = after_rounds(rule, population, seed=9)
    w = whole(state)["w"]
    assert svd(w).rank > 2
    kept = whole(rule.aggregate(state, untouched(rule, state, population)))["w"]
    close(kept, w, 1e-6 if backend == "gram" else 1e-12)


def test_the_reference_of_the_gap_is_what_is_averaged() -> None:
    updates = vector_updates((1, 2, 3))
    assert FlexLoRA().reference_weights(updates) == [10, 20, 30]
    assert FlexLoRA(weights="uniform").reference_weights(updates) == [1, 1, 1]
    population = single_module_setting(6, 5, (1, 2, 3), alpha=4.0)
    for weights in ("examples", "uniform"):
        rule = FlexLoRA(weights=weights)
        found = rule.global_update(rule.aggregate(rule.init_state(population), updates))
        assert exactness_gap(updates, rule.reference_weights(updates), found)["relative"] < 1e-7
