"""F1, F4, F5, F6, F8 and the refusals (F2) of SwitchLoRA under federation."""

import dataclasses

import pytest
import torch

from fedlora.core.seeding import torch_generator
from fedlora.core.types import Factors, LocalPlan, Update
from fedlora.server.method import Setup
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.switchlora.replica import (
    ALTERNATE,
    DIGEST_BYTES,
    PRODUCT,
    Replica,
    news,
    residual,
    shared,
)
from fedlora.techniques.switchlora.technique import SwitchTraining
from fedlora.wire.codec import encode_payload, update_bytes
from strategies.flexlora import FlexLoRA
from strategies.slora import SLoRA
from strategies.switchlora import DENSE, SwitchLoRA, covariance
from tests.generators import dense, roomy_setting
from tests.strategies.laws import PLAN, SINGLE, after_rounds, close, cohort, job, reached

OFTEN = SwitchTraining(interval=10.0, ratio=10.0)
MODES = [ALTERNATE, PRODUCT, DENSE]


def rule(mode: str = ALTERNATE, switching: SwitchTraining = OFTEN, **options) -> SwitchLoRA:
    return SwitchLoRA(mode=mode, switching=switching, steps=3, horizon=40, **options)


@pytest.mark.parametrize("mode", MODES)
def test_the_server_s_model_is_the_mean_of_its_clients(mode):
    """Of unequal ranks, some of them absent, over several rounds."""
    population, method = roomy_setting(), rule(mode)
    state = method.init_state(population)
    for t in range(5):
        updates = cohort(method, state, population, seed=t)[t % 3 :]
        total = sum(u.num_examples for u in updates)
        sent = [reached(method, state, u) for u in updates]
        state = method.aggregate(state, updates)
        got = dense(method.global_update(state))
        for path, w in got.items():
            mean = sum(u.num_examples / total * s[path] for u, s in zip(updates, sent, strict=True))
            close(w, mean)
        for c in population.clients:
            for path, w in dense(method.client_start(state, c)).items():
                close(w, got[path], 1e-6)


def test_planted_fault_factors_of_clients_that_exchange_alone():
    """O0: averaging A and B of clients whose bases went apart misses by more than the update."""
    from fedlora.techniques.switchlora.layer import begin
    from tests.fedlora.techniques.switchlora.test_layer import play

    ends, g = [], torch_generator(0, "test-apart")
    for k in range(3):
        a, b = torch.empty(8, 64).double(), torch.empty(48, 8).double()
        layer = begin("w", torch.zeros(48, 64).double(), a, b, alpha=1.0, seed=0)
        start = layer.effective().clone()
        for side in ("a", "b"):
            layer.vectors(side).add_(
                0.05 * torch.randn(layer.vectors(side).shape, generator=g).double() * (k + 1)
            )
        play(layer, 20, "ring", 0, lambda t: 1)
        ends.append(layer)
    wanted = sum(x.effective() for x in ends) / 3
    base = torch.zeros(48, 64).double()
    a, b = (sum(getattr(x, s) for x in ends) / 3 for s in "ab")
    first = begin(
        "w", base, torch.empty(8, 64).double(), torch.empty(48, 8).double(), alpha=1.0, seed=0
    )
    naive = first.weight + first.scale * b @ a
    assert float((naive - wanted).norm()) > float((wanted - start).norm())


@pytest.mark.parametrize("mode", [ALTERNATE, PRODUCT])
def test_a_replica_that_was_sent_what_is_counted_is_where_the_server_is(mode):
    """F3 and F6: bytes counted are bytes of what is sent, whoever missed what."""
    population, method = roomy_setting(), rule(mode, hash_every=4)
    state = method.init_state(population)
    timetable = method._timetable(population.seed)
    copies = {c.id: Replica.load(state, population.alpha, timetable) for c in population.clients}
    present = [(0, 1, 2), (0, 3), (1, 2, 4), (0, 1), (2, 5), (3,), (0, 5), (4, 1)]
    for t, who in enumerate(present):
        updates = [
            u
            for u in cohort(method, state, population, seed=t, precision=SINGLE)
            if u.client.id in who
        ]
        for u in updates:
            known = copies[u.client.id].round
            found = news(state, known)
            counted = method.bytes_down(state, job(method, state, u.client), "float32")
            sent = sum(len(x.numpy().tobytes()) for x in found.tensors())
            assert counted == sent + (DIGEST_BYTES if t and t % 4 == 0 else 0)
            if t == 0:
                assert counted == 0
            copies[u.client.id] = copies[u.client.id].take(found)
            assert copies[u.client.id].state().keys() == shared(state).keys()
            for name, x in copies[u.client.id].state().items():
                assert torch.equal(x, state[name]), name
            plan = method.plan(state, u.client, PLAN)
            of = {"a": plan.train_a, "b": plan.train_b}
            moved = list(u.adapter.values())
            arrays = [
                getattr(f, side).numpy().tobytes() for f in moved for side, on in of.items() if on
            ]
            assert update_bytes(u.payload, plan) == sum(len(a) for a in arrays)
        state = method.aggregate(state, updates)
        for u in updates:
            assert int(state["seen"][u.client.id]) == t


