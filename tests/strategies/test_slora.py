"""SLoRA: sparse averages, the switch to low rank, and the rule it goes on with."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.algebra.linalg import factors_of_rank, svd
from fedlora.core.seeding import mask_noise
from fedlora.core.types import LocalPlan, Ranks, Update
from fedlora.techniques.lora.technique import LoRA
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.techniques.sparse.technique import Sparse
from strategies.base import LoRAStrategy
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.slora import CODE_DENSITY, SLoRA, sparse_step
from tests.generators import MODULES, dense, numbers, seeds, setting
from tests.strategies.laws import after_rounds, close, cohort


def v4() -> torch.Tensor:
    return torch.tensor(
        [
            [((3 * i + 5 * j) % 7 - 3) / 10 if (5 * i + j) % 2 == 0 else 0.0 for j in range(5)]
            for i in range(6)
        ],
        dtype=torch.float64,
    )


def test_v4_the_start_of_stage_two() -> None:
    d = v4()
    assert int((d != 0).sum()) == 13
    assert float(d.norm()) == pytest.approx(0.80622577483, rel=1e-10)
    found = svd(d)
    values = "0.495262870529 0.481459654462 0.39110183354 0.108416072964 0.0905350822886"
    close(found.s, numbers(values), 1e-10)
    f = factors_of_rank(found, 2, 16.0, "b", torch.eye(5, dtype=torch.float64))
    assert float(f.b.norm()) == pytest.approx(0.0863395105999, rel=1e-10)
    assert float(f.a.norm()) == pytest.approx(2**0.5, rel=1e-12)
    assert float((d - f.delta()).norm()) == pytest.approx(0.415826033577, rel=1e-10)


@given(seeds, st.sampled_from(["plain", "coverage"]))
def test_the_sparse_average_follows_its_equation(seed: int, rule: str) -> None:
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(6, 5, generator=g, dtype=torch.float64)
    noise = mask_noise(seed, "w", 6, 5)
    densities, p = [0.2, 0.5, 0.5, 0.9], [0.1, 0.2, 0.3, 0.4]
    masks = [noise < d for d in densities]
    values = [torch.randn(int(m.sum()), generator=g, dtype=torch.float64) for m in masks]
    change, cover = torch.zeros_like(old), torch.zeros_like(old)
    for w, mask, v in zip(p, masks, values, strict=True):
        own = old.clone()
        own[mask] = v
        change += w * (own - old)
        cover += w * mask.double()
    if rule == "coverage":
        change[cover > 0] /= cover[cover > 0]
    close(sparse_step(old, noise, values, densities, p, rule), old + change)


def test_masks_are_nested_and_nothing_else_moves() -> None:
    """P16: the support of D stays inside the largest mask, and the base is never touched."""
    population, rule = setting(), SLoRA(aggregator=FlexLoRA(), stage1_rounds=9)
    state, _ = after_rounds(rule, population, seed=1, rounds=3)
    payload = rule.global_update(state)
    assert isinstance(payload, SparseDelta)
    d = dense(payload)
    smaller = [rule.client_start(state, c) for c in population.clients[:4]]
    densities = [s.density for s in smaller if isinstance(s, SparseDelta)]
    assert densities == sorted(densities)
    assert len(set(densities)) == 4
    for m in MODULES:
        noise = mask_noise(population.seed, m.path, m.d_out, m.d_in)
        on_server = state[f"sparse/{m.path}/delta"]
        assert bool((on_server[noise >= max(densities)] == 0).all())
        close(d[m.path], on_server.double())
        for small, large in itertools.pairwise(densities):
            assert bool(((noise < small) <= (noise < large)).all())


def test_the_density_is_the_lora_budget() -> None:
    population = setting(parameters=700)
    state = SLoRA(aggregator=FlexLoRA()).init_state(population)
    start = SLoRA(aggregator=FlexLoRA()).client_start(state, population.clients[2])
    assert isinstance(start, SparseDelta)
    assert start.density == (2 * 11 + 5 * 16 + 2 * 13) / 700
    tiny = setting(parameters=10)
    full = SLoRA(aggregator=FlexLoRA()).init_state(tiny)
    assert float(full["sparse/densities"].max()) == 1


def test_other_densities() -> None:
    population = setting()
    for option, want in (("code", list(CODE_DENSITY.values())), ("0.25", [0.25] * 4)):
        rule = SLoRA(aggregator=FlexLoRA(), density=option)
        state = rule.init_state(population)
        starts = [rule.client_start(state, c) for c in population.clients[:4]]
        assert [s.density for s in starts if isinstance(s, SparseDelta)] == want
    odd = dataclasses.replace(
        population, clients=(dataclasses.replace(population.clients[0], tier="phone"),)
    )
    with pytest.raises(ValueError, match=r"density=code knows the tiers .* not 'phone'"):
        SLoRA(aggregator=FlexLoRA(), density="code").init_state(odd)
    for wrong in ("dense", "1.5", "nan"):
        with pytest.raises(ValueError, match=r"strategy\.density="):
            SLoRA(aggregator=FlexLoRA(), density=wrong)


def test_stage_one_neither_decays_nor_prunes() -> None:
    population = setting()
    rule = SLoRA(aggregator=HeteroLoRA(), stage1_rounds=1)
    base = LocalPlan(lr=0.02, weight_decay=0.1)
    state, updates = after_rounds(rule, population, seed=1, rounds=0)
    plan = rule.plan(state, population.clients[0], base)
    assert plan == dataclasses.replace(base, technique=Sparse(), weight_decay=0.0)
    after = rule.aggregate(state, updates)
    second = rule.plan(after, population.clients[0], base)
    assert isinstance(second.technique, LoRA) and second.technique.self_prune is not None
    assert dataclasses.replace(second, technique=LoRA()) == base


@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1.0))
def test_the_step_size_of_stage_one_follows_the_rounds(scale: float, decay: float) -> None:
    """The plan comes with the round's decay in it; stage 1 scales that, stage 2 takes it."""
    population = setting()
    rule = SLoRA(aggregator=FlexLoRA(), stage1_rounds=1, stage1_lr_scale=scale)
    state, updates = after_rounds(rule, population, seed=1, rounds=0)
    first, later = LocalPlan(lr=0.02), LocalPlan(lr=0.02 * decay)
    client = population.clients[0]
    lr = [rule.plan(state, client, base).lr for base in (first, later)]
    assert lr[1] == pytest.approx(decay * lr[0], rel=1e-12)
    assert lr[0] == pytest.approx(scale * 0.02, rel=1e-12)
    assert rule.plan(rule.aggregate(state, updates), client, later) == later


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_step_size_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"strategy\.stage1_lr_scale="):
        SLoRA(aggregator=FlexLoRA(), stage1_lr_scale=scale)


