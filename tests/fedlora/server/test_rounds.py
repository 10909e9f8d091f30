"""What a round deals out and takes in: variants share what they start from, bytes add up."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import pytest
import torch

from fedlora.algebra.init import sample_a
from fedlora.algebra.state import Kept, State
from fedlora.core.errors import RunError
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
from strategies.fedit import FedIT
from strategies.rebase import Rebase
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


@pytest.mark.parametrize("hook", ["client_start", "plan", "personal_update"])
def test_a_method_whose_clients_differ_and_whose_variant_does_not_is_refused(hook):
    """Starts, plans and adapters are shared by variant: one that depends on the client would be
    that of the variant's first client, in silence."""

    class Secret(Mean):
        def client_start(self, state, client, kept=None):
            moved = client.id if hook == "client_start" else 0
            return {
                p: Factors(f.a + moved, f.b, f.alpha) for p, f in self.global_update(state).items()
            }

        def plan(self, state, client, base):
            return replace(base, epochs=1 + client.id) if hook == "plan" else base

        def personal_update(self, state, client, kept=None):
            moved = client.id if hook == "personal_update" else 0
            return {
                p: Factors(f.a + moved, f.b, f.alpha) for p, f in self.global_update(state).items()
            }

    def both():
        method = Secret(rank=2)
        state, _ = jobs_of(method)
        whole = {"max_ranks": SETTING.max_ranks, "seed": 0, "round": 0}
        evaluation_jobs(method, state, CLIENTS, "own", EvaluatePlan(), **whole)

    with pytest.raises(RunError, match=r"clients 0 and 1 different starts.*variant"):
        both()


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_what_is_counted_down_is_what_a_client_lacks(wire):
    """With A frozen a client draws it from the seed, as long as the server has not changed it."""
    method, plan = FedIT(), LocalPlan(train_a=False)
    state = method.init_state(SETTING)

    def down(state):
        jobs = training_jobs(method, state, CLIENTS, plan, seed=3, round=1)
        account = begin(method, state, jobs, 1, wire).account
        start = jobs[0].start["q_proj"]
        own = sample_a(3, "q_proj", *start.a.shape)
        lacking = {"b": start.b} | ({} if torch.equal(own, start.a) else {"a": start.a})
        sent = sum(t.to(getattr(torch, wire)).element_size() * t.numel() for t in lacking.values())
        assert set(account.starts.values()) == {sent}
        return sent

    whole = down(state)
    trained = {k: t + 1 if k.endswith("/b") else t for k, t in state.items()}
    assert down(trained) == whole
    moved = {k: t + 1 if k.endswith("/a") else t for k, t in state.items()}
    assert down(moved) > whole


def test_flora_sends_neither_the_factors_that_a_client_draws_nor_a_base_that_has_not_moved():
    method = Rebase()
    state = method.init_state(SETTING)
    later = dict(state) | {"round": state["round"] + 1, "sent": torch.tensor([[99]])}
    sizes = [
        set(begin(method, s, jobs_at(method, s), 1, "float32").account.starts.values())
        for s in (state, later)
    ]
    assert sizes == [{0}, {4 * 6 * 5}]


def jobs_at(method, state):
    return training_jobs(method, state, CLIENTS, LocalPlan(), seed=3, round=1)
