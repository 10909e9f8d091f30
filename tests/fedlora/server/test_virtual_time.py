"""A run on devices: without their effect it is today's run, bit for bit; with it, all adds up."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from fedlora.algebra.summand import scaled
from fedlora.core.types import Client, LocalPlan, Module, Ranks, Setting, Update
from fedlora.devices.trace import windows
from fedlora.population.sampling import Roster
from fedlora.robust.bound import Bound
from fedlora.robust.coordinate import Median, Trimmed
from fedlora.robust.geometric import Geometric
from fedlora.robust.krum import Krum, MultiKrum
from fedlora.robust.rule import Term
from fedlora.run.checkpoint import state_hash
from fedlora.run.tracking import JsonlTracker, read_jsonl
from fedlora.server.buffered import Buffered, BufferedTime, check_averages
from fedlora.server.ownership import owned_elements
from fedlora.server.postprocess import Postprocessor
from fedlora.server.schedule import EvaluationSchedule, Rounds
from fedlora.server.session import Session
from fedlora.server.virtual_time import VirtualTime
from strategies.alternate import Alternate
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from tests.fedlora.devices.worlds import Plain, fleet, sevens, trace
from tests.fedlora.population.test_workload import Held
from tests.generators import trained

MODULES = (Module("q_proj", "attention", 6, 5), Module("up_proj", "mlp", 7, 4))
CLIENTS = 12
PER_ROUND = 4


@dataclass(frozen=True)
class World:
    """A population of unequal ranks, and a method."""

    method: object = FlexLoRA(residual="carry")
    rounds: int = 4
    per_round: int = PER_ROUND

    def session(self, folder, virtual=None, **given) -> Session:
        clients = tuple(
            Client(i, Ranks({m.path: 1 + i % 3 for m in MODULES}), 5 + i, f"r{1 + i % 3}")
            for i in range(CLIENTS)
        )
        ids = tuple(range(CLIENTS))
        held = tuple(Held(5 + i, 50) for i in ids)
        return Session(
            method=self.method,
            setting=Setting(MODULES, 1000, 12.0, clients, 3),
            roster=Roster(clients, ids, {"seen": ids}, self.per_round, held, 3),
            plan=LocalPlan(batch_size=2),
            schedule=EvaluationSchedule(every=0),
            rounds=given.pop("rounds", Rounds(rounds=self.rounds)),
            workers=given.pop("workers", 2),
            folder=folder,
            tracker=JsonlTracker(folder),
            virtual=virtual,
            emit=lambda line: None,
            **given,
        )

    def run(self, folder, virtual=None, until=None, **given):
        """Train; the session and its records."""
        session = self.session(folder, virtual, **given)
        session.resume()
        records = []
        for round in range(session.done + 1, (until or self.rounds) + 1):
            jobs = [job for message in session.train_cohorts(round) for job in message]
            updates = [
                Update(
                    job.client,
                    trained(job.start, 100 * round + job.client.id, 0.1),
                    job.client.num_examples,
                    {"loss": 1.0, "tokens": 7.0},
                )
                for job in jobs
            ]
            records.append(session.finish_training(updates, session.state))
        session.tracker.close()
        return session, records


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def clock(over=1.0, deadline=math.inf, devices=None) -> VirtualTime:
    lengths = lambda job: sevens(3 + job.client.id)
    return VirtualTime(devices or fleet(CLIENTS), Plain(), lengths, over, deadline)


def buffered(size=PER_ROUND, concurrency=PER_ROUND, devices=None, deadline=math.inf, **rule):
    lengths = lambda job: sevens(3 + (7 * job.client.id + job.round) % 11)
    given = (devices or fleet(CLIENTS), Plain(), lengths, 1.0, deadline)
    return BufferedTime(*given, Buffered(size, concurrency, **rule))


def windowed(server=0.0):
    """Devices that are available by turns."""
    spans = [windows(400.0, [(10.0 * i, 10.0 * i + 180.0)]) for i in range(CLIENTS)]
    return fleet(CLIENTS, trace(*spans), server)


def check_no_effect(tmp_path) -> None:
    """Law: devices without deadline, over-selection or absence change no bit."""
    plain, _ = World().run(tmp_path / "plain")
    timed, records = World().run(tmp_path / "timed", clock())
    assert state_hash(timed.state) == state_hash(plain.state)
    assert [r["device/late"] + r["device/away"] for r in records] == [0] * 4
    clocks = [r["time/virtual"] for r in records]
    assert clocks == sorted(clocks)


def test_devices_without_effect_change_no_bit(tmp_path):
    check_no_effect(tmp_path)


def check_late(tmp_path) -> None:
    """Law: late and absent clients are not trained, and the sums of a record are those of its
    rows, theirs included."""
    session, records = World().run(tmp_path, clock(1.5, 60.0, windowed(2.0)))
    rows = read_jsonl(tmp_path / "clients.jsonl")
    assert any(r["device/late"] for r in records)
    assert any(r["device/away"] for r in records)
    for record in records:
        mine = [r for r in rows if r["round"] == record["round"]]
        lost = [r for r in mine if "failure" in r]
        assert len(mine) - len(lost) == record["clients"]
        assert len(lost) == record["device/late"] + record["device/away"]
        assert record["failed"] == 0
        assert {r["failure"] for r in lost} <= {"Late", "WentAway"}
        assert all("virtual time" in r["message"] for r in lost)
        for way in ("up", "down"):
            assert record[f"wire/{way}_bytes"] == sum(r[f"bytes_{way}"] for r in mine)
        spent = 3.0 * record["time/compute"] + 2.0 * record["time/transfer"]
        assert record["device/energy"] == pytest.approx(spent)
    assert session.virtual.now == records[-1]["time/virtual"]


def test_late_clients_are_not_trained_and_are_charged_and_listed(tmp_path):
    check_late(tmp_path)


def check_charges(tmp_path) -> None:
    """Law: a round takes the time of its last client and of the server."""
    _, (first, *_) = World().run(tmp_path, clock(devices=fleet(CLIENTS, server=2.0)), until=1)
    rows = read_jsonl(tmp_path / "clients.jsonl")
    assert first["time/virtual"] == max(r["device_seconds"] for r in rows) + 2.0
    total = first["time/compute"] + first["time/transfer"]
    assert total == pytest.approx(sum(r["device_seconds"] for r in rows))
    for r in rows:
        ticks = r["bytes_down"] + r["bytes_up"]
        n, rank = 3 + r["client"], int(r["rank"])
        assert r["device_seconds"] * 8 == ticks + 7 * n * (rank + 3.5)


def test_a_round_takes_the_time_of_its_last_client(tmp_path):
    check_charges(tmp_path)


def test_a_round_in_which_nobody_can_finish_leaves_the_model_and_takes_its_time(tmp_path):
    session, records = World().run(tmp_path, clock(deadline=1.0))
    assert state_hash(session.state) == state_hash(session.method.init_state(session.setting))
    assert [r["time/virtual"] for r in records] == [1.0, 2.0, 3.0, 4.0]
    assert all(r["clients"] == 0 and "train/loss" not in r for r in records)


def test_if_nobody_is_available_the_clock_jumps_to_the_next_opening(tmp_path):
    never = windows(1000.0, [(500.0, 990.0)])
    late = clock(devices=fleet(CLIENTS, trace(*(never,) * CLIENTS)))
    _, records = World().run(tmp_path, late, until=1)
    assert 500.0 < records[0]["time/virtual"] < 990.0


def test_workers_and_packing_change_neither_order_nor_clock(tmp_path):
    found = []
    for i, (workers, size) in enumerate([(1, 0), (3, 1), (2, 2)]):
        rounds = Rounds(rounds=4, clients_per_message=size)
        run, records = World().run(
            tmp_path / str(i), buffered(2, 5, windowed(1.0)), workers=workers, rounds=rounds
        )
        found.append((state_hash(run.state), [r["time/virtual"] for r in records]))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("make", [lambda: clock(1.5, 60.0, windowed(2.0)),
                                  lambda: buffered(2, 5, windowed(1.0))])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, make):
    check_resume(tmp_path, make)


def check_resume(tmp_path, make, **given) -> None:
    """Law: a run cut in two has the state and the clock of the whole one."""
    whole, records = World().run(tmp_path / "whole", make(), **given)
    World().run(tmp_path / "cut", make(), until=2, **given)
    resumed, rest = World().run(tmp_path / "cut", make(), **given)
    assert state_hash(resumed.state) == state_hash(whole.state)
    assert [r["time/virtual"] for r in rest] == [r["time/virtual"] for r in records[2:]]
    assert [r["state/hash"] for r in rest] == [r["state/hash"] for r in records[2:]]


# --- buffered -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FlexLoRA(residual="carry"), FedIT()])
@pytest.mark.parametrize("rule", [{}, {"staleness": 0.0}, {"normalise": "staleness"}])
def test_a_buffer_of_all_clients_at_work_is_a_synchronous_run(tmp_path, method, rule):
    check_synchronous(tmp_path, method, rule)


def check_synchronous(tmp_path, method, rule) -> None:
    """Law: ``K = M`` = the cohort: bit for bit the run that sums changes."""
    summed, _ = World(method).run(tmp_path / "sync", postprocess=(Postprocessor(),))
    found, records = World(method).run(tmp_path / "buffered", buffered(**rule))
    assert state_hash(found.state) == state_hash(summed.state)
    assert [r["staleness/max"] for r in records] == [0] * 4


RULES = (
    Bound(),
    Median(),
    Trimmed(),
    Krum(attackers=0.1),
    MultiKrum(attackers=0.1),
    Geometric(),
)


@pytest.mark.parametrize(
    "method", [FlexLoRA(residual="carry"), FedIT()], ids=["product", "factors"]
)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_a_robust_rule_over_a_buffer_is_the_rule_over_those_clients(tmp_path, method, rule):
    """Law: if nobody is stale, bit for bit the synchronous round with that rule."""
    world = World(method, rounds=2, per_round=6)
    summed, _ = world.run(tmp_path / "sync", robust=rule)
    found, records = world.run(tmp_path / "buffered", buffered(6, 6), robust=rule)
    assert state_hash(found.state) == state_hash(summed.state)
    assert [r["staleness/max"] for r in records] == [0, 0]
    plain, _ = world.run(tmp_path / "plain", buffered(6, 6))
    assert state_hash(found.state) != state_hash(plain.state)


def test_a_robust_rule_over_stale_changes_sees_each_by_its_age(tmp_path):
    """Law: a client that waits in the buffer counts as its change times its discount, with what
    its ranks can move; and a run cut in two goes on with both."""
    rule, kept, stale = Median(), {}, False
    one = buffered(3, 6, windowed(1.0))
    session = World(FedIT(), rounds=5).session(tmp_path / "byhand", one, robust=rule)
    for round in range(1, 6):
        before, method = session.state, session.method
        jobs = [job for message in session.train_cohorts(round) for job in message]
        updates = [
            Update(j.client, trained(j.start, round, 0.1), j.client.num_examples) for j in jobs
        ]
        starts = {j.client.id: j.start for j in jobs}
        for u, own in zip(updates, owned_elements(method, before, updates, starts), strict=True):
            kept[u.client.id] = round - 1, method.adds(before, starts[u.client.id], u), own
        arrived = sorted(f.client for f in one._next.arrived)
        session.finish_training(updates, session.state)
        terms = []
        for i in arrived:
            born, x, own = kept.pop(i)
            stale |= born < round - 1
            terms.append(Term(scaled(x, (round - born) ** -0.5), 1, own))
        want = method.absorb(before, rule.centre(terms).value, 1.0)
        for name, t in want.items():
            torch.testing.assert_close(session.state[name], t, rtol=1e-12, atol=1e-12)
    assert stale, "the schedule makes no change wait"
    check_resume(tmp_path, lambda: buffered(3, 6, windowed(1.0)), robust=rule)


def check_weights(tmp_path) -> None:
    """Law: a version is ``absorb`` of the changes that arrived, each as old as it is."""
    one = buffered(2, 5, windowed(1.0), staleness=0.5)
    world = World(FedIT(), rounds=6)
    session = world.session(tmp_path, one)
    method, kept, stale = session.method, {}, False
    for round in range(1, 7):
        version, before = round - 1, session.state
        jobs = [job for message in session.train_cohorts(round) for job in message]
        updates = {
            j.client.id: Update(j.client, trained(j.start, round, 0.1), j.client.num_examples)
            for j in jobs
        }
        for j in jobs:
            x = method.adds(before, j.start, updates[j.client.id])
            kept[j.client.id] = (version, float(j.client.num_examples), x)
        arrived = [f.client for f in one._next.arrived]
        session.finish_training(updates.values(), session.state)
        total, weight = {}, 0.0
        for i in sorted(arrived):
            born, w, x = kept.pop(i)
            stale |= born < version
            for name, t in x.items():
                total[name] = total.get(name, 0.0) + w * (1 + version - born) ** -0.5 * t
            weight += w
        want = method.absorb(before, total, weight)
        for name, t in want.items():
            torch.testing.assert_close(session.state[name], t, rtol=1e-12, atol=1e-12)
    assert stale, "the schedule makes no change wait"


def test_stale_changes_count_by_their_own_age(tmp_path):
    check_weights(tmp_path)


def test_changes_that_are_too_old_are_dropped_and_counted(tmp_path):
    world = World(FedIT(), rounds=8)
    _, all_in = world.run(tmp_path / "all", buffered(2, 6, windowed(1.0)))
    _, few = world.run(tmp_path / "few", buffered(2, 6, windowed(1.0), max_staleness=0))
    assert max(r.get("staleness/max", 0) for r in all_in) > 0
    assert all(r.get("staleness/max", 0) == 0 for r in few)
    assert sum(r["staleness/dropped"] for r in few) > 0
    totals = [[r["buffer/results"] + r["staleness/dropped"] for r in rs] for rs in (all_in, few)]
    assert totals[0] == totals[1]


def test_a_client_that_fails_in_training_never_arrives(tmp_path):
    session = World(FedIT()).session(tmp_path, buffered(), rounds=Rounds(min_success=0.0))
    jobs = [job for message in session.train_cohorts(1) for job in message]
    done = [Update(j.client, trained(j.start, 1, 0.1), 5, {}) for j in jobs[1:]]
    done = [replace(u, num_examples=u.client.num_examples) for u in done]
    record = session.finish_training(done, session.state)
    assert record["failed"] == 1
    assert record["buffer/results"] == PER_ROUND - 1


def test_a_method_that_averages_by_turns_is_refused():
    clients = tuple(Client(i, Ranks({m.path: 2 for m in MODULES}), 5) for i in range(3))
    setting = Setting(MODULES, 1000, 12.0, clients, 3)
    with pytest.raises(ValueError, match="averages one factor in one round"):
        check_averages(Alternate(schedule="ba", weighting="all"), setting)
    check_averages(Alternate(schedule="b", weighting="all"), setting)
    check_averages(FedIT(), setting)