def test_a_constant_density_is_that_of_any_ranks() -> None:
    """Ranks that nobody in the population holds, too: only a budget depends on ranks."""
    population = setting()
    strange = Ranks(dict.fromkeys(population.max_ranks, 3))
    assert strange not in population.rank_patterns
    wanted = {"0.25": 0.25, "budget": 3 * (11 + 16 + 13) / 700, "code": 3 * (11 + 16 + 13) / 700}
    for option, density in wanted.items():
        rule = SLoRA(aggregator=FlexLoRA(), density=option)
        found = rule.global_update(rule.init_state(population), strange)
        assert isinstance(found, SparseDelta)
        assert found.density == density


def test_the_reference_of_the_gap_is_the_stages() -> None:
    population = setting()
    rule = SLoRA(aggregator=FlexLoRA(weights="uniform"), stage1_rounds=1)
    state, sparse = after_rounds(rule, population, seed=1, rounds=0)
    factors = cohort(rule, rule.aggregate(state, sparse), population, seed=2)
    examples = [c.num_examples for c in population.clients]
    assert rule.reference_weights(sparse) == examples
    assert rule.reference_weights(factors) == [1.0] * len(examples)
    other = SLoRA(aggregator=HeteroLoRA(), stage1_rounds=1, weights="uniform")
    assert other.reference_weights(sparse) == [1.0] * len(examples)
    assert other.reference_weights(factors) == examples


