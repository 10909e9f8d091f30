"""What clients keep: in no message, in every checkpoint, and the same bits after any kill."""

import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.algebra.state import Kept, State
from fedlora.core.errors import CheckpointError
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
from fedlora.population.sampling import Roster
from fedlora.run import checkpoint
from fedlora.run.tracking import Trackers
from fedlora.server.client_state import ClientStore
from fedlora.server.schedule import EvaluationSchedule, Rounds
from fedlora.server.session import Session
from fedlora.techniques.lora.payload import LowRankPayload
from tests.fakes import Mean
from tests.fedlora.population.test_workload import Held

MODULES = (Module("q_proj", "attention", 6, 5),)
CLIENTS = tuple(Client(i, Ranks({"q_proj": 2}), 10) for i in range(5))
IDS = tuple(range(5))
BAD = 3
"""A client whose updates are rejected from round 2 on."""


@dataclass(frozen=True, eq=False)
class OwnB(Mean):
    """Clients keep their B, start from it, and count the rounds in which they took part."""

    rank: int = 2

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Payload:
        common = self.global_update(state)
        if kept is None:
            return common
        return {p: Factors(f.a, kept[f"{p}/b"], f.alpha) for p, f in common.items()}

    def kept(
        self, state: State, client: Client, before: Kept | None, start: Payload, update: Update
    ) -> Kept:
        times = torch.ones(()) if before is None else before["times"] + 1
        return {"times": times} | {f"{p}/b": f.b for p, f in update.adapter.items()}

    def personal_update(self, state: State, client: Client, kept: Kept | None = None) -> Payload:
        return self.client_start(state, client, kept)


def session(folder: Path, method: Mean, rounds: int = 4, keep: int = 2) -> Session:
    return Session(
        method=method,
        setting=Setting(MODULES, 1000, 12.0, CLIENTS, 3),
        roster=Roster(CLIENTS, IDS, {"seen": IDS}, 3, tuple(Held(4, 20) for _ in IDS), 3),
        plan=LocalPlan(),
        schedule=EvaluationSchedule(
            groups=("seen",), adapters=("own",), clients=0, plan=EvaluatePlan()
        ),
        rounds=Rounds(rounds=rounds, min_success=0.1, keep=keep),
        workers=1,
        folder=folder,
        tracker=Trackers(()),
        emit=lambda line: None,
    )


def trained(run: Session, round: int) -> dict[str, object]:
    """One round in which a client's factors move by what client and round decide."""
    jobs = [j for message in run.train_cohorts(round) for j in message]
    results: list[Update | Failure] = []
    for j in jobs:
        by = torch.nan if j.client.id == BAD and round > 1 else 0.1 * (j.client.id + 1) / round
        moved = {p: Factors(f.a + by, f.b * 0.9 + by, f.alpha) for p, f in j.start.items()}
        results.append(Update(j.client, LowRankPayload(moved), 10, {"loss": 1.0, "tokens": 1.0}))
    return run.finish_training(results, run.state)


def to_the_end(run: Session) -> Session:
    for round in range(run.done + 1, run.rounds.rounds + 1):
        trained(run, round)
    return run


def everything(run: Session) -> dict[str, torch.Tensor]:
    held = {i: run.client_store.get(i) for i in IDS}
    kept = {f"{i}/{n}": t for i, k in held.items() for n, t in (k or {}).items()}
    return dict(run.state) | kept


def assert_same(a: Session, b: Session) -> None:
    one, two = everything(a), everything(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(t, two[n]) for n, t in one.items())
    assert a.client_store.index() == b.client_store.index()


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.safetensors"))


def needed(folder: Path) -> list[str]:
    """Files of clients to which a checkpoint of a run folder refers."""
    found = set()
    for round in checkpoint.saved_rounds(folder / "checkpoints"):
        index = checkpoint.load(folder / "checkpoints" / f"round_{round:05d}").extra["client_state"]
        found |= {f"method/{int(i):06d}/{v[0]:05d}.safetensors" for i, v in index["method"].items()}
    return sorted(found)


