"""What a session deals out: messages of even work, none too large, whoever is asked."""

from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.types import Client, EvaluatePlan, LocalPlan, Module, Ranks, Setting, Update
from fedlora.engine.faulty import Faulty
from fedlora.engine.sequential import Sequential
from fedlora.population.sampling import Roster
from fedlora.population.workload import evaluation_tokens, training_tokens
from fedlora.run.tracking import Trackers
from fedlora.server.packing import MOST_PER_MESSAGE
from fedlora.server.schedule import EvaluationSchedule, Rounds
from fedlora.server.session import Session
from fedlora.wire.messages import Glance
from tests.fakes import Mean
from tests.fedlora.population.test_workload import Held

MODULES = (Module("q_proj", "attention", 6, 5),)
laws = settings(derandomize=True, deadline=None, max_examples=25)


def session(held, workers=2, folder=Path("unused"), clients_per_message=0, **given) -> Session:
    """Of as many clients as there are shards."""
    n = len(held)
    clients = tuple(Client(i, Ranks({"q_proj": 2}), s.num_train) for i, s in enumerate(held))
    ids = tuple(range(n))
    schedule = EvaluationSchedule(groups=("seen",), clients=0, plan=EvaluatePlan(max_examples=4))
    rounds = Rounds(clients_per_message=clients_per_message)
    return Session(
        method=Mean(rank=2),
        setting=Setting(MODULES, 1000, 12.0, clients, 3),
        roster=Roster(clients, ids, {"seen": ids}, n, tuple(held), 3),
        plan=LocalPlan(batch_size=2, max_examples=6),
        schedule=schedule,
        rounds=rounds,
        workers=workers,
        folder=folder,
        tracker=Trackers(()),
        **{"emit": lambda line: None, **given},
    )


HELD = st.lists(
    st.builds(lambda n, length: Held(n, n * length), st.integers(1, 20), st.integers(1, 99)),
    min_size=1,
    max_size=40,
)


@laws
@given(HELD, st.integers(1, 3))
def test_messages_hold_even_numbers_of_tokens(tmp_path_factory, held, workers):
    """In training and in evaluation; every client is in one message."""
    run = session(held, workers, folder=tmp_path_factory.getbasetemp())
    shards = run.roster.shards
    for batches, tokens in (
        (run.train_cohorts(1), training_tokens),
        ([jobs for _, jobs in run.evaluate_cohorts(1)], evaluation_tokens),
    ):
        assert sorted(j.client.id for jobs in batches for j in jobs) == list(range(len(held)))
        loads = [sum(tokens(shards[j.client.id], j.plan) for j in jobs) for jobs in batches]
        heaviest = max(tokens(shards[j.client.id], j.plan) for jobs in batches for j in jobs)
        assert max(loads) - min(loads) <= heaviest


@laws
@given(st.integers(1, 700), st.integers(1, 3), st.integers(1, 6), st.booleans())
def test_a_worker_gets_as_many_messages_as_its_engine_likes(n, workers, per_worker, unequal):
    """More if these would be too large, fewer if there are not so many clients."""
    held = [Held(1, 1 + 10_000 * (unequal and i == 0)) for i in range(n)]
    sizes = [
        len(jobs)
        for jobs in session(held, workers, messages_per_worker=per_worker).train_cohorts(1)
    ]
    assert sum(sizes) == n
    assert max(sizes) <= MOST_PER_MESSAGE
    assert len(sizes) == max(min(n, per_worker * workers), -(-n // MOST_PER_MESSAGE))


@laws
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 6))
def test_an_explicit_size_wins(n, size, per_worker):
    held = [Held(1, 1 + 10_000 * (i == 0)) for i in range(n)]
    run = session(held, clients_per_message=size, messages_per_worker=per_worker)
    sizes = [len(jobs) for jobs in run.train_cohorts(1)]
    assert max(sizes) <= size
    assert len(sizes) == -(-n // size)


def test_full_participation_of_1613_clients_keeps_replies_bounded():
    sizes = [
        len(jobs) for jobs in session([Held(9, 900)] * 1613, messages_per_worker=2).train_cohorts(1)
    ]
    assert sum(sizes) == 1613
    assert max(sizes) <= 256


@dataclass(frozen=True)
class Large(Sequential):
    @property
    def messages_per_worker(self) -> int:
        return 2


def test_a_rehearsal_deals_as_the_engine_behind_it():
    assert Faulty(inner=Large()).messages_per_worker == Large().messages_per_worker == 2
    assert Faulty().messages_per_worker == Sequential().messages_per_worker


def test_a_note_is_said_once_and_recorded_where_it_came(tmp_path):
    said: list[str] = []
    run = session([Held(1, 9)] * 3, folder=tmp_path, emit=said.append)
    records = []
    for round, notes in enumerate([("b", "a"), ("b",), ()], 1):
        jobs = [j for jobs in run.train_cohorts(round) for j in jobs]
        for half in (1, 2):  # two replies that say the same
            run.on_reply(Glance(half, 0, [], notes))
        metrics = {"tokens": 1.0} | ({"fused": 1.0} if round == 2 else {})
        updates = [Update(j.client, j.start, 1, metrics if j.client.id else {}) for j in jobs]
        records.append(run.finish_training(updates, run.state))
    assert [line for line in said if line.startswith("engine")] == ["engine: b", "engine: a"]
    assert [r.get("engine") for r in records] == ["a; b", "b", None]
    assert [r.get("engine/fused_share") for r in records] == [None, 1.0, None]


def test_panels_and_their_examples_follow_the_populations_seed_not_the_runs():
    held = [Held(4, 20) for _ in range(6)]

    def judged(run_seed, population_seed, **schedule):
        run = session(held)
        run.setting = replace(run.setting, seed=run_seed)
        run.roster = replace(run.roster, seed=population_seed)
        run.schedule = replace(run.schedule, clients=2, **schedule)
        jobs = [job for _, jobs in run.evaluate_cohorts(1) for job in jobs]
        return [(job.client.id, job.seed) for job in jobs]

    assert judged(1, 7) == judged(2, 7) == judged(3, 5, seed=7)
    assert {seed for _, seed in judged(1, 7)} == {7}
    assert len({tuple(judged(1, seed)) for seed in range(9)}) == 9
