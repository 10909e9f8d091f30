"""HeteroLoRA: truncation, weights, padding, scale and pruning."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.types import Factors, LocalPlan, Ranks
from fedlora.techniques.lora.self_pruning import SelfPrune, prune_adapter, shrunk_rank
from fedlora.techniques.lora.technique import LoRA
from strategies.heterolora import HeteroLoRA, padded_average, sparsity_shares
from tests.generators import (
    dense,
    numbers,
    seeds,
    setting,
    single_module_setting,
    trained,
    vector_factors,
    vector_updates,
)
from tests.strategies.laws import after_rounds, close, cohort

RANKS = (1, 2, 3)


def test_v3_weights_and_padding() -> None:
    fs = [vector_factors(k, r) for k, r in enumerate(RANKS)]
    raw = [float((f.b @ f.a).norm()) for f in fs]
    q = sparsity_shares(raw, (10, 20, 30), "sparsity")
    assert q == pytest.approx([0.281245800311, 0.336716817369, 0.38203738232], rel=1e-11)
    absorbed = [f.scale * n for f, n in zip(fs, raw, strict=True)]
    scaled = sparsity_shares(absorbed, (10, 20, 30), "sparsity")
    assert scaled == pytest.approx([0.48746996932, 0.291807622462, 0.220722408219], rel=1e-11)
    a, b = padded_average(fs, q, 3, absorb=False)
    assert float(b.norm()) == pytest.approx(2.16131118498, rel=1e-11)
    assert float(a.norm()) == pytest.approx(0.850931505526, rel=1e-11)
    assert float((b @ a).norm()) == pytest.approx(1.06940968249, rel=1e-11)
    close(b[0], numbers("0.493834172746 -0.420229716574 -0.345964786906"), 1e-11)
    close(a[:, 0], numbers("-0.250539646126 -0.0473015262368 0.322383757454"), 1e-11)


def test_v3_through_the_hooks() -> None:
    population, rule = single_module_setting(6, 5, RANKS, alpha=4.0), HeteroLoRA(scale="raw")
    state = rule.aggregate(rule.init_state(population), vector_updates(RANKS))
    f = rule.global_update(state)["w"]
    assert float((f.b @ f.a).norm()) == pytest.approx(1.06940968249, rel=1e-11)
    client = rule.client_start(state, population.clients[1])["w"]
    close(client.a, f.a[:2])
    close(client.b, f.b[:, :2])


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=6), st.floats(0.1, 10))
def test_weights_sum_to_one_and_ignore_the_scale(norms: list[float], c: float) -> None:
    """P14."""
    examples = [k + 1 for k in range(len(norms))]
    for weights in ("sparsity", "examples", "examples_sparsity"):
        q = sparsity_shares(norms, examples, weights)
        assert sum(q) == pytest.approx(1)
        assert sparsity_shares([c * x for x in norms], examples, weights) == pytest.approx(q)
    assert sparsity_shares([0.0, 0.0], [1, 9], "sparsity") == [0.5, 0.5]


def test_equal_ranks_and_norms_give_the_plain_average() -> None:
    """P14."""
    population, rule = single_module_setting(6, 5, (3, 3)), HeteroLoRA()
    f = vector_factors(0, 3, alpha=12.0)
    other = Factors(f.a.flip(1), f.b, f.alpha)
    updates = [
        dataclasses.replace(u, payload={"w": x})
        for u, x in zip(vector_updates((3, 3, 3)), (f, other), strict=False)
    ]
    found = rule.global_update(rule.aggregate(rule.init_state(population), updates))["w"]
    close(found.a, (f.a + other.a) / 2)
    close(found.b, f.b)


def test_padding_contributes_nothing() -> None:
    fs = [vector_factors(0, 1), vector_factors(1, 3)]
    a, b = padded_average(fs, [0.5, 0.5], 4, absorb=False)
    close(a[1:3], 0.5 * fs[1].a[1:])
    close(b[:, 1:3], 0.5 * fs[1].b[:, 1:])
    assert not bool(a[3].any() or b[:, 3].any())


def test_the_first_round_sends_the_initialisation_itself() -> None:
    population = setting()
    for rule in (HeteroLoRA(), HeteroLoRA(scale="raw")):
        state = rule.init_state(population)
        largest = rule.client_start(state, population.clients[3])
        for c in population.clients:
            for path, f in rule.client_start(state, c).items():
                assert torch.equal(f.a, largest[path].a[: f.rank])
                assert not bool(f.b.any())


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_scope_of_the_norm(scope: str) -> None:
    population, rule = setting(("T2", "T2")), HeteroLoRA(norm_scope=scope)
    state = rule.init_state(population)
    updates = cohort(rule, state, population, seed=3)
    squares = [{p: float(d.square().sum()) for p, d in dense(u.payload).items()} for u in updates]
    after = rule.global_update(rule.aggregate(state, updates))
    for path, f in after.items():
        norms = [(sum(s.values()) if scope == "model" else s[path]) ** 0.5 for s in squares]
        q = norms[0] / sum(norms)
        close(f.a, q * updates[0].adapter[path].a + (1 - q) * updates[1].adapter[path].a)


def test_rows_that_nobody_returned_are_kept_or_restarted() -> None:
    population = setting()
    for rule in (HeteroLoRA(), HeteroLoRA(uncovered="zero")):
        state, updates = after_rounds(rule, population, seed=4)
        before = rule.client_start(state, population.clients[3])
        fresh = rule.client_start(rule.init_state(population), population.clients[3])
        after = rule.client_start(rule.aggregate(state, updates[:1]), population.clients[3])
        for path, f in after.items():
            r = updates[0].client.ranks[path]
            if rule.uncovered == "keep":
                close(f.a[r:], before[path].a[r:])
                close(f.b[:, r:], before[path].b[:, r:])
            else:
                close(f.a[r:], fresh[path].a[r:].double())
                assert not bool(f.b[:, r:].any())


def test_a_client_of_weight_zero_covers_nothing() -> None:
    """Its rows would become zero in both factors: dead for ever."""
    population, rule = setting(("T1", "T4")), HeteroLoRA()
    state = rule.init_state(population)
    moved = cohort(rule, state, population, seed=1)
    still = dataclasses.replace(moved[1], payload=rule.client_start(state, moved[1].client))
    after = rule.aggregate(state, [moved[0], still])
    for f in rule.client_start(after, population.clients[1]).values():
        assert bool((f.a.norm(dim=1) > 1e-6).all())


def test_the_plan_asks_for_pruning() -> None:
    population, base = setting(), LocalPlan(lr=0.3)
    rule = HeteroLoRA(gamma=0.7, penalty_weight=0.25, min_rank=2)
    state = rule.init_state(population)
    plan = rule.plan(state, population.clients[0], base)
    assert plan == dataclasses.replace(base, technique=LoRA(SelfPrune(0.25, 0.7, 2)))
    assert HeteroLoRA(prune=False).plan(state, population.clients[0], base) == base


@given(seed=seeds)
def test_pruned_clients_stay_pruned(seed: int) -> None:
    """P15: ranks never grow, others keep theirs, and the next start has the new rank."""
    population, rule = setting(), HeteroLoRA(gamma=0.7)
    state = rule.init_state(population)
    prune = SelfPrune(rule.penalty_weight, rule.gamma, rule.min_rank)
    client = population.clients[3]
    want = client.ranks
    for t in range(4):
        e = rule.enlist(state, client)
        assert e == dataclasses.replace(client, ranks=want)
        start = rule.client_start(state, e)
        assert Ranks({p: f.rank for p, f in start.items()}) == want
        payload = prune_adapter(trained(start, seed + t), prune)
        want = Ranks({path: shrunk_rank(r, prune) for path, r in want.items()})
        update = dataclasses.replace(
            cohort(rule, state, population, seed)[3],
            client=dataclasses.replace(e, ranks=want),
            payload=payload,
        )
        state = rule.aggregate(state, [update])
        for other in population.clients:
            if other.id != client.id:
                assert rule.enlist(state, other) is other
    assert want == Ranks(dict.fromkeys(want, 1))


def test_continuing_from_an_update_needs_one_scale() -> None:
    population = setting()
    g = torch.Generator().manual_seed(1)
    delta = {
        m.path: torch.randn(m.d_out, m.d_in, generator=g, dtype=torch.float64)
        for m in population.modules
    }
    rule = HeteroLoRA()
    state = rule.adopt(rule.init_state(population), delta)
    for c in population.clients:
        for path, f in rule.client_start(state, c).items():
            u, s, v = torch.linalg.svd(delta[path], full_matrices=False)
            close(f.delta(), (u[:, : f.rank] * s[: f.rank]) @ v[: f.rank])
    raw = HeteroLoRA(scale="raw")
    with pytest.raises(ValueError, match="choose scale=absorb"):
        raw.adopt(raw.init_state(population), delta)
    equal = setting(("T3", "T3"))
    found = raw.client_start(raw.adopt(raw.init_state(equal), delta), equal.clients[0])
    for path, f in found.items():
        u, s, v = torch.linalg.svd(delta[path], full_matrices=False)
        close(f.delta(), (u[:, : f.rank] * s[: f.rank]) @ v[: f.rank])


def test_options_are_checked() -> None:
    for key, value in {
        "weights": "n",
        "norm_scope": "block",
        "scale": "none",
        "uncovered": "drop",
        "gamma": 0.0,
        "min_rank": 0,
        "penalty_weight": -1.0,
    }.items():
        with pytest.raises(ValueError, match=rf"strategy\.{key}="):
            HeteroLoRA(**{key: value})  # type: ignore[arg-type]
    rule, population = HeteroLoRA(), setting()
    with pytest.raises(ValueError, match="exceeds the global rank"):
        rule.global_update(
            rule.init_state(population), Ranks(dict.fromkeys(population.max_ranks, 7))
        )
