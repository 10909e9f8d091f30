"""What a round deals out and takes in: variants share what they start from, bytes add up."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from fedlora.algebra.state import Kept, State
from fedlora.core.payload import Payload
from fedlora.core.types import (
    Client,
    EvaluatePlan,
    Factors,
    Failure,
    LocalPlan,
    Module,
    Ranks,
    Setting,
    Update,
)
from fedlora.server.evaluation_round import evaluation_jobs
from fedlora.server.schedule import Rounds
from fedlora.server.training_round import begin, client_rows, collect, training_jobs, validate
from fedlora.techniques.lora.payload import LowRankPayload
from tests.fakes import Mean

MODULES = (Module("q_proj", "attention", 6, 5),)
CLIENTS = tuple(Client(i, Ranks({"q_proj": 2}), 10) for i in range(4))
SETTING = Setting(MODULES, 1000, 12.0, CLIENTS, 3)


@dataclass(frozen=True, eq=False)
class TwoKinds(Mean):
    """Odd clients start from another A than even ones, at one rank."""

    rank: int = 2

    def variant(self, state: State, client: Client) -> Hashable:
        return client.id % 2

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Payload:
        return {
            p: Factors(f.a + client.id % 2, f.b, f.alpha)
            for p, f in self.global_update(state).items()
        }

    def personal_update(self, state: State, client: Client, kept: Kept | None = None) -> Payload:
        return self.client_start(state, client)


def jobs_of(method):
    state = method.init_state(SETTING)
    return state, training_jobs(method, state, CLIENTS, LocalPlan(), seed=3, round=1)


def test_clients_of_one_variant_share_their_start_and_only_they():
    _, jobs = jobs_of(TwoKinds())
    assert jobs[0].start is jobs[2].start
    assert jobs[1].start is jobs[3].start
    assert not torch.equal(jobs[0].start["q_proj"].a, jobs[1].start["q_proj"].a)
    _, alike = jobs_of(Mean(rank=2))
    assert len({id(j.start) for j in alike}) == 1


def test_clients_are_evaluated_with_their_own_variant():
    method = TwoKinds()
    state = method.init_state(SETTING)
    found = {
        kind: evaluation_jobs(
            method,
            state,
            CLIENTS,
            kind,
            EvaluatePlan(),
            max_ranks=SETTING.max_ranks,
            seed=0,
            round=1,
        )
        for kind in ("own", "full", "largest")
    }
    own = [j.adapter["q_proj"].a for j in found["own"]]
    assert torch.equal(own[0], own[2])
    assert torch.equal(own[1], own[0] + 1)
    for kind in ("full", "largest"):
        assert len({id(j.adapter) for j in found[kind]}) == 1


def test_each_client_is_accounted_for_once():
    """One accepted, one rejected, one failed, one silent: bytes down for all, up for who sent."""
    method = Mean(rank=2)
    state, jobs = jobs_of(method)
    current = begin(method, state, jobs, 1, "float32")
    good = Update(jobs[0].client, jobs[0].start, 10, {"loss": 1.0})
    spoilt = {p: Factors(f.a * torch.nan, f.b, f.alpha) for p, f in jobs[1].start.items()}
    results = [
        Failure(jobs[2].client, "ValueError", "no"),
        Update(jobs[1].client, LowRankPayload(spoilt), 10, {"loss": 1.0}),
        good,
    ]
    replies = validate(current, collect(current, results), Rounds(), SETTING)
    assert replies.updates == [good]
    assert [f.kind for f in replies.failures] == ["RejectedUpdate", "ValueError", "NoReply"]
    size = 4 * 2 * (6 + 5)
    assert current.account.record(replies.by_client) == {
        "wire/up_bytes": 2 * size,
        "wire/down_bytes": 4 * size,
    }
    rows = client_rows(current, replies)
    assert [(r["client"], r["bytes_up"], r["bytes_down"]) for r in rows] == [
        (0, size, size),
        (1, size, size),
        (2, 0, size),
        (3, 0, size),
    ]