# --- a session ------------------------------------------------------------------------------------


def test_a_client_starts_from_what_it_kept_and_others_do_not(tmp_path):
    run = session(tmp_path, OwnB())
    assert all(run.client_store.get(i) is None for i in IDS)
    trained(run, 1)
    jobs = {j.client.id: j for message in run.train_cohorts(2) for j in message}
    for i, job in jobs.items():
        kept = run.client_store.get(i)
        expected = run.method.global_update(run.state)["q_proj"].b if not kept else kept["q_proj/b"]
        assert torch.equal(job.start["q_proj"].b, expected)
    own = {j.client.id: j.adapter for _, m in run.evaluate_cohorts(1) for j in m}
    for i in IDS:
        kept = run.client_store.get(i)
        if kept:
            assert torch.equal(own[i]["q_proj"].b, kept["q_proj/b"])


def test_a_rejected_or_failed_client_keeps_what_it_had(tmp_path):
    run = session(tmp_path, OwnB(), rounds=12)
    for round in range(1, 13):
        before = run.client_store.get(BAD)
        current = {j.client.id for message in run.train_cohorts(round) for j in message}
        trained(run, round)
        after = run.client_store.get(BAD)
        if BAD not in current or round > 1:
            assert (before is None and after is None) or torch.equal(
                before["times"], after["times"]
            )


def test_records_name_the_size_and_traffic_does_not_change(tmp_path):
    keeping, plain = session(tmp_path / "a", OwnB()), session(tmp_path / "b", Mean(rank=2))
    mine, other = trained(keeping, 1), trained(plain, 1)
    assert mine["client_state/clients"] == 3
    assert mine["client_state/bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "a/client_state").rglob("*.safetensors")
    )
    assert "client_state/bytes" not in other
    assert not (tmp_path / "b/client_state").exists()
    for key in ("wire/up_bytes", "wire/down_bytes"):
        assert mine[key] == other[key]


@pytest.mark.parametrize("keep", [1, 3])
def test_every_kept_checkpoint_finds_what_clients_kept_then(tmp_path, keep):
    """And nothing else stays on the disk."""
    run, states = session(tmp_path, OwnB(), rounds=8, keep=keep), {}
    for round in range(1, 9):
        trained(run, round)
        states[round] = everything(run), run.client_store.index()
    assert len(checkpoint.saved_rounds(tmp_path / "checkpoints")) == keep
    for round in checkpoint.saved_rounds(tmp_path / "checkpoints"):
        found = checkpoint.load(tmp_path / "checkpoints" / f"round_{round:05d}")
        assert found.extra["client_state"] == states[round][1]
    assert files(tmp_path / "client_state") == needed(tmp_path)
    for round in reversed(checkpoint.saved_rounds(tmp_path / "checkpoints")):
        again = session(tmp_path, OwnB(), rounds=8, keep=keep)
        assert again.resume() == round
        assert all(torch.equal(t, states[round][0][n]) for n, t in everything(again).items())
        shutil.rmtree(tmp_path / "checkpoints" / f"round_{round:05d}")


def test_a_run_without_a_checkpoint_begins_with_nothing(tmp_path):
    """Killed in round 1, after clients' files and before the checkpoint."""
    trained(session(tmp_path, OwnB()), 1)
    shutil.rmtree(tmp_path / "checkpoints")
    again = session(tmp_path, OwnB())
    assert again.resume() == 0
    assert not files(tmp_path / "client_state")
    assert_same(to_the_end(again), to_the_end(session(tmp_path / "whole", OwnB())))