def test_of_dense_the_mean_update_is_sent_and_counted():
    population, method = roomy_setting(), rule(DENSE)
    state, updates = after_rounds(method, population, seed=1)
    client = population.clients[0]
    size = sum(m.d_out * m.d_in for m in population.modules)
    assert method.bytes_down(state, job(method, state, client), "float32") == 4 * size
    first = method.init_state(population)
    assert method.bytes_down(first, job(method, first, client), "float32") == 0
    plan = method.plan(state, client, PLAN)
    assert update_bytes(updates[0].payload, plan) == 4 * size
    array, _ = encode_payload(updates[0].payload)
    assert array.nbytes == 4 * size
    assert isinstance(plan.technique, SwitchTraining)
    assert (plan.technique.first, plan.technique.total) == (3, 120)


def test_without_replicas_everything_is_sent_every_time():
    population, method = roomy_setting(), rule(replicas=False)
    state, _ = after_rounds(method, population, seed=1)
    sent = job(method, state, population.clients[0])
    array, _ = encode_payload(sent.start)
    assert method.bytes_down(state, sent, "float32") == array.nbytes


def test_alone_and_without_exchanges_it_is_alternating_lora():
    """F4: K = 1; A in even rounds, B in odd ones, each as the client left it."""
    population = roomy_setting(("T4",))
    method = rule(switching=SwitchTraining(interval=1e12))
    state = method.init_state(population)
    client = population.clients[0]
    first = method.client_start(state, client)
    wanted = {path: (f.a.double(), f.b.double()) for path, f in first.factors.items()}
    for t in range(4):
        start = method.client_start(state, client)
        assert all(torch.equal(start.shift[p], d) for p, d in first.shift.items())
        plan = method.plan(state, client, PLAN)
        assert (plan.train_a, plan.train_b) == (t % 2 == 0, t % 2 == 1)
        (update,) = cohort(method, state, population, seed=t)
        for path, f in update.adapter.items():
            a, b = wanted[path]
            wanted[path] = (f.a, b) if plan.train_a else (a, f.b)
        state = method.aggregate(state, [update])
        for path, f in method.client_start(state, client).factors.items():
            close(f.a, wanted[path][0], 1e-15)
            close(f.b, wanted[path][1], 1e-15)


def test_a_residual_has_no_more_than_the_rank_of_all_clients_but_one():
    """F8, and that with it the average of factors is the mean of products."""
    method, population = rule(PRODUCT), roomy_setting(("T3", "T3", "T3"))
    state = method.init_state(population)
    updates = cohort(method, state, population, seed=2)
    layers = method._replica(state).layers
    p = [0.5, 0.3, 0.2]
    for path, layer in layers.items():
        factors = [u.adapter[path] for u in updates]
        left, right = covariance(layer, factors, p)
        assert left.shape[1] == right.shape[0] == 2 * layer.rank
        rest = residual({"left": left, "right": right})
        assert int(torch.linalg.matrix_rank(rest)) <= 2 * layer.rank
        mean_a = sum(w * f.a for w, f in zip(p, factors, strict=True))
        mean_b = sum(w * f.b for w, f in zip(p, factors, strict=True))
        wanted = sum(w * f.delta() for w, f in zip(p, factors, strict=True))
        close(layer.scale * mean_b @ mean_a + rest, wanted)
    lone = covariance(layer, factors[:1], [1.0])
    assert lone[0].shape[1] == 0


