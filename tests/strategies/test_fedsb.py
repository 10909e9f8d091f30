"""Fed-SB and RAVAN: exact averages of cores, nested ranks, and what each client is sent."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fedlora.algebra.linalg import normalize
from fedlora.algebra.server_optimizer import FedAvgM
from fedlora.algebra.state import State
from fedlora.core.types import LocalPlan, Update
from fedlora.server.method import Setup
from fedlora.techniques.cores.payload import Core, CorePayload, blocks_in, fixed
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import LoRA
from fedlora.training.terms import FedProx
from fedlora.wire.codec import encode_payload
from strategies.fedsb import FedSB, leading, zeros
from strategies.slora import SLoRA
from strategies.splitlora import SplitLoRA
from tests.generators import dense, factors, setting, single_module_setting
from tests.strategies.laws import (
    PLAN,
    after_rounds,
    close,
    cohort,
    job,
    population_for,
    reached,
)

FEDSB = FedSB()
HEADS = FedSB(heads=3, gains=True)
RAVAN = FedSB(heads=3, gains=True, weighting="covered")
BOTH = pytest.mark.parametrize("rule", [FEDSB, HEADS], ids=["fedsb", "heads"])


def cores(rule: FedSB, ranks: tuple[int, ...], seed: int = 1) -> tuple[State, list[Update]]:
    """The first state and a round's updates of one module ``w``, ``[9, 7]``."""
    population = single_module_setting(9, 7, ranks)
    state = rule.init_state(population)
    return state, cohort(rule, state, population, seed)


def block_of(update: Update, i: int = 0) -> Tensor:
    """``s R_i`` of a client."""
    core = update.payload.cores["w"]
    return update.payload.alpha / core.rank * core.blocks[i]


# --- exact averages -------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
@BOTH
def test_nested_cores_are_exact_in_every_round(rule: FedSB, rounds: int) -> None:
    """FSB-1, FSB-2, RAVAN-1: by products, at unequal ranks, of changes."""
    population = population_for(rule)
    state, updates = after_rounds(rule, population, 1, rounds)
    p = normalize([u.num_examples for u in updates])
    before, after = (dense(rule.global_update(s)) for s in (state, rule.aggregate(state, updates)))
    for path in before:
        moved = sum(
            w * (reached(rule, state, u)[path] - dense(rule.client_start(state, u.client))[path])
            for w, u in zip(p, updates, strict=True)
        )
        close(after[path] - before[path], moved, 1e-11)


def test_in_the_first_round_it_is_the_mean_of_padded_cores_with_their_scales() -> None:
    """FSB-2, as it is written there."""
    ranks = (1, 2, 4, 3)
    state, updates = cores(FEDSB, ranks)
    p = normalize([u.num_examples for u in updates])
    padded = torch.zeros(4, 4, dtype=torch.float64)
    for w, u in zip(p, updates, strict=True):
        block = block_of(u)
        padded[: len(block), : len(block)] += w * block
    after = FEDSB.aggregate(state, updates)
    close(float(state["alpha"]) / 4 * after["global/w/core0"], padded)


def test_gains_and_heads_averaged_apart_are_not_exact() -> None:
    """RAVAN-2: why clients send the products."""
    g = torch.Generator().manual_seed(1)
    gains = [torch.rand(3, generator=g, dtype=torch.float64) + 0.5 for _ in range(4)]
    heads = [torch.randn(3, 2, 2, generator=g, dtype=torch.float64) for _ in range(4)]
    exact = sum(g_[:, None, None] * h for g_, h in zip(gains, heads, strict=True)) / 4
    apart = (sum(gains) / 4)[:, None, None] * (sum(heads) / 4)
    assert float((apart - exact).norm() / exact.norm()) > 0.05


def test_a_block_diagonal_core_is_a_core() -> None:
    """RAVAN-4: heads are Fed-SB whose other entries are zero; RAVAN-3: their rank is the whole."""
    state, updates = cores(HEADS, (6, 6))
    one = FedSB()
    whole = [
        dataclasses.replace(
            u,
            payload=dataclasses.replace(
                u.payload,
                gains=False,
                cores={
                    p: dataclasses.replace(c, blocks=(torch.block_diag(*c.blocks),))
                    for p, c in u.payload.cores.items()
                },
            ),
        )
        for u in updates
    ]
    other, _ = cores(one, (6, 6))
    heads = dense(HEADS.global_update(HEADS.aggregate(state, updates)))["w"]
    close(dense(one.global_update(one.aggregate(other, whole)))["w"], heads)
    assert int(torch.linalg.matrix_rank(heads)) == 6
    assert sum(t.numel() for _, t in updates[0].payload.tensors()) == 3 * 2**2