def killed_at(n: int, folder: Path) -> bool:
    """Run in a child process that is killed at its n-th step on the disk; whether it was."""
    child = os.fork()
    if child == 0:
        steps = iter(range(n))

        def deadly(call):
            def step(*args, **kwargs):
                if next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return step

        steps_of = ("rename", "replace", "open", "unlink")
        for owner, name in ((os, "fsync"), (shutil, "rmtree"), *((Path, s) for s in steps_of)):
            setattr(owner, name, deadly(getattr(owner, name)))
        to_the_end(session(folder, OwnB(), rounds=3, keep=1))
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_step_resumes_to_the_same_bits(tmp_path):
    whole = to_the_end(session(tmp_path / "whole", OwnB(), rounds=3, keep=1))
    for n in range(400):
        folder = tmp_path / str(n)
        killed = killed_at(n, folder)
        again = session(folder, OwnB(), rounds=3, keep=1)
        again.resume()
        assert_same(to_the_end(again), whole)
        assert files(folder / "client_state") == needed(folder)
        shutil.rmtree(folder)
        if not killed:
            assert n > 40
            return
    pytest.fail("the child was never left alone")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_with_its_client(tmp_path, damage):
    trained(session(tmp_path, OwnB()), 1)
    file = sorted((tmp_path / "client_state").rglob("*.safetensors"))[0]
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    content: bytes = {"flip": bytes(blob), "cut": bytes(blob[:9]), "remove": b""}[damage]
    file.write_bytes(content)
    if damage == "remove":
        file.unlink()
    again = session(tmp_path, OwnB())
    again.resume()
    client = int(file.parent.name)
    what = "cannot read" if damage == "remove" else "is damaged"
    with pytest.raises(CheckpointError, match=what) as error:
        again.client_store.get(client)
    assert str(file) in str(error.value)
    assert f"what client {client} kept in round 1 cannot be recovered" in str(error.value)


# --- the store ------------------------------------------------------------------------------------


def tensors(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(3, 2, generator=g), "n": torch.tensor(seed), "e": torch.zeros(0)}


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.sampled_from([0, 1, 7]), unique=True, max_size=3), max_size=8),
    st.sampled_from([0, 40, 10**6]),
)
def test_the_cache_changes_nothing(tmp_path_factory, rounds: Sequence[Sequence[int]], cached: int):
    """Whatever is in memory, a client has what it was last given, by namespace."""
    folder = tmp_path_factory.mktemp("store")
    store, expected = ClientStore(folder, cached), {}
    for round, clients in enumerate(rounds, 1):
        for client in clients:
            for namespace, more in (("method", 0), ("wire", 100)):
                kept = tensors(10 * round + client + more)
                store.stage(client, kept, namespace)
                expected[namespace, client] = kept
        store.commit(round)
        store.prune(round - 1)
    other = ClientStore(folder)
    other.restore(len(rounds), store.index())
    for found in (store, other):
        for namespace in ("method", "wire"):
            for client in (0, 1, 7):
                kept = expected.get((namespace, client))
                got = found.get(client, namespace)
                assert (kept is None) == (got is None)
                assert not kept or all(torch.equal(got[k], kept[k]) for k in kept)


def test_what_is_staged_is_seen_after_the_round(tmp_path):
    store = ClientStore(tmp_path)
    store.stage(1, tensors(1))
    assert store.get(1) is None
    store.commit(1)
    assert torch.equal(store.get(1)["x"], tensors(1)["x"])
    store.stage(1, tensors(2))
    store.restore(1, store.index())
    store.commit(2)
    assert torch.equal(store.get(1)["x"], tensors(1)["x"])


def test_what_is_forgotten_is_gone_and_an_older_checkpoint_still_has_it(tmp_path) -> None:
    store = ClientStore(tmp_path)
    assert store.round(1) == 0
    store.stage(1, {"b": torch.ones(2)})
    store.commit(1)
    before = store.index()
    store.stage(1, None)
    assert store.get(1) is not None, "staged, not yet committed"
    store.commit(2)
    assert store.get(1) is None
    assert store.round(1) == 0
    assert store.index() == {}
    store.restore(1, before)
    assert store.round(1) == 1
    kept = store.get(1)
    assert kept is not None
    assert torch.equal(kept["b"], torch.ones(2))
