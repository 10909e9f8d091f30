"""Rounds with secure sums: real equals simulated, whoever is lost; what the server is sent."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message

from fedlora.algebra.summand import dense, total
from fedlora.core.errors import RunError
from fedlora.core.types import LocalPlan
from fedlora.run.tracking import read_jsonl
from fedlora.secagg.config import STAGES, SecAgg
from fedlora.secagg.masks import opened
from fedlora.server import secure_round
from fedlora.server.combine import combine
from fedlora.server.method import Method
from fedlora.server.postprocess import Bound, Moment
from fedlora.server.secure_sum import SumPlan, Tally, simulate
from fedlora.server.training_round import begin, training_jobs
from strategies.alternate import Alternate
from strategies.base import LoRAStrategy
from strategies.fedit import FedIT
from strategies.fedsb import FedSB
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.rebase import Rebase
from strategies.spp import SPP
from tests.generators import dense as dense_update
from tests.hostile.world import World, failed, moved
from tests.planted import planted
from tests.strategies.laws import population_for

METHODS: Mapping[str, LoRAStrategy] = {
    "fedit": FedIT(),
    "ffa": Alternate(),
    "rolora": Alternate(schedule="ba"),
    "heterolora": HeteroLoRA(average="change", weights="examples", prune=False),
    "flexlora": FlexLoRA(residual="carry"),
    "flora": Rebase(),
    "fedsb": FedSB(),
    "spp": SPP(),
}
SKETCHED = ("flexlora", "flora")
OFF = {"norm_bound": "off"}
RANGE = 4.0


@dataclass
class Recorded(World):
    """Keeps every message and reply of secure sums."""

    messages: list[tuple[Message, Message]] = field(default_factory=list)

    def answer_stage(self, message: Message, context: Context) -> Message:
        reply = super().answer_stage(message, context)
        self.messages.append((message, reply))
        return reply


def play(folder: Path, name: str, kind: str, rounds: int = 2, **given: object) -> Recorded:
    """A run with secure sums."""
    config = {"range": RANGE, **given}
    attack = config.pop("attack", None)
    post = config.pop("postprocess", ())
    least = {"min_success": config.pop("min_success")} if "min_success" in config else {}
    world = Recorded(
        METHODS[name],
        folder / f"{name}-{kind}",
        options={**OFF, **least},
        secagg=SecAgg(kind=kind, **config),
        postprocess=post,
        **({"attack": attack} if attack else {}),
    )
    world.play(rounds)
    return world


def same(folder: Path, name: str, **given: object) -> tuple[Recorded, Recorded]:
    """A real run and its simulation, which end in the same state."""
    real, simulated = (play(folder, name, kind, **given) for kind in ("real", "simulated"))
    assert real.hashes == simulated.hashes
    for record in ("clients.jsonl", "metrics.jsonl"):
        one, other = (costs(w.folder / record) for w in (real, simulated))
        assert one == other, f"{record} tells them apart"
    return real, simulated


def costs(file: Path) -> list[dict[str, object]]:
    """The bytes and counts of a record."""
    return [
        {
            k: v
            for k, v in row.items()
            if "bytes" in k or (k.startswith("secagg/") and "seconds" not in k)
        }
        for row in read_jsonl(file)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_real_equals_simulated(tmp_path, name):
    same(tmp_path, name, rounds=3 if name == "rolora" else 2)


@pytest.mark.parametrize("sketch", ["one", "two"])
@pytest.mark.parametrize("name", SKETCHED)
def test_real_equals_simulated_with_sketches(tmp_path, name, sketch):
    real, _ = same(tmp_path, name, sketch=sketch, rounds=1)
    plain = play(tmp_path / "dense", name, "simulated", rounds=1)
    assert real.hashes != plain.hashes


LOSSES = {"keys": 0.065, "shares": 0.25, "vector": 0.1, "unmask": 0.4}
"""Fractions for which two of six clients are lost in that stage of round 1."""


@pytest.mark.parametrize("stage", STAGES)
def test_real_equals_simulated_with_two_clients_lost(tmp_path, stage):
    real, _ = same(tmp_path, "fedit", losses={stage: LOSSES[stage]}, rounds=1)
    (record,) = read_jsonl(real.folder / "metrics.jsonl")
    assert record["secagg/lost"] == (0 if stage == "unmask" else 2)
    assert record["secagg/clients"] == record["clients"] == 6 - record["secagg/lost"]
    assert sum("failure" in row for row in real.rows(1).values()) == record["secagg/lost"]


def test_nobody_may_be_lost_between_the_sums_of_a_sketch(tmp_path):
    """Planted: with both sums the server has ``w B A Ω`` of a client that is in the first alone."""
    for kind in ("real", "simulated"):
        with pytest.raises(RunError, match=r"client \d+ was lost between the two sums"):
            play(tmp_path / kind, "flexlora", kind, sketch="two", losses={"shares": 0.16}, rounds=1)


def test_a_round_that_will_be_repeated_tells_no_sum(tmp_path, monkeypatch):
    """Of the same clients' same codes: the difference of two sums is what one of them sent."""
    told = []
    monkeypatch.setattr(secure_round, "unmasked", lambda *a, **k: told.append(a))
    for kind in ("real", "simulated"):
        with pytest.raises(RunError, match=r"4 of 6 clients .* federation.min_success .* need 5"):
            play(tmp_path / kind, "fedit", kind, losses={"vector": 0.1}, rounds=1, min_success=0.8)
    assert not told


