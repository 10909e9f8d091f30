"""LoRA-A²: turns and budgets, exact averages of what each client chose, traffic, and refusals."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.types import Factors, LocalPlan, Setting, Update
from fedlora.server import missed
from fedlora.server.method import Setup
from fedlora.server.plain_flower import PlainFlower
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import with_pruning
from fedlora.training import choice
from fedlora.training.choice import LargestChange
from strategies import lora_a2
from strategies.alternate import Alternate
from strategies.lora_a2 import LoRAA2
from strategies.slora import SLoRA
from strategies.splitlora import SplitLoRA
from tests.generators import dense, factors, seeds, setting, single_module_setting
from tests.planted import planted
from tests.strategies import laws
from tests.strategies.laws import (
    PLAN,
    Law,
    after_rounds,
    close,
    cohort,
    job,
    population_for,
    reached,
)

RULE = LoRAA2(global_rank=7)  # above every tier's rank of the population, so that all choose
TRAINED = {"b": "d_out", "a": "d_in"}


def rank(population: Setting, path: str) -> int:
    """The server's."""
    return next(min(7, m.max_rank) for m in population.modules if m.path == path)


# ------------------------------------------------------------------------------ turns and budgets


@pytest.mark.parametrize("ratio", [5.0, 0.5])
def test_rounds_train_b_and_a_by_turns_each_at_its_learning_rate(ratio: float) -> None:
    rule, population = dataclasses.replace(RULE, lr_ratio=ratio), setting()
    for t in range(4):
        state, updates = after_rounds(rule, population, 1, t)
        for u in updates:
            plan = rule.plan(state, u.client, PLAN)
            assert (plan.train_a, plan.train_b) == ((True, False) if t % 2 else (False, True))
            assert plan.lr == PLAN.lr * (1 if t % 2 else ratio)
            assert (
                dataclasses.replace(plan, lr=PLAN.lr, train_a=True, train_b=True, choice=None)
                == PLAN
            )


def test_a_rank_is_a_budget_over_all_modules() -> None:
    population = setting()
    state = RULE.init_state(population)
    found = {}
    for c in population.clients:
        plan = RULE.plan(state, RULE.enlist(state, c), PLAN)
        assert plan.choice == LargestChange(sum(c.ranks.values()))
        assert RULE.enlist(state, c) == c
        found[c.tier] = sum(c.ranks.values())
    assert found["T1"] < found["T2"] < found["T3"] < found["T4"]
    for u in after_rounds(RULE, population, 1, 1)[1]:
        assert u.payload.indices is not None
        assert sum(map(len, u.payload.indices.values())) == found[u.client.tier]


def test_clients_choose_across_modules_and_not_the_same() -> None:
    """A client leaves a module out for others; one of its rank does otherwise."""
    _, updates = after_rounds(RULE, setting(("T1",) * 6), 1, 1)
    chosen = [u.payload.indices for u in updates]
    assert len({str(x) for x in chosen}) > 1
    assert any(not at for x in chosen if x is not None for at in x.values())


def test_a_budget_of_all_indices_is_a_round_of_rolora() -> None:
    """Bit for bit, in both phases, without a trial."""
    rule, rolora = LoRAA2(lr_ratio=1.0), Alternate(schedule="ba")
    population = setting(("T4", "T4", "T4"))
    mine, theirs = rule.init_state(population), rolora.init_state(population)
    for t in range(3):
        c = population.clients[0]
        plan = rule.plan(mine, c, PLAN)
        assert plan == rolora.plan(theirs, c, PLAN) and plan.choice is None
        updates = cohort(rule, mine, population, t)
        for u in updates:
            asked = job(rule, mine, u.client), job(rolora, theirs, u.client)
            down = [
                r.bytes_down(s, j, "float32")
                for r, s, j in zip((rule, rolora), (mine, theirs), asked, strict=True)
            ]
            assert down[0] == down[1]
            assert rule.bytes_up(mine, u, plan, "float32") == rolora.bytes_up(
                theirs, u, plan, "float32"
            )
        mine, theirs = rule.aggregate(mine, updates), rolora.aggregate(theirs, updates)
        for m in population.modules:
            for side in "ab":
                key = f"global/{m.path}/{side}"
                close(mine[key], theirs[key], 1e-15)


