"""A base that moves: FLoRA, FedEx-LoRA, FLoRIST, and what is said after FedMomentum."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.algebra.linalg import normalize, stack, svd_of_product
from fedlora.algebra.server_optimizer import FedAvgM
from fedlora.algebra.state import State
from fedlora.core.types import Factors, Setting, Update
from fedlora.server.method import Setup
from fedlora.techniques.lora.payload import LowRankPayload
from strategies.fedit import FedIT
from strategies.rebase import Rebase
from tests.generators import (
    dense,
    factors,
    lone,
    setting,
    single_module_setting,
    vector_updates,
    weighted_delta,
)
from tests.strategies.laws import (
    DISTRIBUTIONS,
    PLAN,
    answer,
    close,
    cohort,
    job,
    population_for,
    reached,
)

FLORA, OWN_A = Rebase(), Rebase(own_a=True)
FEDEX = Rebase(hold="mean", heterogeneous="smallest")
FEDEX_OWN, MOMENTUM = Rebase(hold="mean"), Rebase(hold="svd")
EXACT = [FLORA, OWN_A, FEDEX, FEDEX_OWN, MOMENTUM, Rebase(hold="svd", heterogeneous="smallest")]
NAMES = ["flora", "own_a", "fedex", "fedex_own", "svd_own", "svd_smallest"]
exact = pytest.mark.parametrize("rule", EXACT, ids=NAMES)


def begun(rule: Rebase, population: Setting) -> State:
    """The first state, in the precision of what clients send."""
    state = rule.init_state(population)
    return {k: t.double() if t.dtype == torch.float32 else t for k, t in state.items()}


def after_one(rule: Rebase, updates: Sequence[Update], m: int = 6, n: int = 5) -> State:
    """The state after one round of clients of one module, alpha 4."""
    ranks = [u.adapter["w"].rank for u in updates]
    population = single_module_setting(m, n, ranks, alpha=updates[0].adapter["w"].alpha)
    return rule.aggregate(begun(rule, population), updates)


def mean_of(updates: Sequence[Update]) -> Tensor:
    """``D = Σ_k p_k s_k B_k A_k``."""
    p = normalize([u.num_examples for u in updates])
    return weighted_delta([u.adapter["w"] for u in updates], p)


def g_of(state: State) -> Tensor:
    return state["shift/w/d"]


def pair_of(state: State, alpha: float = 4.0) -> Factors:
    return Factors(state["hold/w/a"], state["hold/w/b"], alpha)


def cohort_of(ranks: Sequence[int], m: int, n: int, seed: int = 1) -> list[Update]:
    examples = (5, 20, 11, 4)
    return [
        lone("w", factors(m, n, r, seed + k, alpha=4.0), k, examples[k])
        for k, r in enumerate(ranks)
    ]


# ----------------------------------------------------------------------------------- the family


def the_global_model_is_the_mean_of_the_clients(rule: Rebase, tiers: Sequence[str]) -> None:
    """FEDEX-9, FLORA-1: ``g ← Σ_k p_k (client k's effective update)``, over several rounds."""
    population = population_for(rule, tiers)
    state = begun(rule, population)
    for t in range(3):
        updates = cohort(rule, state, population, seed=t)[t:]
        p = normalize(rule.reference_weights(updates))
        models = [reached(rule, state, u) for u in updates]
        state = rule.aggregate(state, updates)
        for path, found in dense(rule.global_update(state)).items():
            mean = sum((w * x[path] for w, x in zip(p, models, strict=True)), torch.zeros(()))
            close(found, mean, what=f"round {t}: {path}")


@exact
@pytest.mark.parametrize("tiers", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_the_global_model_is_the_mean_of_the_clients(rule: Rebase, tiers: Sequence[str]) -> None:
    the_global_model_is_the_mean_of_the_clients(rule, tiers)


@exact
def test_clients_of_every_rank_start_from_the_global_model(rule: Rebase) -> None:
    """Nothing is truncated for anybody, and evaluation does not depend on the rank."""
    population = population_for(rule)
    state = begun(rule, population)
    for t in range(2):
        state = rule.aggregate(state, cohort(rule, state, population, seed=t))
        whole = dense(rule.global_update(state))
        for c in population.clients:
            client = rule.enlist(state, c)
            for path, d in dense(rule.client_start(state, client)).items():
                close(d, whole[path], what=f"start of {c.id}: {path}")
            at = rule.global_update(state, c.ranks)
            assert all(torch.equal(t, whole[p]) for p, t in dense(at).items())


@exact
def test_idle_clients_leave_the_model(rule: Rebase) -> None:
    """Whoever is drawn, and in the first round too."""
    population = population_for(rule)
    state = begun(rule, population)
    for drawn in (population.clients, population.clients[:1], population.clients[2:]):
        before = dense(rule.global_update(state))
        still = []
        for c in drawn:
            client = rule.enlist(state, c)
            start = rule.client_start(state, client)
            payload = answer(start, start.factors, PLAN)
            still.append(Update(client, payload, client.num_examples))
        idle = dense(rule.global_update(rule.aggregate(state, still)))
        for path, d in idle.items():
            assert float((d - before[path]).norm()) <= 1e-12 * max(1, float(before[path].norm()))
        state = rule.aggregate(state, cohort(rule, state, population, seed=3))


@exact
def test_a_version_is_mounted_once(rule: Rebase) -> None:
    """Clients of one variant of the rank are on one base; with new factors all clients are."""
    population = population_for(rule)
    state = begun(rule, population)
    state = rule.aggregate(state, cohort(rule, state, population, seed=1))
    versions = {
        rule.client_start(state, rule.enlist(state, c)).base().version for c in population.clients
    }
    one = rule.hold == "none" or rule.heterogeneous == "smallest"
    assert len(versions) == (1 if one else 4)
    if rule.hold == "none":
        assert versions == {rule.global_update(state).base().version}


# ---------------------------------------------------------------------------------------- FLoRA


def test_flora_stacks_unequal_ranks() -> None:
    """FLORA-1 and FLORA-5: every client's own scale is inside the stack."""
    for ranks in ((2, 3, 1), (3, 3, 3)):
        updates = vector_updates(ranks)
        close(g_of(after_one(FLORA, updates)), mean_of(updates))


def test_flora_adds_up_and_its_restart_adds_nothing() -> None:
    """FLORA-7, FLORA-8: two rounds are ``D1 + D2``; each begins with ``B = 0`` and another A."""
    first, second = cohort_of((2, 3, 1, 4), 12, 9), cohort_of((2, 3, 1, 4), 12, 9, seed=70)
    state = after_one(FLORA, first, 12, 9)
    starts = [FLORA.client_start(state, u.client).factors["w"] for u in first]
    assert not any(f.b.any() for f in starts)
    assert all(torch.equal(f.a, starts[3].a[: f.rank]) for f in starts), "one nested A a round"
    before = FLORA.client_start(begun(FLORA, single_module_setting(12, 9, [4])), first[3].client)
    assert not torch.equal(before.factors["w"].a, starts[3].a), "another one each round"
    close(g_of(FLORA.aggregate(state, second)), mean_of(first) + mean_of(second))


@pytest.mark.parametrize(("rule", "least", "most"), [(FLORA, 4, 4), (OWN_A, 5, 10)])
def test_clients_that_draw_their_own_a_move_more_directions(
    rule: Rebase, least: int, most: int
) -> None:
    """FLORA-9: to first order, ``B_k = -η s_k G_k A_kᵀ``; ranks 2, 3, 1, 4 on a 12 x 9 layer."""
    population = single_module_setting(12, 9, [2, 3, 1, 4])
    state, updates = begun(rule, population), []
    for c in population.clients:
        f = rule.client_start(state, c).factors["w"]
        g = torch.randn(12, 9, generator=torch.Generator().manual_seed(c.id), dtype=torch.float64)
        stepped = Factors(f.a.double(), f.scale * g @ f.a.double().T, f.alpha)
        updates.append(Update(c, LowRankPayload({"w": stepped}), c.num_examples))
    rank = int(torch.linalg.matrix_rank(g_of(rule.aggregate(state, updates)), rtol=1e-9))
    assert least <= rank <= most


def test_own_factors_are_those_of_a_client_and_a_round() -> None:
    population = setting()
    state = OWN_A.init_state(population)
    a, b = (OWN_A.client_start(state, c).factors for c in (population.clients[i] for i in (0, 4)))
    assert population.clients[0].ranks == population.clients[4].ranks
    assert all(not torch.equal(a[p].a, b[p].a) for p in a)
    assert OWN_A.variant(state, population.clients[4]) == 4


# ----------------------------------------------------------------------------------- FedEx-LoRA


def test_fedex_is_fedit_with_its_residual_in_the_base() -> None:
    """FEDEX-1."""
    updates = vector_updates((2, 2, 2))
    state = after_one(FEDEX, updates)
    fedit = FedIT()
    begin = fedit.init_state(single_module_setting(6, 5, (2, 2, 2), alpha=4.0))
    average = fedit.global_update(fedit.aggregate(begin, updates))["w"]
    start = FEDEX.client_start(state, updates[0].client)
    close(start.factors["w"].a, average.a)
    close(start.factors["w"].b, average.b)
    close(start.shift["w"] + average.delta(), mean_of(updates))


def test_the_residual_has_one_rank_less_than_there_are_clients() -> None:
    """FEDEX-2, FEDEX-3: it is ``Σ_{k<K} [B_k - B̄] [s p_k (A_k - A_K)]``, of rank ``(K-1) r``, and
    that is what is counted."""
    updates = cohort_of((2, 2, 2, 2), 40, 30)
    state = after_one(FEDEX, updates, 40, 30)
    residual = FEDEX.client_start(state, updates[0].client).shift["w"]
    sent, p = [u.adapter["w"] for u in updates], normalize([u.num_examples for u in updates])
    mean_b = sum((w * f.b for w, f in zip(p, sent, strict=True)), torch.zeros(()))
    left = torch.cat([f.b - mean_b for f in sent[:3]], dim=1)
    right = torch.cat([f.scale * w * (f.a - sent[3].a) for w, f in zip(p[:3], sent, strict=False)])
    close(residual, left @ right)
    assert int(torch.linalg.matrix_rank(residual, rtol=1e-9)) == 6
    assert state["sent"].tolist() == [[6]]


def test_a_truncated_residual_costs_its_tail() -> None:
    """FEDEX-4."""
    updates = cohort_of((2, 2, 2, 2), 40, 30)
    whole = FEDEX.client_start(after_one(FEDEX, updates, 40, 30), updates[0].client).shift["w"]
    s = torch.linalg.svdvals(whole)
    energy = float(((s**2).cumsum(0) / (s**2).sum())[3]) - 1e-9
    rule = dataclasses.replace(FEDEX, energy=energy)
    state = after_one(rule, updates, 40, 30)
    error = float((g_of(state) - mean_of(updates)).norm())
    assert error == pytest.approx(float(s[4:].norm()), rel=1e-10)
    assert state["sent"].tolist() == [[4]]
    for name in "ab":
        close(state[f"hold/w/{name}"], after_one(FEDEX, updates, 40, 30)[f"hold/w/{name}"])


@pytest.mark.parametrize("clients", [1, 3])
def test_with_one_a_for_all_there_is_no_residual(clients: int) -> None:
    """FEDEX-5: it is FedIT; so it is with one client."""
    updates = vector_updates((2, 2, 2))[:clients]
    a = updates[0].adapter["w"].a
    same = [dataclasses.replace(u, payload=_with_a(u, a)) for u in updates]
    state = after_one(FEDEX, same)
    residual = FEDEX.client_start(state, same[0].client).shift["w"]
    assert float(residual.norm()) <= 1e-12 * float(g_of(state).norm())
    close(pair_of(state).delta(), mean_of(same))


def _with_a(update: Update, a: Tensor) -> LowRankPayload:
    return LowRankPayload({"w": dataclasses.replace(update.adapter["w"], a=a)})


# -------------------------------------------------------------------------- FLoRIST, FedMomentum


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_florist_keeps_the_fewest_directions_with_the_energy(energy: float) -> None:
    """FLIST-1 to FLIST-3: error² ``= (1 - kept energy) ‖D‖²``, and one direction less is too
    few."""
    updates = cohort_of((2, 3, 1, 4), 12, 9)
    mean = mean_of(updates)
    state = after_one(Rebase(energy=energy), updates, 12, 9)
    s = torch.linalg.svdvals(mean)
    kept = (s**2).cumsum(0) / (s**2).sum()
    (count,) = state["sent"][0].tolist()
    assert kept[count - 1] >= energy and (count == 1 or kept[count - 2] < energy)
    error = float((g_of(state) - mean).norm() / mean.norm())
    assert error**2 == pytest.approx(1 - float(kept[count - 1]), abs=1e-12)
    u, v = torch.linalg.svd(mean, full_matrices=False)[::2]
    close(g_of(state), (u[:, :count] * s[:count]) @ v[:count])
    p = normalize([u.num_examples for u in updates])
    small = svd_of_product(*stack([u.adapter["w"] for u in updates], p), backend="core")
    close(small.s[:9], s)


def test_the_held_pair_is_the_best_of_its_rank_and_balanced() -> None:
    """FMOM-1: ``P = T_r(D)`` with equal singular values in both factors, the rest in the base."""
    updates = cohort_of((3, 3, 3, 3), 12, 9)
    mean, state = mean_of(updates), after_one(MOMENTUM, updates, 12, 9)
    pair, s = pair_of(state), torch.linalg.svdvals(mean)
    close(g_of(state), mean)
    assert float((mean - pair.delta()).norm()) == pytest.approx(float(s[3:].norm()), rel=1e-10)
    for found in (torch.linalg.svdvals(pair.a), torch.linalg.svdvals(pair.b)):
        close(found, (s[:3] / pair.scale).sqrt())
    assert state["sent"].tolist() == [[9]]


def test_smaller_ranks_hold_the_leading_directions() -> None:
    updates = cohort_of((2, 3, 1, 4), 12, 9)
    mean, state = mean_of(updates), after_one(MOMENTUM, updates, 12, 9)
    s = torch.linalg.svdvals(mean)
    for u in updates:
        f = MOMENTUM.client_start(state, u.client).factors["w"]
        rest = float((mean - f.delta()).norm())
        assert rest == pytest.approx(float(s[f.rank :].norm()), rel=1e-10)


# ------------------------------------------------------------------------------- missed rounds


@pytest.mark.parametrize(
    "rule",
    [FLORA, Rebase(energy=0.9), FEDEX, Rebase(hold="svd", heterogeneous="smallest"), FEDEX_OWN],
    ids=["flora", "florist", "fedex", "svd", "fedex_own"],
)
def test_a_base_follows_from_the_changes_that_are_counted(rule: Rebase) -> None:
    """NEWS-1: a client that saw some rounds adds those that it missed, each as factors of the rank
    that is counted for it, and is on the base of all others."""
    population = single_module_setting(24, 20, [2, 2, 2, 2] if rule is not FEDEX_OWN else [1, 2, 4])
    client = population.clients[0]
    state, bases = begun(rule, population), []
    # A base for each rank: what is replayed is g, and P is known from the factors.
    whole = rule.hold != "none" and rule.heterogeneous == "own"
    for t in range(5):
        moved = rule.global_update(state) if whole else rule.client_start(state, client)
        bases.append(moved.shift["w"])
        state = rule.aggregate(state, cohort(rule, state, population, seed=t)[t % 2 :])
    replayed = bases[1]
    for t in range(1, 4):
        u, s, v = torch.linalg.svd(bases[t + 1] - bases[t])
        rank = int(state["sent"][t, 0])
        assert 0 < rank < 20
        replayed = replayed + (u[:, :rank] * s[:rank]) @ v[:rank]
    close(replayed, bases[4])


def sent_down(rule: Rebase, population: Setting, rounds: Sequence[Sequence[int]]) -> list[int]:
    """Scalars that every client is sent in the round after some, by the ids of those that took
    part."""
    state = begun(rule, population)
    for t, ids in enumerate(rounds):
        updates = cohort(rule, state, population, seed=t)
        state = rule.aggregate(state, [updates[i] for i in ids])
    jobs = [job(rule, state, c) for c in population.clients]
    return [rule.bytes_down(state, j, "float32") // 4 for j in jobs]


def test_a_client_is_sent_the_rounds_that_it_missed() -> None:
    """Table 8.2, and nothing before the first round: all of it follows from the seed."""
    m, n, r, k = 40, 30, 2, 3
    population = single_module_setting(m, n, [r] * 4)
    news = {"none": k * r, "mean": (k - 1) * r, "svd": (k - 1) * r}
    for hold, rank in news.items():
        rule = Rebase(hold=hold, heterogeneous="smallest")
        held = 0 if hold == "none" else r * (m + n)
        one = rank * (m + n)
        assert sent_down(rule, population, []) == [0] * 4
        assert sent_down(rule, population, [(0, 1, 2)]) == [held + one] * 4
        # Clients 0 and 1 took part in the second round, and knew the result of the first.
        found = sent_down(rule, population, [(0, 1, 2), (0, 1, 3)])
        assert found == [held + one] * 2 + [held + 2 * one] + [held + one]
        many = sent_down(rule, population, [(0, 1, 2)] * 9)
        assert many == [held + one] * 3 + [held + m * n]


def test_a_factor_that_no_client_trains_is_not_sent() -> None:
    population = single_module_setting(40, 30, [2] * 4)
    state = begun(FEDEX, population)
    state = FEDEX.aggregate(state, cohort(FEDEX, state, population, seed=1))
    whole = job(FEDEX, state, population.clients[0])
    half = dataclasses.replace(whole, plan=dataclasses.replace(whole.plan, train_a=False))
    found = [FEDEX.bytes_down(state, j, "float32") for j in (whole, half)]
    assert found[0] - found[1] == 4 * 2 * 30


def test_rejected_clients_miss_the_round_and_a_sum_names_no_one() -> None:
    population = setting()
    state = begun(FLORA, population)
    state = FLORA.aggregate(state, cohort(FLORA, state, population, seed=1))
    updates = cohort(FLORA, state, population, seed=2)
    assert FLORA.aggregate(state, updates[1:])["seen"].tolist() == [0, 1, 1, 1, 1, 1]
    start = [FLORA.client_start(state, u.client) for u in updates]
    terms = [FLORA.adds(state, s, u) for s, u in zip(start, updates, strict=True)]
    assert FLORA.absorb(state, terms[0], 1.0)["seen"].tolist() == [0] * 6


# -------------------------------------------------------------------------- options and refusals


@exact
def test_an_adopted_update_is_the_global_model(rule: Rebase) -> None:
    """Exactly; clients can go on from it, and it has to be sent."""
    population = population_for(rule)
    state = begun(rule, population)
    delta = {
        m.path: torch.randn(m.d_out, m.d_in, generator=torch.Generator().manual_seed(1)).double()
        for m in population.modules
    }
    state = rule.adopt(state, delta)
    for path, d in dense(rule.global_update(state)).items():
        assert torch.equal(d, delta[path])
    for c in population.clients:
        client = rule.enlist(state, c)
        for path, d in dense(rule.client_start(state, client)).items():
            close(d, delta[path])
        sent = rule.bytes_down(state, job(rule, state, c), "float32")
        assert sent >= 4 * sum(m.d_out * m.d_in for m in population.modules)


def test_the_server_optimizer_acts_on_the_global_update() -> None:
    """Its first step from zero is ``lr D``; then any weight may have moved."""
    updates = vector_updates((2, 3, 1))
    rule = Rebase(server_optimizer=FedAvgM(lr=0.5, momentum=0.9))
    state = after_one(rule, updates)
    close(g_of(state), 0.5 * mean_of(updates))
    assert state["sent"].tolist() == [[5]]
    population = single_module_setting(6, 5, (2, 3, 1), alpha=4.0)
    close(g_of(rule.aggregate(state, updates)), (0.5 + 0.5 * 1.9) * mean_of(updates))
    assert rule.client_start(state, population.clients[0]).base() is not None


def test_what_the_round_did_is_reported() -> None:
    updates = vector_updates((2, 2, 2))
    for rule, share in ((FLORA, 1.0), (FEDEX, None)):
        state = after_one(rule, updates)
        report = rule.report(state)
        assert report["rebase/shift_norm"] == pytest.approx(float(mean_of(updates).norm()))
        if share is None:
            shift = rule.client_start(state, updates[0].client).shift["w"]
            share = float(shift.norm() / mean_of(updates).norm())
        assert report["rebase/residual_relative"] == pytest.approx(share)
    assert FLORA.report(begun(FLORA, setting())) == {
        "rebase/shift_norm": 0.0,
        "rebase/residual_relative": 0.0,
    }


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"hold": "median"}, "strategy.hold='median'"),
        ({"energy": 0.0}, "strategy.energy=0.0 must lie"),
        ({"energy": 1.5}, "strategy.energy=1.5 must lie"),
        ({"heterogeneous": "covered"}, "strategy.heterogeneous='covered'"),
        ({"own_a": True, "hold": "mean"}, "own_a=true draws new factors.*choose strategy.hold"),
        ({"energy": 0.9, "hold": "svd"}, "no common residual.*smallest or refuse"),
        (
            {"hold": "mean", "server_optimizer": FedAvgM()},
            "server_optimizer with strategy.hold=mean.*choose",
        ),
    ],
)
def test_values_that_mean_nothing_are_refused(values: Mapping[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Rebase(**values)


def test_what_cannot_be_combined_is_refused() -> None:
    for setup, why in (
        (Setup(PLAN, quantization="int8"), "model.quantization=int8.*quantization=none"),
        (Setup(PLAN, wire="bfloat16"), "federation.wire=bfloat16.*=float32"),
    ):
        with pytest.raises(ValueError, match=why):
            FLORA.check(setup)
    FLORA.check(Setup(PLAN))
    refuses = Rebase(heterogeneous="refuse")
    with pytest.raises(ValueError, match=r"these hold .*heterogeneous=smallest or own"):
        refuses.init_state(setting())
    refuses.init_state(setting(("T3", "T3")))