def test_covered_averages_each_head_over_those_who_trained_it() -> None:
    """The last head is of one client alone, whole; entries of none stay."""
    state, updates = cores(RAVAN, (2, 2, 2, 6))
    after = RAVAN.aggregate(state, updates)
    scale = float(state["alpha"]) / 6
    for i in (1, 2):
        close(scale * after[f"global/w/core{i}"], block_of(updates[3], i))
    p = normalize([u.num_examples for u in updates])
    mean = sum(w * block_of(u) for w, u in zip(p, updates, strict=True))
    close(scale * after["global/w/core0"], mean)
    some = RAVAN.aggregate(state, updates[:2])
    assert not some["global/w/core2"].any()


def test_a_rank_that_ends_within_a_head_has_its_leading_part() -> None:
    state, updates = cores(RAVAN, (3, 6))
    assert [b.shape[0] for b in updates[0].payload.cores["w"].blocks] == [2, 1]
    after = RAVAN.aggregate(state, [updates[0]])["global/w/core1"]
    close(2.0 * after[:1, :1], 4.0 * updates[0].payload.cores["w"].blocks[1])
    assert not after[1:].any() and not after[:, 1:].any()


@pytest.mark.parametrize(
    ("rank", "heads", "sizes"),
    [(15, 1, [15]), (15, 4, [4, 4, 4, 3]), (5, 4, [2, 1, 1, 1]), (2, 4, [1, 1]), (8, 2, [4, 4])],
)
def test_heads_are_as_equal_as_they_can_be(rank: int, heads: int, sizes: list[int]) -> None:
    assert [len(b) for b in zeros(rank, heads)] == sizes


def test_a_step_of_sgd_moves_the_weights_by_the_gradients_projection() -> None:
    """FSB-3: on the spans of U and V; and it never leaves them."""
    population = single_module_setting(9, 7, (3, 3))
    state = FEDSB.init_state(population)
    start = FEDSB.client_start(state, population.clients[0])
    core = start.cores["w"]
    u, v = fixed(start.seed, "w", core, torch.float64, torch.device("cpu"))
    made = start.parametrisation(torch.float64, torch.device("cpu"))
    values = {n: t.clone().requires_grad_() for n, t in made.start.items()}
    g = torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (made.factors(values)["w"].delta() * g).sum().backward()
    (r,) = values.values()
    scale = start.alpha / 3
    close(scale * u @ (-r.grad) @ v, -(scale**2) * (u @ u.T) @ g @ (v.T @ v), 1e-6)


def test_the_history_of_all_rounds_is_another_average() -> None:
    """FSB-4: released scripts never clear their list of results."""
    population = single_module_setting(9, 7, (3, 3))
    state, updates = after_rounds(FEDSB, population, 1, 1)
    earlier = cohort(FEDSB, FEDSB.init_state(population), population, 1)
    right, wrong = (
        dense(FEDSB.global_update(FEDSB.aggregate(state, u)))["w"]
        for u in (updates, [*earlier, *updates])
    )
    assert float((wrong - right).norm() / right.norm()) > 0.1


# --- starts --------------------------------------------------------------------------------------


@BOTH
def test_fixed_factors_of_smaller_ranks_are_the_first_of_larger_ones(rule: FedSB) -> None:
    population = population_for(rule)
    for rounds in (0, 2):
        state, _ = after_rounds(rule, population, 1, rounds)
        largest = rule.client_start(state, population.clients[3])
        for client in population.clients:
            start = rule.client_start(state, client)
            for path, f in start.low_rank().items():
                assert torch.equal(f.a, largest.low_rank()[path].a[: f.rank])


def test_layers_have_fixed_factors_of_their_own() -> None:
    """Quirk 21's like: one draw for all layers."""
    population = single_module_setting(9, 7, (3, 3))
    core = FEDSB.client_start(FEDSB.init_state(population), population.clients[0]).cores["w"]
    one, two = (fixed(3, f"layers.{i}.w", core, torch.float64, torch.device("cpu")) for i in (0, 1))
    assert all(float((x - y).norm()) > 1e-2 for x, y in zip(one, two, strict=True))


