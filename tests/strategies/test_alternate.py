"""FFA-LoRA and RoLoRA: one factor at a time, exact averages, and what each client is sent."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fedlora.algebra.init import initial_a, orthonormal
from fedlora.algebra.server_optimizer import FedAvgM
from fedlora.core.types import Factors, LocalPlan, Update
from fedlora.server.method import Setup
from strategies.alternate import Alternate, first_of
from strategies.fedit import FedIT
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

FFA, ROLORA = Alternate(), Alternate(schedule="ba")
BOTH = pytest.mark.parametrize("rule", [FFA, ROLORA], ids=["ffa", "rolora"])


def sides(rule: Alternate, rounds: int) -> list[str]:
    """The factors that the first rounds train."""
    population = setting()
    found, state = [], rule.init_state(population)
    for t in range(rounds):
        plan = rule.plan(state, population.clients[0], PLAN)
        found.append("a" * plan.train_a + "b" * plan.train_b)
        state = rule.aggregate(state, cohort(rule, state, population, t))
    return found


def test_what_rounds_train() -> None:
    """ROLO-1: B first, for A has no gradient at B = 0."""
    assert sides(FFA, 3) == ["b", "b", "b"]
    assert sides(ROLORA, 4) == ["b", "a", "b", "a"]


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
@BOTH
def test_the_frozen_factor_keeps_every_bit(rule: Alternate, rounds: int) -> None:
    population = population_for(rule)
    state, updates = after_rounds(rule, population, 1, rounds)
    plan = rule.plan(state, updates[0].client, PLAN)
    still = "b" if plan.train_a else "a"
    after = rule.aggregate(state, updates)
    for m in population.modules:
        before, now = (s[f"global/{m.path}/{still}"].double() for s in (state, after))
        assert torch.equal(before, now)


def test_ffa_learns_in_the_rows_of_its_first_a_alone_and_rolora_beyond() -> None:
    """FFA-5, ROLO-5: the limit of one, and what the other is for."""
    outside = {}
    for rule in (FFA, ROLORA):
        population = population_for(rule)
        state, _ = after_rounds(rule, population, 1, 4)
        for m in population.modules:
            d = dense(rule.global_update(state))[m.path]
            basis = orthonormal(initial_a(population.seed, m, population.max_ranks[m.path]))
            basis = basis.double()
            outside[rule, m.path] = float((d - d @ basis.T @ basis).norm() / d.norm())
    thin = [m.path for m in population_for(FFA).modules if m.d_in > 6]
    assert all(outside[FFA, path] < 1e-6 for path in thin)  # A is float32
    assert all(outside[ROLORA, path] > 0.1 for path in thin)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
@pytest.mark.parametrize("heterogeneous", ["nest", "smallest"])
@BOTH
def test_a_lone_client_gets_its_update_back_in_every_phase(
    rule: Alternate, heterogeneous: str, rounds: int
) -> None:
    """ROLO-4."""
    rule = dataclasses.replace(rule, heterogeneous=heterogeneous)
    population = population_for(rule)
    state, updates = after_rounds(rule, population, 1, rounds)
    for update in updates:
        after = rule.aggregate(state, [update])
        back = dense(rule.client_start(after, update.client))
        for path, d in reached(rule, state, update).items():
            close(back[path], d)


def test_nested_prefixes_are_exact_in_the_first_round() -> None:
    """FFA-2: with C = Σ p_k s_k pad(B_k), C A0 is the mean of the products, at any ranks."""
    population = population_for(FFA)
    state, updates = after_rounds(FFA, population, 1, 0)
    total = sum(u.num_examples for u in updates)
    mean = {
        m.path: sum(u.num_examples / total * u.adapter[m.path].delta() for u in updates)
        for m in population.modules
    }
    for path, d in dense(FFA.global_update(FFA.aggregate(state, updates))).items():
        close(d, mean[path])


def test_the_gap_is_what_short_starts_left_out() -> None:
    """FFA-7."""
    population = population_for(FFA)
    state, updates = after_rounds(FFA, population, 1, 1)
    p = [u.num_examples / sum(v.num_examples for v in updates) for u in updates]
    before = dense(FFA.global_update(state))
    after = dense(FFA.global_update(FFA.aggregate(state, updates)))
    starts = [dense(FFA.client_start(state, u.client)) for u in updates]
    for path, d in after.items():
        mean = sum(w * u.adapter[path].delta() for w, u in zip(p, updates, strict=True))
        left = sum(w * (before[path] - s[path]) for w, s in zip(p, starts, strict=True))
        assert left.norm() > 0.05 * before[path].norm()
        close(d - mean, left, 1e-11)


def test_covered_moves_an_index_by_its_owners_alone() -> None:
    """One client of rank 5 among many of rank 2: its last columns are its own, whole."""
    population = single_module_setting(9, 7, (2, 2, 2, 5))
    for weighting, part in (("covered", 1.0), ("all", 40 / 100)):
        rule = Alternate(weighting=weighting)
        state = rule.init_state(population)
        updates = cohort(rule, state, population, 1)
        b = rule.aggregate(state, updates)["global/w/b"]
        close(b[:, 2:], part * updates[-1].adapter["w"].b[:, 2:])


def test_at_equal_ranks_a_round_of_ffa_is_fedits_average_of_b() -> None:
    population = setting(("T4", "T4", "T4"))
    state = FFA.init_state(population)
    updates = cohort(FFA, state, population, 1)
    one, two = (
        FFA.aggregate(state, updates),
        FedIT().aggregate(FedIT().init_state(population), updates),
    )
    for m in population.modules:
        close(one[f"global/{m.path}/b"], two[f"global/{m.path}/b"])
        assert torch.equal(one[f"global/{m.path}/a"].float(), state[f"global/{m.path}/a"])


def test_alpha_times_c_is_a_learning_rate_times_its_square() -> None:
    """FFA-6, under SGD: gradient of B is s G Aᵀ, and the product has another s."""
    g = torch.Generator().manual_seed(1)
    target = torch.randn(9, 7, generator=g, dtype=torch.float64)

    def product(alpha: float, lr: float) -> Tensor:
        f = factors(9, 7, 3, seed=2, alpha=alpha)
        b = torch.zeros_like(f.b)
        for _ in range(5):
            gradient = f.scale * (f.scale * b @ f.a - target) @ f.a.T
            b = b - lr * gradient
        return f.scale * b @ f.a

    close(product(5 * 12.0, 0.002 / 25), product(12.0, 0.002))


def test_layers_start_from_different_a() -> None:
    """Released code resets its seed inside the loop, so that all layers draw one A."""
    population = single_module_setting(9, 7, (3, 3))
    (m,) = population.modules
    twins = tuple(dataclasses.replace(m, path=f"layers.{i}.w") for i in range(2))
    clients = tuple(
        dataclasses.replace(c, ranks=type(c.ranks)(dict.fromkeys((t.path for t in twins), 3)))
        for c in population.clients
    )
    state = FFA.init_state(dataclasses.replace(population, modules=twins, clients=clients))
    one, two = (state[f"global/{t.path}/a"] for t in twins)
    assert not torch.allclose(one, two)


def test_an_orthonormal_a_spans_what_the_drawn_one_does_at_every_rank() -> None:
    population = single_module_setting(9, 7, (5, 5))
    drawn = FFA.init_state(population)["global/w/a"].double()
    made = Alternate(init_a="orthonormal").init_state(population)["global/w/a"].double()
    close(made @ made.T, torch.eye(5).double(), 1e-6)
    for r in range(1, 6):
        rest = drawn[:r] - drawn[:r] @ made[:r].T @ made[:r]
        assert rest.norm() < 1e-6 * drawn[:r].norm()


# ---------------------------------------------------------------------------------- what is sent


def lacking(rule: Alternate, history: list[bool], wire: str = "float32") -> str:
    """What the client with id 0 is counted to be sent after rounds in which it took part or not."""
    population = setting(("T4", "T4", "T2"))
    state = rule.init_state(population)
    for t, took_part in enumerate(history):
        updates = cohort(rule, state, population, t)
        state = rule.aggregate(state, updates if took_part else updates[1:])
    client = population.clients[0]
    size = {
        side: sum(client.ranks[m.path] * n for m, n in zip(population.modules, widths, strict=True))
        for side, widths in (
            ("a", [m.d_in for m in population.modules]),
            ("b", [m.d_out for m in population.modules]),
        )
    }
    counted = rule.bytes_down(state, job(rule, state, client), wire)
    width = {"float32": 4, "bfloat16": 2}[wire]
    sums = {"": 0, "a": size["a"], "b": size["b"], "ab": size["a"] + size["b"]}
    (name,) = [k for k, n in sums.items() if width * n == counted]
    return name


YES, NO = True, False


@pytest.mark.parametrize(
    ("rule", "history", "sent"),
    [
        (FFA, [], ""),
        (FFA, [YES], "b"),
        (FFA, [NO, NO, NO], "b"),
        (ROLORA, [], ""),
        (ROLORA, [NO], "b"),  # A still is that of the seed
        (ROLORA, [YES], "b"),
        (ROLORA, [NO, NO], "ab"),
        (ROLORA, [YES, NO], "ab"),
        (ROLORA, [NO, YES], "a"),  # the factor that was averaged in the round before
        (ROLORA, [YES, YES, YES], "b"),
        (ROLORA, [NO, NO, YES], "b"),
        (ROLORA, [YES, YES, NO], "ab"),
    ],
)
def test_a_client_is_sent_what_has_changed_since_it_took_part(
    rule: Alternate, history: list[bool], sent: str
) -> None:
    assert lacking(rule, history) == lacking(rule, history, "bfloat16") == sent


@BOTH
def test_replies_are_one_factor(rule: Alternate) -> None:
    population = population_for(rule)
    for rounds in range(3):
        state, updates = after_rounds(rule, population, 1, rounds)
        for u in updates:
            plan = rule.plan(state, u.client, PLAN)
            name = "a" if plan.train_a else "b"
            floats = sum(getattr(f, name).numel() for f in u.adapter.values())
            assert rule.bytes_up(state, u, plan, "float32") == 4 * floats


def test_a_sum_does_not_say_who_took_part() -> None:
    population = population_for(ROLORA)
    state, updates = after_rounds(ROLORA, population, 1, 1)
    some = updates[:2]
    start = {u.client.id: ROLORA.client_start(state, u.client) for u in some}
    total = {
        name: sum(u.num_examples * ROLORA.adds(state, start[u.client.id], u)[name] for u in some)
        for name in ROLORA.adds(state, start[0], some[0])
    }
    after = ROLORA.absorb(state, total, float(sum(u.num_examples for u in some)))
    assert torch.equal(after["seen"], state["seen"])
    assert int(after["round"]) == 2


# ------------------------------------------------------------------------ server optimizers, SLoRA


def test_what_an_optimizer_remembers_of_a_frozen_factor_waits() -> None:
    """Momentum of B is as it was after a round that trained A."""
    rule = Alternate(schedule="ba", server_optimizer=FedAvgM(lr=0.5, momentum=0.9))
    population = population_for(rule)
    state, updates = after_rounds(rule, population, 1, 1)
    after = rule.aggregate(state, updates)
    memory = [k for k in state if k.startswith("server/")]
    assert len(memory) == 2 * len(population.modules)
    for key in memory:
        assert torch.equal(after[key], state[key]) == key.endswith("/b")
    ffa = dataclasses.replace(rule, schedule="b").init_state(population)
    assert all(k.endswith("/b") for k in ffa if k.startswith("server/"))


@pytest.mark.parametrize("init_a", ["kaiming", "orthonormal"])
def test_ffa_goes_on_from_the_part_of_an_update_that_its_rows_hold(init_a: str) -> None:
    rule, population = Alternate(init_a=init_a), single_module_setting(9, 7, (2, 3))
    state = rule.init_state(population)
    delta = factors(9, 7, 5, seed=1).delta()
    after = rule.adopt(state, {"w": delta})
    basis = orthonormal(state["global/w/a"].double())
    close(dense(rule.global_update(after))["w"], delta @ basis.T @ basis)
    assert torch.equal(after["global/w/a"].float(), state["global/w/a"])


def test_rolora_goes_on_from_the_best_update_of_its_rank_and_all_of_it_is_sent() -> None:
    population = single_module_setting(9, 7, (3, 3))
    state = ROLORA.init_state(population)
    delta = factors(9, 7, 5, seed=1).delta()
    after = ROLORA.adopt(state, {"w": delta})
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    close(dense(ROLORA.global_update(after))["w"], (u[:, :3] * s[:3]) @ v[:3], 1e-11)
    client = population.clients[0]
    assert ROLORA.bytes_down(after, job(ROLORA, after, client), "float32") == 4 * 3 * (9 + 7)


@BOTH
def test_slora_goes_on_with_it(rule: Alternate) -> None:
    outer = SLoRA(stage1_rounds=1, aggregator=rule)
    population = population_for(outer)
    state, updates = after_rounds(outer, population, 1, 2)
    plan = outer.plan(state, updates[0].client, PLAN)
    assert plan.train_a != plan.train_b


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "ab"}, r"strategy\.schedule='ab' is not one of \['b', 'ba'\]"),
        ({"heterogeneous": "covered"}, r"strategy\.heterogeneous='covered'"),
        ({"weighting": "owners"}, r"strategy\.weighting='owners'"),
        ({"init_a": "gaussian"}, r"strategy\.init_a='gaussian'"),
        ({"weights": "sparsity"}, r"strategy\.weights='sparsity'"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Alternate(**options)


def test_frozen_factors_of_the_configuration_and_unequal_ranks_are_refused() -> None:
    for plan in (LocalPlan(train_a=False), LocalPlan(train_b=False)):
        with pytest.raises(ValueError, match=r"says which factor is trained.*leave both true"):
            ROLORA.check(Setup(plan))
    with pytest.raises(ValueError, match=r"smallest or nest, or a method for unequal ranks"):
        Alternate(heterogeneous="refuse").init_state(setting())
    split = SplitLoRA(aggregator=FFA)
    state = split.init_state(setting())
    client = split.enlist(state, setting().clients[0])
    with pytest.raises(ValueError, match="aggregator=Alternate changes what a client does"):
        split.plan(state, client, PLAN)


def test_a_rank_above_the_global_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 4 exceeds the global rank 3"):
        first_of(factors(9, 7, 3, seed=1), 4)


def test_what_a_frozen_factor_holds_is_not_looked_at() -> None:
    """An honest client sends no A in a B-round; whatever arrives in its place has no effect."""
    population = population_for(FFA)
    state, updates = after_rounds(FFA, population, 1)
    spoilt = [
        Update(
            u.client,
            {
                p: Factors(torch.full_like(f.a, torch.nan), f.b, f.alpha)
                for p, f in u.adapter.items()
            },
            u.num_examples,
        )
        for u in updates
    ]
    one, two = (FFA.aggregate(state, u) for u in (updates, spoilt))
    assert all(torch.equal(t, two[key]) for key, t in one.items())