# ------------------------------------------------------------------------------------- averages


@given(seed=seeds, data=st.data())
def test_the_product_moves_by_the_mean_of_the_clients_products(seed: int, data: Any) -> None:
    """LA2-2: masked changes of one factor, of whatever sets, empty ones among them."""
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    population, side = single_module_setting(9, 7, ranks), data.draw(st.sampled_from("ab"))
    rule = LoRAA2(global_rank=5)
    state = dict(rule.init_state(population))
    f = factors(9, 7, 5, seed)
    state |= {"global/w/a": f.a, "global/w/b": f.b, "round": torch.tensor(int(side == "a"))}
    updates, moved = [], []
    for k, c in enumerate(population.clients):
        at = data.draw(st.sets(st.integers(0, 4)))
        g = factors(9, 7, 5, seed + 1 + k)
        a, b = f.a.clone(), f.b.clone()
        for i in at:
            a[i], b[:, i] = (g.a[i], b[:, i]) if side == "a" else (a[i], g.b[:, i])
        sent = LowRankPayload({"w": Factors(a, b, f.alpha)}, {"w": tuple(sorted(at))})
        updates.append(Update(c, sent, c.num_examples))
        moved.append(Factors(a, b, f.alpha).delta() - f.delta())
    after = rule.aggregate(state, updates)
    total = sum(u.num_examples for u in updates)
    mean = sum(u.num_examples / total * d for u, d in zip(updates, moved, strict=True))
    got = dense(rule.global_update(after))["w"] - f.delta()
    assert float((got - mean).norm()) <= 1e-12 * float(f.delta().norm())
    other = "b" if side == "a" else "a"
    assert torch.equal(after[f"global/w/{other}"], f.a if other == "a" else f.b)
    unchosen = set(range(5)) - {i for u in updates for i in u.payload.indices["w"]}
    for i in unchosen:  # every bit
        new, old = after[f"global/w/{side}"], getattr(f, side)
        assert torch.equal(*((t[i] if side == "a" else t[:, i]) for t in (new, old)))


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_shares_are_those_of_the_participants(rounds: int) -> None:
    """LA2-3: over all clients of the population the step would shrink."""
    population = population_for(RULE)
    state, updates = after_rounds(RULE, population, 1, rounds)
    some = updates[1:3]
    after = dense(RULE.global_update(RULE.aggregate(state, some)))
    total = sum(u.num_examples for u in some)
    for path, d in dense(RULE.global_update(state)).items():
        mean = sum(u.num_examples / total * (reached(RULE, state, u)[path] - d) for u in some)
        close(after[path] - d, mean, 1e-11)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_a_lone_client_gets_its_update_back_in_every_phase(rounds: int) -> None:
    population = population_for(RULE)
    state, updates = after_rounds(RULE, population, 1, rounds)
    for update in updates:
        back = dense(RULE.client_start(RULE.aggregate(state, [update]), update.client))
        for path, d in reached(RULE, state, update).items():
            close(back[path], d)


def test_all_clients_use_the_whole_model() -> None:
    population = setting()
    state, _ = after_rounds(RULE, population, 1, 2)
    whole = dense(RULE.global_update(state))
    for c in population.clients:
        for path, d in dense(RULE.personal_update(state, c)).items():
            assert torch.equal(d, whole[path])


# ---------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize(("wire", "width"), [("float32", 4), ("bfloat16", 2)])
def test_what_goes_up_is_what_was_chosen(wire: str, width: int) -> None:
    """Scalars of the trained factor at chosen indices, and two bytes for each."""
    population = setting()
    sizes = {m.path: m for m in population.modules}
    for t in range(4):
        state, updates = after_rounds(RULE, population, 1, t)
        for u in updates:
            plan = RULE.plan(state, u.client, PLAN)
            name = TRAINED["a" if plan.train_a else "b"]
            indices: Mapping[str, tuple[int, ...]] = u.payload.indices or {}
            rows = {path: getattr(sizes[path], name) * len(at) for path, at in indices.items()}
            due = width * sum(rows.values()) + 2 * sum(u.client.ranks.values())
            assert RULE.bytes_up(state, u, plan, wire) == due