def test_the_start_is_the_base_itself_and_alive() -> None:
    """FSB-5 is of released code, whose start is not the base."""
    for rule in (FEDSB, HEADS):
        population = population_for(rule)
        state = rule.init_state(population)
        assert not any(bool(d.any()) for d in dense(rule.global_update(state)).values())


def test_plans_leave_a_alone() -> None:
    population = setting()
    state = FEDSB.init_state(population)
    plan = FEDSB.plan(state, population.clients[0], PLAN)
    assert (plan.train_a, plan.train_b) == (False, True)


# --- traffic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("heterogeneous", ["nest", "smallest"])
@BOTH
def test_traffic_is_the_core_to_the_byte(rule: FedSB, heterogeneous: str, wire: str) -> None:
    """``Σ_modules Σ_heads b²`` each way, whatever a client missed; nothing before round 1."""
    rule = dataclasses.replace(rule, heterogeneous=heterogeneous)
    population = population_for(rule)
    width = {"float32": 4, "bfloat16": 2}[wire]
    state = rule.init_state(population)
    for rounds in range(3):
        updates = cohort(rule, state, population, rounds)
        for u in updates:
            due = sum(
                len(block) ** 2
                for m in population.modules
                for block in leading(_whole(state, m.path), u.client.ranks[m.path]).blocks
            )
            if rule.heads == 1:
                assert due == sum(r**2 for r in u.client.ranks.values())
            asked = job(rule, state, u.client)
            assert rule.bytes_up(state, u, asked.plan, wire) == width * due
            assert encode_payload(u.payload, wire)[0].nbytes == width * due
            assert rule.bytes_down(state, asked, wire) == (width * due if rounds else 0)
        state = rule.aggregate(state, updates[:2])


def _whole(state: State, path: str) -> Core:
    """The global core of a module."""
    d_out, d_in = state[f"global/{path}/size"].tolist()
    return Core(d_out, d_in, blocks_in(state, f"global/{path}"))


def _any_core(rule: FedSB) -> Core:
    population = single_module_setting(9, 7, (3, 3))
    start = rule.client_start(rule.init_state(population), population.clients[0])
    assert isinstance(start, CorePayload)
    return start.cores["w"]


# --- server optimizers, other beginnings ----------------------------------------------------------


def test_a_server_optimizer_acts_on_the_core() -> None:
    rule = FedSB(server_optimizer=FedAvgM(lr=0.5, momentum=0.9))
    state, updates = cores(rule, (3, 3))
    plain = FEDSB.aggregate(state, updates)["global/w/core0"]
    close(rule.aggregate(state, updates)["global/w/core0"], 0.5 * plain)
    assert [k for k in state if k.startswith("server/")]


@BOTH
def test_it_goes_on_from_the_part_of_an_update_that_its_spans_hold(rule: FedSB) -> None:
    population = single_module_setting(9, 7, (6, 6))
    state = rule.init_state(population)
    delta = factors(9, 7, 5, seed=1).delta()
    after = rule.adopt(state, {"w": delta})
    got = dense(rule.global_update(after))["w"]
    whole = _whole(state, "w")
    u, v = fixed(int(state["seed"]), "w", whole, torch.float64, torch.device("cpu"))
    mask = torch.block_diag(*(torch.ones(len(b), len(b)) for b in whole.blocks)).double()
    close(got, u @ ((u.T @ delta @ v.T) * mask) @ v, 1e-6)
    client = population.clients[0]
    assert rule.bytes_down(after, job(rule, after, client), "float32") == 4 * int(mask.sum())


@BOTH
def test_slora_goes_on_with_it(rule: FedSB) -> None:
    outer = SLoRA(stage1_rounds=1, aggregator=rule)
    state, updates = after_rounds(outer, population_for(outer), 1, 2)
    assert all(isinstance(u.payload, CorePayload) for u in updates)
    assert not outer.plan(state, updates[0].client, PLAN).train_a


