"""Laws of schedules, for every policy, layout, budget and number of slots."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.engine.fused import schedule as schedule_module
from fedlora.engine.fused.schedule import (
    POLICIES,
    Forward,
    Policy,
    Resident,
    Room,
    Schedule,
    Step,
    Work,
    cost,
    first_come,
    in_line,
    longest_first,
    longest_remaining,
    policy,
    similar_widths,
)
from tests import doctests

LAWS = settings(derandomize=True, deadline=None, max_examples=150)


@st.composite
def forwards(draw) -> Forward:
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    return Forward(rows, width, draw(st.integers(1, rows * width)))


WORKS = st.lists(st.lists(forwards(), min_size=1, max_size=8).map(tuple).map(Work), max_size=14)
SETTINGS = {
    "works": WORKS,
    "name": st.sampled_from(sorted(POLICIES)),
    "budget": st.integers(1, 200),
    "slots": st.integers(1, 9),
    "padded": st.booleans(),
}


def run(works, name, budget, slots, padded=False) -> list[Step]:
    return list(Schedule(works, POLICIES[name], budget, slots, padded))


def active(works, step: Step) -> list[Forward]:
    return [works[client].forwards[index] for client, _, index in step.active]


def population(clients=200, seed=0, spread=0.2) -> list[Work]:
    """Chains of lognormal length; each client has texts of its own typical length, 8 to 128."""
    rng = np.random.default_rng(seed)
    works = []
    for _ in range(clients):
        typical = rng.uniform(8, 128)
        chain = []
        for _ in range(int(np.clip(rng.lognormal(2.3, 1), 1, 200))):
            lengths = np.clip(rng.normal(typical, spread * typical, 4), 8, 128).astype(int)
            chain.append(Forward(4, int(lengths.max()), int(lengths.sum())))
        works.append(Work(tuple(chain)))
    return works


# --- laws of every policy ------------------------------------------------------------------------


@LAWS
@given(**SETTINGS)
def test_every_forward_runs_once_in_its_order(works, name, budget, slots, padded):
    steps = run(works, name, budget, slots, padded)
    for client, work in enumerate(works):
        ran = [i for step in steps for c, _, i in step.active if c == client]
        assert ran == list(range(len(work.forwards)))
    for step in steps:
        clients = [client for client, _, _ in step.active]
        assert clients and len(set(clients)) == len(clients)


@LAWS
@given(**SETTINGS)
def test_a_step_exceeds_the_budget_only_with_a_single_forward(works, name, budget, slots, padded):
    for step in run(works, name, budget, slots, padded):
        assert cost(active(works, step), padded) <= budget or len(step.active) == 1


@LAWS
@given(**SETTINGS)
def test_slots_hold_one_client_from_admission_to_its_end(works, name, budget, slots, padded):
    held: dict[int, int] = {}
    for step in run(works, name, budget, slots, padded):
        for client, slot in step.admitted:
            assert slot not in held and client not in held.values()
            assert slot == min(set(range(slots)) - set(held))
            held[slot] = client
        assert [slot for _, slot, _ in step.active] == sorted(slot for _, slot, _ in step.active)
        assert all(held[slot] == client for client, slot, _ in step.active)
        last = {c for c, _, i in step.active if i == len(works[c].forwards) - 1}
        assert set(step.finished) == last
        held = {slot: client for slot, client in held.items() if client not in last}
    assert not held


@LAWS
@given(**SETTINGS)
def test_free_slots_are_given_away_at_once_or_to_a_whole_wave(works, name, budget, slots, padded):
    waiting, residents = len(works), 0
    for step in run(works, name, budget, slots, padded):
        wanted = min(waiting, slots - residents)
        if POLICIES[name].wave and residents:
            wanted = 0
        assert len(step.admitted) == wanted
        waiting -= wanted
        residents += wanted - len(step.finished)


@LAWS
@given(**SETTINGS)
def test_a_schedule_is_a_function_of_its_arguments(works, name, budget, slots, padded):
    assert run(works, name, budget, slots, padded) == run(works, name, budget, slots, padded)


@LAWS
@given(**SETTINGS)
def test_no_schedule_is_shorter_than_the_longest_chain_or_the_full_steps(
    works, name, budget, slots, padded
):
    steps = run(works, name, budget, slots, padded)
    sizes = [min(cost([f], padded), budget) for w in works for f in w.forwards]
    chain = max((len(w.forwards) for w in works), default=0)
    # Padding never makes rows cheaper, so the bound by tokens holds for both layouts.
    assert len(steps) >= max(chain, math.ceil(sum(sizes) / budget))
    assert len(steps) <= len(sizes)


@LAWS
@given(**SETTINGS, data=st.data())
def test_dropping_clients_stops_them_and_harms_nobody(works, name, budget, slots, padded, data):
    schedule = Schedule(works, POLICIES[name], budget, slots, padded)
    ran: dict[int, list[int]] = {client: [] for client in range(len(works))}
    dropped: set[int] = set()
    held: dict[int, int] = {}
    for step in schedule:
        for client, slot in step.admitted:
            assert slot not in held
            held[slot] = client
        assert len(held) <= slots
        for client, slot, index in step.active:
            assert held[slot] == client and client not in dropped
            ran[client].append(index)
        gone = data.draw(st.sets(st.integers(0, len(works) - 1), max_size=2))
        for client in gone:
            schedule.drop(client)
            schedule.drop(client)
        dropped |= gone
        out = gone | set(step.finished)
        held = {slot: client for slot, client in held.items() if client not in out}
    for client, work in enumerate(works):
        assert ran[client] == list(range(len(ran[client])))
        assert client in dropped or len(ran[client]) == len(work.forwards)


def test_dropping_everybody_ends_the_schedule():
    schedule = Schedule(population(20), POLICIES["refill"], 500, 4)
    next(schedule)
    for client in range(20):
        schedule.drop(client)
    assert list(schedule) == []


@pytest.mark.parametrize("client", [-1, 3])
def test_dropping_a_client_that_does_not_exist_is_refused(client):
    with pytest.raises(ValueError, match=str(client)):
        Schedule(population(3), POLICIES["refill"], 500, 4).drop(client)


# --- what policies promise -----------------------------------------------------------------------


@LAWS
@given(works=WORKS, slots=st.integers(1, 9))
def test_where_only_slots_are_scarce_refill_is_no_longer_than_waves(works, slots):
    """Longest first, a client of the g-th group of a wave starts when the g-1 groups' maxima have
    passed, at the latest; sorted groups have the smallest maxima."""
    length = {name: len(run(works, name, 10**6, slots)) for name in POLICIES}
    assert length["refill"] <= length["lpt_wave"] <= length["fifo_wave"]
    assert length["fifo_refill"] <= length["fifo_wave"]


@LAWS
@given(works=WORKS, budget=st.integers(1, 300))
def test_where_only_tokens_are_scarce_refill_obeys_the_list_scheduling_bound(works, budget):
    """A step either runs all residents, which shortens every chain, or has no room for one more
    forward."""
    sizes = [f.tokens for w in works for f in w.forwards]
    widest, chain = max(sizes, default=0), max((len(w.forwards) for w in works), default=0)
    if budget > widest:
        steps = len(run(works, "refill", budget, len(works) or 1))
        assert steps <= chain + sum(sizes) / (budget - widest + 1)


def residents_of(held: list[Forward]) -> list[Resident]:
    return [Resident(k, k, Work((f, f)), f, forwards_left=1 + k % 2) for k, f in enumerate(held)]


@LAWS
@given(
    held=st.lists(forwards(), min_size=1, max_size=8),
    choose=st.sampled_from([in_line, longest_remaining]),
    budget=st.integers(1, 300),
    padded=st.booleans(),
)
def test_nobody_waits_who_would_fit(held, choose, budget, padded):
    line = residents_of(held)
    chosen = choose(line, Room(budget, padded, min(f.tokens for f in held)))
    running = [r.forward for r in chosen]
    for resident in line:
        if resident not in chosen:
            assert cost([*running, resident.forward], padded) > budget


@LAWS
@given(
    held=st.lists(forwards(), min_size=1, max_size=8),
    budget=st.integers(1, 300),
    padded=st.booleans(),
)
def test_similar_widths_are_the_best_of_all_runs(held, budget, padded):
    def score(run: list[Forward]) -> float:
        return cost(run, False) ** 2 / cost(run, True)

    ordered = sorted(held, key=lambda f: f.width)
    runs = [ordered[i:j] for j in range(1, len(held) + 1) for i in range(j)]
    fitting = [run for run in runs if len(run) == 1 or cost(run, padded) <= budget]
    chosen = [r.forward for r in similar_widths(residents_of(held), Room(budget, padded, 1))]
    assert chosen in fitting
    # Runs as long as the budget allows, that is: a shorter one may pad even less.
    longest = [run for run in fitting if not any(_extends(o, run) for o in fitting)]
    assert score(chosen) >= max(map(score, longest)) - 1e-9


def _extends(other: list[Forward], run: list[Forward]) -> bool:
    """Whether ``other`` ends as ``run`` does and starts earlier."""
    return len(other) > len(run) and other[-len(run) :] == run


@LAWS
@given(works=WORKS, slots=st.integers(1, 4), budget=st.integers(1, 200))
def test_matching_gives_a_slot_to_the_candidate_nearest_in_width(works, slots, budget):
    def width(client: int) -> float:
        chain = works[client].forwards
        return sum(f.width for f in chain) / len(chain)

    line, inside = longest_first(works), []
    room = POLICIES["length_match"].lookahead * min(slots, len(works)) + 1
    for step in run(works, "length_match", budget, slots):
        for client, _ in step.admitted:
            candidates = line[:room]
            assert client in candidates
            if inside:
                mean = sum(map(width, inside)) / len(inside)
                gaps = [abs(width(c) - mean) for c in candidates]
                assert abs(width(client) - mean) <= min(gaps) + 1e-9
            else:
                assert width(client) == max(map(width, candidates))
            line.remove(client)
            inside.append(client)
        inside = [client for client in inside if client not in step.finished]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("budget", "slots"), [(1024, 9), (4096, 36)])
def test_on_unequal_clients_refill_beats_waves_and_nears_the_bound(budget, slots, seed):
    works = population(seed=seed)
    length = {name: len(run(works, name, budget, slots)) for name in POLICIES}
    tokens = sum(f.tokens for w in works for f in w.forwards)
    bound = max(max(len(w.forwards) for w in works), tokens / budget)
    assert length["refill"] < length["fifo_wave"]
    assert bound <= length["refill"] <= 1.25 * bound


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("budget", "slots"), [(1024, 9), (4096, 36)])
def test_matching_lengths_pads_least(budget, slots, seed):
    works = population(seed=seed)

    def computed(policy: Policy) -> int:
        steps = Schedule(works, policy, budget, slots, padded=True)
        return sum(cost(active(works, step), True) for step in steps)

    least = computed(POLICIES["length_match"])
    assert all(least < computed(p) for name, p in POLICIES.items() if name != "length_match")
    # Each of its two parts is needed.
    assert least < computed(replace(POLICIES["length_match"], choose=longest_remaining))
    assert least < computed(replace(POLICIES["length_match"], lookahead=0))


def test_first_come_is_first_served():
    works = population(30)
    steps = run(works, "fifo_refill", 10**6, 4)
    assert [client for step in steps for client, _ in step.admitted] == list(range(30))


def test_waiting_lines():
    one, two = Forward(1, 2, 2), Forward(1, 9, 9)
    works = [Work((two,)), Work((one, one)), Work((one, two)), Work((one, one))]
    assert first_come(works) == [0, 1, 2, 3]
    assert longest_first(works) == [2, 1, 3, 0]


def test_a_small_schedule_by_hand():
    wide, narrow = Forward(1, 60, 60), Forward(1, 30, 30)
    works = [Work((wide, wide)), Work((narrow,)), Work((narrow, narrow, narrow)), Work((wide,))]
    assert run(works, "refill", 100, 2) == [
        Step(((2, 0), (0, 1)), ((2, 0, 0), (0, 1, 0)), ()),
        Step((), ((2, 0, 1), (0, 1, 1)), (0,)),
        Step(((3, 1),), ((2, 0, 2), (3, 1, 0)), (2, 3)),
        Step(((1, 0),), ((1, 0, 0),), (1,)),
    ]


def test_a_forward_beyond_the_budget_runs_alone_and_all_others_still_run():
    huge, small = Forward(1, 900, 900), Forward(1, 10, 10)
    works = [Work((small, huge, small)), Work((small,) * 5), Work((huge, huge))]
    for name in POLICIES:
        for padded in (False, True):
            steps = run(works, name, 100, 3, padded)
            assert sum(active(works, step) == [huge] for step in steps) == 3


def test_padded_and_ragged_costs():
    held = [Forward(2, 10, 15), Forward(1, 30, 30)]
    assert (cost(held, False), cost(held, True)) == (45, 90)
    assert cost([], False) == cost([], True) == 0


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "slots", "key"),
    [(0, 1, "engine.tokens"), (-5, 1, "engine.tokens"), (1, 0, "engine.slots")],
)
def test_limits_below_one_are_refused_by_name(budget, slots, key):
    with pytest.raises(ValueError, match=key):
        Schedule(population(2), POLICIES["refill"], budget, slots)


def test_an_unknown_policy_is_answered_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"engine.policy='fastest'.*length_match, lpt_wave, refill"
    ):
        policy("fastest")
    assert policy("refill") is POLICIES["refill"]


@pytest.mark.parametrize("fields", [(0, 5, 1), (1, 0, 1), (1, 5, 0), (2, 5, 11)])
def test_impossible_forwards_are_refused(fields):
    with pytest.raises(ValueError, match="Forward"):
        Forward(*fields)


def test_a_chain_without_a_forward_is_refused():
    with pytest.raises(ValueError, match="without a forward"):
        Work(())


def test_examples_in_docstrings():
    assert doctests.run(schedule_module) == 2