def test_a_client_that_cannot_train_is_not_in_the_sum(tmp_path):
    real, _ = same(tmp_path, "fedit", attack=lambda _: (failed, None), rounds=1)
    (row,) = [r for r in real.rows(1).values() if "failure" in r]
    assert row["failure"] == "PlantedFault"
    assert len(real.rows(1)) == 6


def test_too_many_lost_end_the_run_in_one_sentence(tmp_path):
    for kind in ("real", "simulated"):
        why = r"needs 4 of 6 clients, and \d are left after stage vector .*No round was complete"
        with pytest.raises(RunError, match=why):
            play(tmp_path, "fedit", kind, losses={"vector": 0.8})


def test_clients_bound_their_own_changes(tmp_path):
    post = (Bound(0.01),)
    bounded, _ = same(tmp_path, "fedit", postprocess=post, rounds=1)
    assert bounded.hashes != play(tmp_path / "free", "fedit", "simulated", rounds=1).hashes


def test_sixteen_bits_and_a_sparse_graph(tmp_path):
    same(tmp_path, "fedit", bits=16, levels=12, degree=4, rounds=1)


# --- the sum ------------------------------------------------------------------------------------


def a_plan(method: Method, **given: object) -> tuple[SumPlan, list]:
    """The plan of a first round, and its updates."""
    population = population_for(method)
    state = method.init_state(population)
    jobs = training_jobs(method, state, population.clients, LocalPlan(steps=3), seed=0, round=1)
    account = begin(method, state, jobs, 1, "float32").account
    config = SecAgg(kind="simulated", **{"range": RANGE, **given})
    plan = SumPlan.open(config, method, state, jobs, (), population.max_ranks, account.starts, "")
    return plan, [moved(j) for j in jobs]


@pytest.mark.parametrize("name", [n for n in METHODS if n != "spp"])
def test_the_sum_is_that_of_the_summands(name):
    """To the rounding of fixed-point numbers."""
    plan, updates = a_plan(METHODS[name])
    got = simulate(plan, updates)
    terms = [plan.method.adds(plan.state, plan.jobs[u.client.id].start, u) for u in updates]
    want = total(terms, [plan.weights[u.client.id] for u in updates])
    step = 2 * RANGE / (2**22 - 1)
    for key, x in want.items():
        error = (dense(got.total[key]).double() - dense(x).double()).abs().max()
        assert float(error) <= len(updates) * step + 1e-5, key
    assert len(got.weights) == len(updates)
    assert not got.cut


@pytest.mark.parametrize("name", [n for n in METHODS if n != "spp"])
def test_the_state_is_that_of_the_plain_sum(name):
    plan, updates = a_plan(METHODS[name])
    method, found = plan.method, simulate(plan, updates)
    one = method.absorb(plan.state, found.total, found.weight)
    starts = {i: j.start for i, j in plan.jobs.items()}
    other = combine(method, plan.state, updates, Moment(0, 1), starts=starts).state
    near, far = (dense_update(method.global_update(s)) for s in (one, other))
    for path, d in far.items():
        assert float((near[path] - d).abs().max()) < 1e-4, path


