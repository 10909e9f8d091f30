"""Workers that a client ends or blocks: who is suspected, who is left out, and that runs go on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.errors import ClientsSuspected, RunError, WorkerDied
from fedlora.run.tracking import read_jsonl
from fedlora.server.incidents import DEADLINE, DIED, EVALUATE, TRAIN, Incident, Incidents
from fedlora.wire.messages import decode_jobs
from tests.strategies.test_base import add_one, served


@dataclass
class Attempts:
    """A run that continues after each death with new workers, as the launcher has it."""

    folder: Path
    answer: Callable[[Message], Message | None]
    rounds: Mapping[str, float | int]

    def play(self, most: int = 12) -> tuple[int, object]:
        for n in range(most):
            run, session, _, grid = served(self.folder, self._app, **self.rounds)
            silence = grid.pull_messages

            def pull(ids, silence=silence):
                return [reply for reply in silence(ids) if reply is not None]

            grid.pull_messages = pull
            session.resume()
            try:
                run.start(grid)
                return n, session
            except WorkerDied as error:
                self.last = error
        raise AssertionError(f"no end after {most} attempts: {self.last}")

    def _app(self, message):
        return self.answer(message)


def ids_of(message: Message) -> list[int]:
    return [j.client.id for j in decode_jobs(message.content).jobs]


def deadly(*killers: int) -> Callable[[Message], Message]:
    def app(message):
        if set(killers) & set(ids_of(message)):
            return Message(Error(code=0, reason="x.ActorDiedError: gone"), reply_to=message)
        return add_one(message)

    return app


MILD = {"rounds": 3, "min_success": 0.1, "clients_per_message": 3}


@pytest.mark.parametrize("killers", [(4,), (0,), (1, 6)])
def test_a_client_that_ends_its_worker_every_time_is_named_and_left_out(tmp_path, killers):
    attempts, session = Attempts(tmp_path, deadly(*killers), MILD).play()
    assert session.done == 3
    found = Incidents(tmp_path).left_out(TRAIN, 3)
    assert set(found) <= set(killers), "nobody innocent"
    assert found, "and some culprit took part"
    assert attempts <= 3 * len(killers), "two deaths suspect, one more convicts"


def test_what_is_left_is_what_a_failing_client_leaves(tmp_path):
    """The run ends in the state of one in which the same client merely fails."""

    def fails(message):
        kept = add_one(message)
        for c in set(ids_of(message)) & {4}:
            assert c is not None
            return Message(Error(code=0, reason="ValueError: no"), reply_to=message)
        return kept

    alone = MILD | {"clients_per_message": 1}
    _, killed = Attempts(tmp_path / "killed", deadly(4), MILD).play()
    _, failed = Attempts(tmp_path / "failed", fails, alone).play()
    assert killed.state.keys() == failed.state.keys()
    assert all(torch.equal(killed.state[k], failed.state[k]) for k in killed.state)


def test_one_death_is_an_accident_and_costs_nobody_his_round(tmp_path):
    once = iter([True])

    def app(message):
        if 4 in ids_of(message) and next(once, False):
            return Message(Error(code=0, reason="x.ActorDiedError: gone"), reply_to=message)
        return add_one(message)

    attempts, session = Attempts(tmp_path, app, MILD).play()
    assert (attempts, session.done) == (1, 3)
    assert Incidents(tmp_path).left_out(TRAIN, 3) == {}


def test_the_second_death_is_reported_as_something_that_was_learnt(tmp_path):
    kinds = []
    for _ in range(3):
        run, _, _, grid = served(tmp_path, deadly(4), **MILD | {"clients_per_message": 8})
        with pytest.raises(WorkerDied) as ended:
            run.start(grid)
        kinds.append(type(ended.value))
    assert kinds == [WorkerDied, ClientsSuspected, ClientsSuspected]
    assert set(Incidents(tmp_path).left_out(TRAIN, 1)) == {4}


def test_workers_that_die_of_everything_are_no_clients_fault(tmp_path):
    with pytest.raises(RunError, match="whichever client they were sent") as ended:
        Attempts(tmp_path, deadly(*range(8)), MILD).play()
    assert not isinstance(ended.value, WorkerDied)


def test_a_client_that_never_answers_is_dropped_and_later_left_out(tmp_path):
    def app(message):
        return None if 4 in ids_of(message) else add_one(message)

    words = MILD | {"timeout_s": 0.05, "rounds": 4}
    _, session = Attempts(tmp_path, app, words).play(24)
    assert session.done == 4
    record = Incidents(tmp_path)
    assert set(record.left_out(TRAIN, 4)) == {4}


@given(st.sampled_from([TRAIN, EVALUATE]), st.integers(1, 5), st.sets(st.integers(0, 9)))
def test_only_what_was_alone_is_left_out(tmp_path_factory, phase, round, clients):
    record = Incidents(tmp_path_factory.mktemp("run"))
    for kind in (DIED, DIED, DEADLINE):
        record.add(Incident(round, phase, kind, tuple(clients)))
    assert set(record.left_out(phase, round)) == clients, "the deadline costs this round"
    assert record.left_out(phase, round + 1) == {}
    assert record.one_by_one(phase, round) == clients, "two deaths"
    assert record.one_by_one(phase, round + 1) == clients, "a deadline"
    record.add(Incident(round, phase, DIED, (7,), alone=True))
    assert set(record.left_out(phase, round + 1)) == {7}
    assert record.left_out(phase, round - 1) == {}, "earlier rounds can be repeated as they were"
    assert 7 not in record.left_out({TRAIN: EVALUATE, EVALUATE: TRAIN}[phase], round + 1)


@pytest.mark.parametrize("text", ["[", "{}", '[{"round": 1}]', "[1]"])
def test_a_damaged_record_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "incidents.json").write_text(text)
    with pytest.raises(RunError, match=r"incidents\.json cannot be read .* Delete it"):
        Incidents(tmp_path)


def test_the_record_is_what_was_added(tmp_path):
    record = Incidents(tmp_path)
    for i in (Incident(1, TRAIN, DIED, (1, 2)), Incident(2, EVALUATE, DEADLINE, (3,), True)):
        record.add(replace(i))
    assert Incidents(tmp_path).left_out(EVALUATE, 2) == record.left_out(EVALUATE, 2) != {}
    assert read_jsonl(tmp_path / "absent") == []
