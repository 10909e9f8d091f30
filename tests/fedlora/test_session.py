"""What a session deals out: messages of even work, none too large, whoever is asked."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.population import Roster
from fedlora.session import EvaluationSchedule, Rounds, Session
from fedlora.tracking import Trackers
from fedlora.types import Client, EvaluatePlan, LocalPlan, Module, Ranks, Setting
from fedlora.workload import evaluation_tokens, training_tokens
from tests.fakes import Mean
from tests.fedlora.test_workload import Held

MODULES = (Module("q_proj", "attention", 6, 5),)
laws = settings(derandomize=True, deadline=None, max_examples=25)


def session(held, workers=2, per_round=0, folder=None, **given) -> Session:
    """Of as many clients as there are shards."""
    n = len(held)
    clients = tuple(Client(i, Ranks({"q_proj": 2}), s.num_train) for i, s in enumerate(held))
    ids = tuple(range(n))
    schedule = EvaluationSchedule(groups=("seen",), clients=0, plan=EvaluatePlan(max_examples=4))
    rounds = Rounds(clients_per_message=given.pop("clients_per_message", 0))
    return Session(
        method=Mean(rank=2),
        setting=Setting(MODULES, 1000, 12.0, clients, 3),
        roster=Roster(clients, ids, {"seen": ids}, per_round or n, tuple(held)),
        plan=LocalPlan(batch_size=2, max_examples=6),
        schedule=schedule,
        rounds=rounds,
        workers=workers,
        folder=folder,
        tracker=Trackers(()),
        emit=lambda line: None,
        **given,
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
