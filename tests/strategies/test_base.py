"""A run over Flower: what a foreign reply, a silence or a death does to a run."""

from dataclasses import dataclass, replace

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message
from flwr.serverapp.strategy import Strategy

from fedlora.core.errors import ClientsSuspected, RunError, WorkerDied
from fedlora.core.types import Client, Factors, Failure, LocalPlan, Module, Ranks, Setting, Update
from fedlora.population.sampling import Roster
from fedlora.run.tracking import Trackers
from fedlora.server.flower import FederatedRun
from fedlora.server.schedule import EvaluationSchedule, Rounds
from fedlora.server.session import (
    Session,
)
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.wire.messages import decode_jobs, encode_results
from simulations.app.grid import InProcessGrid
from tests.fakes import Mean

MODULES = (Module("q_proj", "attention", 6, 5),)
CLIENTS = tuple(Client(i, Ranks({"q_proj": 2}), 10) for i in range(8))


@dataclass(frozen=True)
class Shard:
    id: int
    category: str = ""
    num_train: int = 10

    def holds(self, split: str) -> tuple[int, int]:
        return 10, 100 * (self.id + 1)


SHARDS = tuple(Shard(i) for i in range(8))


def add_one(message: Message) -> Message:
    """Every client adds one to its factors."""
    envelope = decode_jobs(message.content)
    updates = [
        Update(
            j.client,
            LowRankPayload({p: Factors(f.a + 1, f.b + 1, f.alpha) for p, f in j.start.items()}),
            j.client.num_examples,
            {"loss": 1.0, "tokens": 4.0},
        )
        for j in envelope.jobs
    ]
    content = encode_results(updates, wire="float32", nonce=envelope.nonce)
    return Message(content, reply_to=message)


def served(folder, app, **rounds):
    """A run and its session; ``app`` answers every message."""
    said: list[str] = []
    session = Session(
        method=Mean(rank=2),
        setting=Setting(MODULES, 1000, 12.0, CLIENTS, 3),
        roster=Roster(CLIENTS, tuple(range(8)), {"seen": tuple(range(8))}, 6, SHARDS, 3),
        plan=LocalPlan(),
        schedule=EvaluationSchedule(every=0),
        rounds=Rounds(**{"rounds": 2, "clients_per_message": 2, **rounds}),
        workers=1,
        folder=folder,
        tracker=Trackers(()),
        emit=said.append,
    )
    run = FederatedRun(session, worker="{}", source="")
    return run, session, said, InProcessGrid(lambda m, _: app(m), 3)


def test_two_rounds_add_two(tmp_path):
    run, session, said, grid = served(tmp_path, add_one)
    before = session.state["q_proj/a"].clone()
    run.start(grid)
    torch.testing.assert_close(session.state["q_proj/a"], before + 2)
    assert session.done == 2
    assert sum("done" in line for line in said) == 2


def spoiled(change):
    """An app of whose messages the one that holds the lowest client id comes back changed."""

    def app(message):
        reply = add_one(message)
        ids = [j.client.id for j in decode_jobs(message.content).jobs]
        app.lowest = min([*ids, getattr(app, "lowest", 99)])
        return change(message, reply) if app.lowest in ids else reply

    return app


def no_results(message, reply):
    del reply.content["results"]
    return reply


def nonsense(message, reply):
    reply.content["results"] = ConfigRecord({"rows": "not JSON"})
    return reply


def error(message, reply):
    return Message(Error(code=0, reason="ValueError: no such file"), reply_to=message)


@pytest.mark.parametrize("change", [no_results, nonsense, error])
def test_a_broken_reply_costs_its_own_clients_alone(tmp_path, change):
    run, session, said, grid = served(tmp_path, spoiled(change), rounds=1, min_success=0.1)
    run.start(grid)
    assert session.done == 1
    text = "\n".join(said)
    assert "failed: WorkerError" in text
    assert "done" in text


def test_a_dead_worker_stops_the_round_and_nothing_of_it_is_kept(tmp_path):
    def dies(message, reply):
        return Message(Error(code=0, reason="x.ActorDiedError: gone"), reply_to=message)

    run, session, _, grid = served(tmp_path, spoiled(dies))
    before = session.state
    with pytest.raises(WorkerDied, match=r"No round was complete yet; the same command"):
        run.start(grid)
    assert session.state is before
    assert session.done == 0


def test_silence_is_a_failure(tmp_path):
    run, _, said, grid = served(tmp_path, add_one, rounds=1, min_success=0.1, timeout_s=0.2)
    answered = grid.pull_messages

    def only_the_set_up(ids):
        grid.pull_messages = lambda ids: []
        return answered(ids)

    grid.pull_messages = only_the_set_up
    with pytest.raises(ClientsSuspected, match="no worker process is left that answers"):
        run.start(grid)
    assert "no answer within 0.2 s" in "\n".join(said)


def test_too_few_successes_stop_the_run(tmp_path):
    def app(message):
        envelope = decode_jobs(message.content)
        failures = [Failure(j.client, "ValueError", "no") for j in envelope.jobs]
        content = encode_results(failures, wire="float32", nonce=envelope.nonce)
        return Message(content, reply_to=message)

    run, *_, grid = served(tmp_path, app)
    with pytest.raises(RunError, match=r"only 0 of 6 .* first failure: ValueError: no"):
        run.start(grid)


@pytest.mark.parametrize(
    "call",
    ["summary", "configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate"],
)
def test_a_strategy_without_a_run_says_how_to_run_it(call):
    assert isinstance(Mean(), Strategy)
    with pytest.raises(RunError, match=r"Mean holds nothing .*FederatedRun\(session"):
        getattr(Mean(), call)()


def test_resuming_goes_on_from_the_checkpoint(tmp_path):
    whole, session, _, grid = served(tmp_path / "whole", add_one, rounds=3)
    whole.start(grid)
    first, _, _, grid = served(tmp_path / "cut", add_one, rounds=1)
    first.start(grid)
    second, again, _, grid = served(tmp_path / "cut", add_one, rounds=3)
    assert again.resume() == 1
    second.start(grid)
    assert all(torch.equal(session.state[k], again.state[k]) for k in session.state)
    stranger = replace(again, config_hash="other")
    with pytest.raises(RunError, match="another configuration"):
        stranger.resume()
