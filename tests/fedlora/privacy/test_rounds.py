"""Rounds of private sessions that ask no client, reach none, or end before their time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.core.errors import RunError
from fedlora.core.types import Failure, TrainJob, Update
from fedlora.population.sampling import Roster
from fedlora.privacy.client import ABORTED, ClientLevel, ClientPrivacy, StandsFor
from fedlora.run.tracking import read_jsonl
from fedlora.secagg.config import SecAgg
from fedlora.server.protection import UNPROTECTED
from fedlora.server.schedule import Rounds
from fedlora.server.session import Session
from strategies.fedit import FedIT
from tests.fedlora.privacy.rosters import roster
from tests.fedlora.server.test_virtual_time import CLIENTS, World
from tests.generators import trained

ALL = World(FedIT(weights="uniform"), per_round=CLIENTS)
OFF = Rounds(rounds=4, norm_bound="off")
FIXED = ClientLevel(epsilon=0, sigma=1.0, clip=0.4, adaptive=None)
BANDED = replace(FIXED, noise="banded", bands=2)


def session(folder: Path, spec: ClientLevel | None, kind: str, world: World = ALL) -> Session:
    people = roster(CLIENTS, world.per_round)
    privacy = ClientPrivacy(spec, people, 3, OFF.rounds, folder) if spec else UNPROTECTED
    found: Session = world.session(folder, rounds=OFF, privacy=privacy, secagg=SecAgg(kind=kind))
    found.resume()
    return found


def jobs_of(run: Session, round: int) -> list[TrainJob]:
    return [job for message in run.train_cohorts(round) for job in message]


def work(run: Session, round: int) -> None:
    updates = [
        Update(j.client, trained(j.start, 100 * round + j.client.id, 0.1), j.client.num_examples)
        for j in jobs_of(run, round)
    ]
    run.finish_training(updates, run.state)


def unreached(run: Session, round: int) -> None:
    """Every client is away."""
    away = [Failure(j.client, "Unavailable", "its device is off") for j in jobs_of(run, round)]
    run.finish_training(away, run.state)


@pytest.mark.parametrize("kind", ["none", "simulated", "real"])
@pytest.mark.parametrize("spec", [None, FIXED], ids=["plain", "private"])
def test_a_round_that_reaches_no_client_ends_the_run_and_counts(
    tmp_path: Path, kind: str, spec: ClientLevel | None
) -> None:
    """In one sentence, whose reason is the first client's; a real sum is not even begun."""
    run = session(tmp_path, spec, kind)
    before = dict(run.state)
    with pytest.raises(RunError, match=rf"only 0 of {CLIENTS} .*Unavailable: its device is off"):
        unreached(run, 1)
    assert run.done == 0
    assert run.state.keys() == before.keys()
    rows = read_jsonl(tmp_path / "clients.jsonl")
    assert len(rows) == CLIENTS
    assert all(r["failure"] == "Unavailable" for r in rows)
    noted = tmp_path / ABORTED
    assert noted.is_file() == (spec is not None)
    if spec is not None:
        assert json.loads(noted.read_text()) == {"rounds": 1}
        assert isinstance(run.privacy, ClientPrivacy)
        assert run.privacy.record(1)["privacy/epsilon"] == run.privacy.epsilon(2)


def test_a_round_that_asks_nobody_releases_noise_alone_in_a_secure_sum_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(FIXED, stands_for=StandsFor(cohort=5000, population=1_000_000))
    hashes = []

    def nobody(roster: Roster, seed: int, round: int) -> list[object]:
        return []

    for kind in ("none", "simulated", "real"):
        run = session(tmp_path / kind, spec, kind, replace(ALL, per_round=4))
        first = dict(run.state)
        monkeypatch.setattr(run.privacy, "cohort", nobody)
        work(run, 1)
        assert any(not bool((t == first[n]).all()) for n, t in run.state.items())
        (record,) = read_jsonl(run.folder / "metrics.jsonl")
        assert record["clients"] == 0
        assert record.get("secagg/clients", 0) == 0
        hashes.append(record["state/hash"])
    assert len(set(hashes)) == 1


@pytest.mark.parametrize("kind", ["none", "simulated"])
@pytest.mark.parametrize("aborted", [2, 3])
def test_banded_noise_goes_on_after_a_round_that_was_aborted(
    tmp_path: Path, kind: str, aborted: int
) -> None:
    """The round is done again with the noise that it would have had, so that it still cancels; and
    it counts for every client, whatever its group."""
    world, spec = ALL, replace(BANDED, stands_for=StandsFor(cohort=40, population=80))
    whole = session(tmp_path / "whole", spec, kind, world)
    for round in range(1, 5):
        work(whole, round)
    cut = session(tmp_path / "cut", spec, kind, world)
    for round in range(1, aborted):
        work(cut, round)
    with pytest.raises(RunError, match="only 0 of"):
        unreached(cut, aborted)
    again = session(tmp_path / "cut", spec, kind, world)
    assert again.done == aborted - 1
    for round in range(aborted, 5):
        work(again, round)
    records = [
        {r["round"]: r for r in read_jsonl(run.folder / "metrics.jsonl")} for run in (whole, again)
    ]
    releases, delta = whole.privacy.releases, spec.delta  # type: ignore[attr-defined]
    for round in range(aborted, 5):
        assert records[0][round]["state/hash"] == records[1][round]["state/hash"]
        events = -(-round // 2)
        assert records[0][round]["privacy/epsilon"] == releases.epsilon(events, delta)
        assert records[1][round]["privacy/epsilon"] == releases.epsilon(events + 1, delta)