@pytest.mark.parametrize("heads", [1, 3])
def test_it_goes_on_from_the_leading_directions_of_an_update(heads: int) -> None:
    """Fed-SB's first U, R and V: the best approximation, with R diagonal, at every rank."""
    rule, population = FedSB(bases="svd", heads=heads), single_module_setting(9, 7, (2, 4))
    state = rule.init_state(population)
    delta = factors(9, 7, 6, seed=1).delta()
    after = rule.adopt(state, {"w": delta})
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    for client, rank in zip(population.clients, (2, 4), strict=True):
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        start = rule.client_start(after, client)
        close(dense(start)["w"], best, 1e-11)
        core = torch.block_diag(*start.cores["w"].blocks)
        close(core, torch.diag(torch.diagonal(core)), 1e-11)
        close(dense(rule.global_update(after, client.ranks))["w"], best, 1e-11)


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_directions_of_an_update_are_sent_to_each_client_once(wire: str) -> None:
    rule, population = FedSB(bases="svd"), single_module_setting(9, 7, (3, 3, 3))
    width = {"float32": 4, "bfloat16": 2}[wire]
    core, both = width * 3**2, width * 3 * (9 + 7)
    state = rule.adopt(rule.init_state(population), {"w": factors(9, 7, 6, seed=1).delta()})
    for told in ([], [0], [0, 2], [0, 2]):
        if told:
            updates = cohort(rule, state, population, len(told))
            state = rule.aggregate(state, [u for u in updates if u.client.id in told])
        for client in population.clients:
            due = core if client.id in told else core + both
            asked = job(rule, state, client)
            assert rule.bytes_down(state, asked, wire) == due
            update = Update(client, asked.start, client.num_examples)
            assert rule.bytes_up(state, update, asked.plan, wire) == core


def test_a_federated_start_after_one_dense_stage() -> None:
    """``strategy=slora`` of density 1: the best approximation of the clients' mean."""
    rule = FedSB(bases="svd")
    outer = SLoRA(stage1_rounds=1, density="1.0", aggregator=rule)
    population = population_for(outer)
    first, updates = after_rounds(outer, population, 1, 0)
    state = outer.aggregate(first, updates)
    p = normalize([u.num_examples for u in updates])
    for path, d in dense(outer.global_update(state)).items():
        mean = sum(w * dense(u.payload)[path] for w, u in zip(p, updates, strict=True))
        rank = population.max_ranks[path]
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        close(d, (u[:, :rank] * s[:rank]) @ v[:rank], 1e-11)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, r"strategy\.heads=0 must be >= 1"),
        ({"heterogeneous": "covered"}, r"strategy\.heterogeneous='covered'"),
        ({"bases": "gradient"}, r"strategy\.bases='gradient'"),
        ({"weighting": "owners"}, r"strategy\.weighting='owners'"),
        ({"weights": "sparsity"}, r"strategy\.weights='sparsity'"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedSB(**options)


def test_what_needs_factors_is_refused() -> None:
    for plan in (LocalPlan(train_a=False), LocalPlan(train_b=False)):
        with pytest.raises(ValueError, match=r"train cores between fixed factors; leave both true"):
            FEDSB.check(Setup(plan))
    with pytest.raises(ValueError, match=r"use client\.term\.metric=factor"):
        FEDSB.check(Setup(LocalPlan(term=FedProx(0.1, "product"))))
    FEDSB.check(Setup(LocalPlan(term=FedProx(0.1))))
    with pytest.raises(ValueError, match=r"use client\.technique\.self_prune=null"):
        FEDSB.check(Setup(LocalPlan(technique=LoRA(SelfPrune(0.3, 0.5, 1)))))
    with pytest.raises(ValueError, match=r"smallest or nest, or a method for unequal ranks"):
        FedSB(heterogeneous="refuse").init_state(setting())
    with pytest.raises(ValueError, match="aggregator=FedSB begins with sparse updates, cores or"):
        SplitLoRA(aggregator=FEDSB).init_state(setting())
    with pytest.raises(ValueError, match="rank 4 exceeds the global rank 3"):
        leading(_any_core(FEDSB), 4)


def test_factors_in_the_place_of_cores_are_not_averaged() -> None:
    state, updates = cores(FEDSB, (3, 3))
    factors_of = dataclasses.replace(updates[0], payload=updates[0].payload.low_rank())
    with pytest.raises(TypeError, match="client 0 sent a dict where cores are required"):
        FEDSB.aggregate(state, [factors_of])