# --- what the server is sent --------------------------------------------------------------------


def test_bytes_counted_are_bytes_sent(tmp_path):
    """Of each stage, without headers and jobs."""
    losses = {"shares": 0.15, "vector": 0.0505}
    world = play(tmp_path, "fedit", "real", rounds=1, losses=losses)
    up, down = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0)
    for message, reply in world.messages:
        stage = json.loads(str(message.content.config_records["secagg"]["header"]))["stage"]
        sent = message.content.array_records["blocks"]
        down[stage] += sum(a.numpy().nbytes for n, a in sent.items() if "/" in n)
        up[stage] += sum(a.numpy().nbytes for a in reply.content.array_records["blocks"].values())
    (record,) = read_jsonl(world.folder / "metrics.jsonl")
    rows = read_jsonl(world.folder / "clients.jsonl")
    assert sum(r["bytes_up"] for r in rows) == sum(record[f"secagg/{s}_up_bytes"] for s in STAGES)
    # a client that is lost on purpose has answered: the server only takes no notice
    assert record["secagg/keys_up_bytes"] == up["keys"]
    assert record["secagg/unmask_up_bytes"] == up["unmask"]
    assert record["secagg/unmask_down_bytes"] == down["unmask"]
    assert record["secagg/shares_down_bytes"] == down["shares"]
    assert record["secagg/shares_up_bytes"] <= up["shares"]
    assert record["secagg/vector_up_bytes"] <= up["vector"]


def test_the_server_never_holds_both_secrets_of_a_client(tmp_path):
    """In all messages: of each owner, shares of one kind; sealed ones cannot be opened without the
    holders' keys."""
    world = play(tmp_path, "fedit", "real", rounds=1, losses={"vector": 0.1})
    kinds: dict[int, set[str]] = {}
    boxes = 0
    for message, reply in world.messages:
        header = json.loads(str(message.content.config_records["secagg"]["header"]))
        if header["stage"] == "unmask":
            for i, own in header["clients"].items():
                ids = message.content.array_records["blocks"][f"{i}/ids"].numpy().tolist()
                for n, j in enumerate(ids):
                    kinds.setdefault(j, set()).add("seed" if n < own["survivors"] else "key")
        if header["stage"] == "shares":
            for block in reply.content.array_records["blocks"].values():
                for row in block.numpy():
                    boxes += 1
                    with pytest.raises(ValueError, match="sealed"):
                        opened(bytes(32), row.tobytes(), b"")
    assert len(kinds) == 6
    assert all(len(k) == 1 for k in kinds.values())
    assert boxes == 30


def test_no_update_is_in_a_reply(tmp_path):
    """A vector is no client's codes: all bits of it look random."""
    world = play(tmp_path, "fedit", "real", rounds=1)
    vectors = [
        block.numpy()
        for _, reply in world.messages
        for block in reply.content.array_records["blocks"].values()
        if block.numpy().dtype == np.uint32
    ]
    assert len(vectors) == 6
    for vector in vectors:
        high = (vector >> 30).astype(int)
        assert set(np.unique(high)) == {0, 1, 2, 3}, "codes of 22 levels have no high bits"


def test_a_sum_counts_those_in_it_not_those_asked():
    """Planted: K instead of K' in the offset is a large error that the plain sum shows."""
    plan, updates = a_plan(METHODS["fedit"], losses={"vector": 0.38})
    got = simulate(plan, updates)
    inside = [u for u in updates if u.client.id not in got.lost]
    assert len(inside) == 4
    wrong = Tally.add, "len(stages.vector)", "len(stages.asked)"
    with planted(*wrong):
        other = simulate(plan, updates)
    terms = [plan.method.adds(plan.state, plan.jobs[u.client.id].start, u) for u in inside]
    want = total(terms, [plan.weights[u.client.id] for u in inside])
    for key, x in want.items():
        assert float((dense(got.total[key]) - dense(x)).abs().max()) < 1e-4
        assert float((dense(other.total[key]) - dense(x)).abs().max()) > RANGE