def lacking(history: list[bool], wire: str = "float32") -> str:
    """What the client with id 0 is counted to be sent after rounds in which it took part or not."""
    population = setting(("T1", "T4", "T2"))
    state = RULE.init_state(population)
    for t, took_part in enumerate(history):
        updates = cohort(RULE, state, population, t)
        state = RULE.aggregate(state, updates if took_part else updates[1:])
    size = {
        side: sum(rank(population, m.path) * getattr(m, name) for m in population.modules)
        for side, name in TRAINED.items()
    }
    counted = RULE.bytes_down(state, job(RULE, state, population.clients[0]), wire)
    width = {"float32": 4, "bfloat16": 2}[wire]
    sums = {"": 0, "a": size["a"], "b": size["b"], "ab": size["a"] + size["b"]}
    (name,) = [k for k, n in sums.items() if width * n == counted]
    return name


YES, NO = True, False


@pytest.mark.parametrize(
    ("history", "sent"),
    [
        ([], ""),
        ([NO], "b"),  # A still is that of the seed
        ([YES], "b"),
        ([NO, NO], "ab"),
        ([YES, NO], "ab"),
        ([NO, YES], "a"),  # the factor that was averaged in the round before
        ([YES, YES, YES], "b"),
        ([NO, NO, YES], "b"),
        ([YES, YES, NO], "ab"),
    ],
)
def test_a_client_is_sent_what_has_changed_at_the_servers_rank(
    history: list[bool], sent: str
) -> None:
    assert lacking(history) == lacking(history, "bfloat16") == sent


# -------------------------------------------------------------------------------- other strategies


def test_slora_goes_on_with_it_and_all_of_it_is_sent() -> None:
    population = single_module_setting(9, 7, (2, 3))
    rule = LoRAA2(global_rank=4)
    state = rule.init_state(population)
    delta = factors(9, 7, 6, seed=1).delta()
    after = rule.adopt(state, {"w": delta})
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    close(dense(rule.global_update(after))["w"], (u[:, :4] * s[:4]) @ v[:4], 1e-11)
    asked = job(rule, after, population.clients[0])
    assert rule.bytes_down(after, asked, "float32") == 4 * 4 * (9 + 7)

    outer = SLoRA(stage1_rounds=1, aggregator=rule)
    state, updates = after_rounds(outer, population, 1, 2)
    plan = outer.plan(state, updates[0].client, PLAN)
    assert plan.choice == LargestChange(2) and plan.train_a != plan.train_b


def test_what_cannot_choose_is_refused() -> None:
    split = SplitLoRA(aggregator=RULE)
    state = split.init_state(setting())
    client = split.enlist(state, setting().clients[0])
    with pytest.raises(ValueError, match="aggregator=LoRAA2 changes what a client does"):
        split.plan(state, client, PLAN)