def test_a_replica_of_the_run_is_compared_and_put_right(caplog):
    """F7 in a run: what is recorded every ``hash_every`` rounds, resuming included."""
    population, method = roomy_setting(), rule(hash_every=2)
    state, audit = method.init_state(population), method.state_audit()
    found = []
    for t in range(9):
        state = method.aggregate(state, cohort(method, state, population, seed=t, precision=SINGLE))
        if t == 4:
            path = population.modules[0].path
            audit.replica.layers[path].candidates["b"][0, 0] *= 1 + 1e-6
        audit = method.state_audit() if t == 6 else audit  # begun anew, as when a run is resumed
        record = {**method.report(state), **audit(state)}
        found.append(record.get("switch/replica_differs"))
        assert record["switch/exchanged"] > 0
    assert found == [None, 0, None, 0, None, 1, None, 0, None]
    assert "round 6: a client that installed every round's result is not bitwise" in caplog.text


def test_dropout_is_told(caplog):
    rule().check(Setup(dataclasses.replace(SWITCH, dropout=0.3)))
    assert "client.dropout=0.3 with strategy=switchlora" in caplog.text


def test_exchanges_happen_between_rounds():
    population, method = roomy_setting(), rule()
    state = method.init_state(population)
    ids = {k: t.clone() for k, t in state.items() if "/ids_" in k}
    for t in range(8):
        state = method.aggregate(state, cohort(method, state, population, seed=t))
    assert all(not torch.equal(t, state[k]) for k, t in ids.items())


SWITCH = LocalPlan(steps=3, dropout=0.0, technique=OFTEN)


@pytest.mark.parametrize(
    ("method", "setup", "why"),
    [
        (
            FlexLoRA(),
            Setup(SWITCH),
            "technique=switchlora lets .* FlexLoRA averages .* alike: use strategy=switchlora",
        ),
        (
            SLoRA(aggregator=rule()),
            Setup(SWITCH),
            "strategy.aggregator=SwitchLoRA .*base that moves.*use strategy=switchlora by itself",
        ),
        (
            rule(),
            Setup(LocalPlan(steps=5)),
            "without switches.*or client=switchlora",
        ),
        (
            SwitchLoRA(switching=OFTEN, steps=0, horizon=4),
            Setup(dataclasses.replace(SWITCH, steps=0)),
            "client.steps=0.*client.steps=20",
        ),
        (rule(), Setup(dataclasses.replace(SWITCH, steps=4)), "strategy.steps=3.*client.steps=4"),
        (
            rule(),
            Setup(dataclasses.replace(SWITCH, technique=SwitchTraining())),
            "strategy.switching=",
        ),
        (rule(), Setup(dataclasses.replace(SWITCH, train_a=False)), "train_a=False.*leave both"),
        (rule(), Setup(SWITCH, wire="bfloat16"), "federation.wire=bfloat16.*float32"),
        (rule(), Setup(SWITCH, quantization="int8"), "model.quantization=int8.*=none"),
        (
            rule(DENSE),
            Setup(dataclasses.replace(SWITCH, optimizer="sgd")),
            "client.optimizer='sgd' with strategy.mode=dense.*sync_alternate",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(method, setup, why):
    with pytest.raises(ValueError, match=why):
        method.check(setup)
    rule().check(Setup(SWITCH))
    rule(DENSE).check(Setup(SWITCH, wire="bfloat16"))


@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_cannot_switch_are_refused(mode):
    population = roomy_setting(("T4", "T4"))
    full = dataclasses.replace(
        population,
        modules=tuple(dataclasses.replace(m, d_out=7, d_in=7) for m in population.modules),
    )
    with pytest.raises(ValueError, match=r"rank 7 cannot switch.*all are in slots"):
        rule(mode).init_state(full)


def test_dense_updates_where_factors_are_due_are_refused():
    population, method = roomy_setting(), rule()
    state = method.init_state(population)
    start = method.client_start(state, population.clients[0])
    bad = Update(population.clients[0], Rebased(dict(start.shift)), 1)
    with pytest.raises(TypeError, match="client 0 sent a Rebased"):
        method.aggregate(state, [bad])
    good = {p: Factors(f.a, f.b, f.alpha) for p, f in start.factors.items()}
    with pytest.raises(TypeError, match="client 0 sent factors"):
        rule(DENSE).aggregate(
            rule(DENSE).init_state(population), [dataclasses.replace(bad, payload=good)]
        )