@pytest.mark.parametrize(
    "aggregator",
    [FlexLoRA(), FlexLoRA(residual="carry"), FlexLoRA(svd_split="balanced"), HeteroLoRA(), FedIT()],
    ids=["flexlora", "carry", "balanced", "heterolora", "fedit"],
)
@pytest.mark.parametrize("tiers", [("T1", "T2", "T3", "T4"), ("T4", "T4")])
def test_the_switch_keeps_what_each_rank_can_hold(
    aggregator: LoRAStrategy, tiers: tuple[str, ...]
) -> None:
    """P17: W_0 + s B A is W_0 + T_r(D), once: neither twice nor not at all."""
    population = setting(tiers)
    rule = SLoRA(aggregator=aggregator, stage1_rounds=3)
    state, updates = after_rounds(rule, population, seed=2, rounds=2)
    longer = SLoRA(aggregator=aggregator, stage1_rounds=4)
    sparse, switched = longer.aggregate(state, updates), rule.aggregate(state, updates)
    d = {m.path: sparse[f"sparse/{m.path}/delta"] for m in MODULES}
    assert all(bool(x.any()) for x in d.values())
    for c in population.clients:
        e = rule.enlist(switched, c)
        start = rule.client_start(switched, e)
        assert not isinstance(start, SparseDelta)
        for path, f in start.items():
            u, s, v = torch.linalg.svd(d[path], full_matrices=False)
            close(f.delta(), (u[:, : f.rank] * s[: f.rank]) @ v[: f.rank])
            if f.rank >= svd(d[path]).rank:
                close(f.delta(), d[path])


def test_the_rounds_after_the_switch_are_the_aggregators() -> None:
    population = setting()
    rule, inner = SLoRA(aggregator=FlexLoRA(), stage1_rounds=1), FlexLoRA()
    state, _ = after_rounds(rule, population, seed=3, rounds=1)
    nested = inner.adopt(inner.init_state(population), dense(rule.global_update(state)))
    for t in range(2):
        updates = cohort(rule, state, population, seed=5 + t)
        state, nested = rule.aggregate(state, updates), inner.aggregate(nested, updates)
    one, two = dense(rule.global_update(state)), dense(inner.global_update(nested))
    for path in one:
        close(one[path], two[path])


def test_without_stage_one_it_is_the_aggregator() -> None:
    population = setting()
    rule, inner = SLoRA(aggregator=FlexLoRA(), stage1_rounds=0), FlexLoRA()
    state, updates = after_rounds(rule, population, seed=4)
    nested, same = after_rounds(inner, population, seed=4)
    for u, v in zip(updates, same, strict=True):
        for path, f in u.adapter.items():
            assert torch.equal(f.b, v.adapter[path].b)
    assert int(state["rounds"]) == 1
    assert {k.removeprefix("aggregator/") for k in state} == {*nested, "rounds"}


def test_what_cannot_be_continued_is_refused_before_the_first_round() -> None:
    rule = SLoRA(aggregator=HeteroLoRA(scale="raw"))
    with pytest.raises(ValueError, match="choose scale=absorb"):
        rule.init_state(setting())


def test_factors_in_stage_one_are_refused() -> None:
    population, rule = setting(), SLoRA(aggregator=FlexLoRA())
    state = rule.init_state(population)
    c = population.clients[0]
    start = FlexLoRA().client_start(FlexLoRA().init_state(population), c)
    with pytest.raises(TypeError, match="client 0 sent factors"):
        rule.aggregate(state, [Update(client=c, payload=start, num_examples=1)])