def test_flowers_own_clients_are_refused() -> None:
    flower, population = PlainFlower(RULE), setting()
    flower.state = RULE.init_state(population)
    with pytest.raises(Exception, match="has its clients choose the rank indices"):
        flower._planned(population.clients[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_rank": -1}, r"strategy\.global_rank=-1 must be >= 0"),
        ({"weights": "sparsity"}, r"strategy\.weights='sparsity'"),
        ({"lr_ratio": 0.0}, r"strategy\.lr_ratio=0"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAA2(**options)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (Setup(LocalPlan(train_a=False)), r"client\.train_a=False.*leave both true"),
        (Setup(LocalPlan(train_b=False)), r"client\.train_b=False.*leave both true"),
        (Setup(with_pruning(PLAN, SelfPrune(0.1, 0.9, 1))), r"self_prune=null"),
        (Setup(PLAN, "bfloat16", error_feedback=True), r"choose federation\.error_feedback=false"),
        (
            Setup(dataclasses.replace(PLAN, choice=LargestChange(2))),
            r"client\.choice=LargestChange",
        ),
    ],
)
def test_what_does_not_fit_is_refused(setup: Setup, message: str) -> None:
    RULE.check(Setup(PLAN))
    with pytest.raises(ValueError, match=message):
        RULE.check(setup)


def test_the_servers_rank_holds_every_clients_and_no_more_than_a_module_can() -> None:
    population = setting()
    with pytest.raises(ValueError, match=r"global_rank=4 is below rank 5.*at least 6, or 0"):
        LoRAA2(global_rank=4).init_state(population)
    for asked, due in ((0, population.max_ranks), (7, None), (100, None)):
        state = LoRAA2(global_rank=asked).init_state(population)
        for m in population.modules:
            r = state[f"global/{m.path}/a"].shape[0]
            assert r == (min(asked, m.max_rank) if due is None else due[m.path])


# ------------------------------------------------------------------------------------------ faults

Check = Callable[[], Any]


def of(law: Law) -> Check:
    return lambda: law(RULE, 1, laws.DOUBLE)


def of_bytes() -> None:
    for history, sent in (([YES], "b"), ([NO, YES], "a"), ([YES, NO], "ab")):
        assert lacking(history) == sent


FAULTS: list[tuple[Callable[..., Any], str, str, Check]] = [
    # What was not chosen is averaged; a row for a column; all of a factor counted.
    (
        lora_a2.change,
        "found[:, at] = moved[:, at]",
        "found = moved",
        of(laws.what_is_not_sent_is_not_read),
    ),
    (
        lora_a2.change,
        "if indices is None",
        "if True",
        of(laws.what_is_not_sent_is_not_read),
    ),
    (
        lora_a2.change,
        "found[:, at] = moved[:, at]",
        "found[at] = moved[at]",
        of(laws.the_model_moves_by_the_mean_of_changes),
    ),
    (
        lora_a2.LoRAA2.aggregate,
        "(updates))",
        "([*updates, *updates]))[: len(updates)]",
        of(laws.a_lone_client_gets_its_update_back),
    ),
    (
        lora_a2._moved,
        'state[f"{GLOBAL}{name}"] + x',
        "x",
        of(laws.idle_clients_of_unequal_rank_leave_the_model),
    ),
    (
        lora_a2._side,
        "int(state[ROUND])",
        "1 + int(state[ROUND])",
        lambda: test_rounds_train_b_and_a_by_turns_each_at_its_learning_rate(5.0),
    ),
    (
        lora_a2.LoRAA2._turn,
        'side == "b" else',
        'side == "a" else',
        lambda: test_rounds_train_b_and_a_by_turns_each_at_its_learning_rate(5.0),
    ),
    (
        lora_a2.LoRAA2.plan,
        "sum(client.ranks.values())",
        "max(client.ranks.values())",
        test_a_rank_is_a_budget_over_all_modules,
    ),
    (
        choice.LargestChange.choose,
        "torch.cat([index_scores(f, probed[path]) for path, f in start.items()])",
        "torch.cat([index_scores(f, f) for f in start.values()])",
        test_clients_choose_across_modules_and_not_the_same,
    ),
    (
        lora_a2.LoRAA2.client_start,
        "_pair(state)",
        "{p: Factors(f.a[:1], f.b[:, :1], f.alpha) for p, f in _pair(state).items()}",
        of(laws.starts_have_the_ranks_of_their_clients),
    ),
    (missed.missed_sides, "range(seen,", "range(seen + 1,", of_bytes),
    (missed.missed_sides, "min(done, ", "min(seen + 1, ", of_bytes),
    (
        LowRankPayload.sent_floats,
        "chosen[path] if chosen else range(f.rank)",
        "range(f.rank)",
        lambda: test_what_goes_up_is_what_was_chosen("float32", 4),
    ),
    (
        LowRankPayload.index_bytes,
        "2 if places",
        "0 if places",
        lambda: test_what_goes_up_is_what_was_chosen("float32", 4),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0].__qualname__}: {f[2][:40]}")
def test_faults_are_noticed(fault: tuple[Callable[..., Any], str, str, Check]) -> None:
    function, right, wrong, check = fault
    check()
    forget()
    try:
        with planted(function, right, wrong), pytest.raises((AssertionError, IndexError)):
            check()
    finally:
        forget()


def forget() -> None:
    """The laws keep the rounds that they have computed."""
    laws._state_after.cache_clear()
    laws._one_more_round.cache_clear()
