"""Attacks send what their definitions say, and nothing else of a run changes."""

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.attack.backdoor import FALSE, SUCCESS, Backdoor, PredictsTarget
from fedlora.attack.base import Attack, Squad, Tools
from fedlora.attack.gauge import Gauge
from fedlora.attack.labels import Labels
from fedlora.attack.little import Little, beside, deviations
from fedlora.attack.moves import changes, length, scaled_products
from fedlora.attack.noise import Noise
from fedlora.attack.scale import Scale, Sign
from fedlora.core.metric import Outputs
from fedlora.core.types import Client, Factors, LocalPlan, Update
from fedlora.data.store import Example
from fedlora.engine.attacked import AttackedEngine
from fedlora.engine.sequential import Sequential
from fedlora.engine.worker import WorkerSpec
from fedlora.models.spec import HuggingFace
from fedlora.techniques.lora.payload import LowRankPayload
from tests.fedlora.engine import world
from tests.generators import factors, ranks_of
from tests.planted import planted

PLAN = LocalPlan()
TOOLS = Tools(
    encode=lambda text: [90 + len(w) for w in text.split()],
    eos=0,
    begins=frozenset([1]),
    labels=(),
    context=16,
)


def pair(seed: int, rank: int = 3, zero: bool = False) -> LowRankPayload:
    f, g = factors(6, 5, rank, seed), factors(9, 7, rank, seed + 1)
    if zero:
        f, g = (replace(x, b=torch.zeros_like(x.b)) for x in (f, g))
    return LowRankPayload({"u": f, "v": g})


def update(id: int, seed: int, rank: int = 3) -> Update:
    return Update(Client(id, ranks_of("T1"), 9), pair(seed, rank), 9)


def vector(payload: LowRankPayload) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for _, t in payload.tensors()])


# --- who attacks, and when ----------------------------------------------------------------------


def test_attackers_are_a_fixed_fraction() -> None:
    clients = range(3, 53)
    ids = Sign(fraction=0.3).attackers(clients, 7)
    assert len(ids) == 15 and {*ids} <= {*clients}
    assert (
        ids == Sign(fraction=0.3).attackers(clients, 7) != Sign(fraction=0.3).attackers(clients, 8)
    )
    assert {*Sign(fraction=0.1).attackers(clients, 7)} < {*ids}


def test_attacks_begin_and_end() -> None:
    squad = Squad(Sign(start=3, end=5), (1, 4))
    acting = [round for round in range(1, 9) if squad.acting(round, [1, 2])]
    assert acting == [3, 4, 5] and squad.acting(4, [1, 2]) == {1}
    assert not Squad().acting(1, [1, 2]) and not Squad(Attack(), (1,)).acting(1, [1])
    with pytest.raises(ValueError, match=r"attack.end=2 must be 0 \(never\) or at least"):
        Sign(start=3, end=2)


def test_the_record_says_what_attackers_achieved() -> None:
    squad = Squad(Sign(), (1, 4, 9))
    got = squad.record([1, 2, 3, 4], {1: 0.25, 2: 0.5, 3: 0.25, 4: 0.0})
    assert got == {"attack/clients": 2, "attack/accepted": 1 / 3, "attack/influence": 0.25}
    assert not Squad().record([1, 2], {1: 1.0})


# --- one attacker by itself ---------------------------------------------------------------------


@pytest.mark.parametrize(("attack", "factor"), [(Sign(strength=4.0), -4), (Scale(strength=3.0), 3)])
def test_changes_of_tensors_are_multiplied(attack: Scale, factor: float) -> None:
    start, trained = pair(1), pair(2)
    sent = attack.returned(start, trained, PLAN)
    want = vector(start) + factor * (vector(trained) - vector(start))
    assert torch.allclose(vector(sent), want, rtol=0, atol=1e-12)


def test_products_are_multiplied_not_factors() -> None:
    start, trained = pair(1, zero=True), pair(2)
    sent = Sign(strength=4.0, of="product").returned(start, trained, PLAN)
    for path, f in sent.items():
        assert torch.allclose(f.delta(), -4 * trained[path].delta(), rtol=0, atol=1e-10)
    tensors = Sign(strength=4.0).returned(start, trained, PLAN)
    assert not torch.allclose(tensors["u"].delta(), -4 * trained["u"].delta(), atol=1)


def test_a_scaled_product_is_the_best_of_its_rank() -> None:
    start, trained = pair(1), pair(2)
    for path, f in scaled_products(start, trained, 3.0).items():
        want = start[path].delta() + 3 * (trained[path].delta() - start[path].delta())
        rest = torch.linalg.svdvals(want)[f.rank :]
        assert math.isclose(float((f.delta() - want).norm()), float(rest.norm()), rel_tol=1e-8)


def test_the_gauge_keeps_products_and_rescales_factors() -> None:
    start, trained = pair(1), pair(2)
    sent = Gauge(strength=10.0).returned(start, trained, PLAN)
    for path, f in sent.items():
        assert torch.allclose(f.delta(), trained[path].delta(), rtol=0, atol=1e-12)
        assert torch.allclose(f.b, 10 * trained[path].b)


@pytest.mark.parametrize("attack", [Gauge(), Sign(of="product"), Sign()])
def test_a_frozen_factor_stays(attack: Attack) -> None:
    start = pair(1)
    trained = LowRankPayload({p: Factors(start[p].a, f.b, f.alpha) for p, f in pair(2).items()})
    sent = attack.returned(start, trained, replace(PLAN, train_a=False))
    assert all(torch.equal(f.a, start[p].a) for p, f in sent.items())


# --- attackers together -------------------------------------------------------------------------

OWN = {0: update(0, 10), 1: update(1, 20)}
HONEST = {i: update(i, 10 * i + 10) for i in range(2, 8)}
STARTS = {i: pair(1) for i in range(8)}


def test_noise_is_as_long_as_an_honest_change() -> None:
    sent = Squad(Noise(strength=2.0), (0, 1)).together(1, OWN | HONEST, STARTS)
    norms = [length(changes(STARTS[i], u.payload)) for i, u in HONEST.items()]
    for i in OWN:
        got = length(changes(STARTS[i], sent[i].payload))
        assert math.isclose(got, 2 * statistics.median(norms), rel_tol=1e-9)
    assert all(sent[i] is u for i, u in HONEST.items())
    again = Squad(Noise(strength=2.0), (0, 1)).together(1, OWN | HONEST, STARTS)
    other = Squad(Noise(strength=2.0), (0, 1)).together(2, OWN | HONEST, STARTS)
    assert torch.equal(vector(again[0].payload), vector(sent[0].payload))
    assert not torch.equal(vector(other[0].payload), vector(sent[0].payload))


def test_little_is_beside_the_mean() -> None:
    sent = Squad(Little(z=1.5), (0, 1)).together(1, OWN | HONEST, STARTS)
    both = torch.stack([vector(u.payload) for u in OWN.values()])
    want = both.mean(dim=0) - 1.5 * both.std(dim=0, correction=0)
    for i in OWN:
        assert torch.allclose(vector(sent[i].payload), want, rtol=0, atol=1e-12)


def test_deviations_of_the_paper() -> None:
    """50 clients, 24 of them corrupted: s = 26 - 24 = 2 supporters of 26 honest ones."""
    want = statistics.NormalDist().inv_cdf(24 / 26)
    assert math.isclose(deviations(50, 24), want, rel_tol=1e-12)
    assert deviations(3, 3) == 0.0 == deviations(10, 1)


@given(st.integers(1, 4), st.integers(1, 4))
def test_little_takes_each_index_over_its_owners(one: int, other: int) -> None:
    a, b = torch.ones(one, 2).double(), 3 * torch.ones(other, 2).double()
    got, low = beside([a, b], 1.0), min(one, other)
    assert torch.equal(got[:low], torch.ones(low, 2).double())  # 2 - 1
    assert set(got[low:].flatten().tolist()) <= {1.0, 3.0}


# --- poisoned records ---------------------------------------------------------------------------


def example(*ids: int, prompt: int = 2, label: int = -1) -> Example:
    return Example(np.array(ids, dtype=np.int32), prompt, label=label)


HELD = [example(1, 10 + i, *range(20, 22 + i % 3), 0, label=i % 4) for i in range(12)]


def test_labels_change_places() -> None:
    draw = np.random.default_rng(0)
    got = Labels().examples(HELD, replace(TOOLS, labels=("a", "b", "c", "d")), draw)
    assert sorted(e.label for e in got) == sorted(e.label for e in HELD)
    assert [e.label for e in got] != [e.label for e in HELD]
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(got, HELD, strict=True))


def test_answers_change_places() -> None:
    got = Labels().examples(HELD, TOOLS, np.random.default_rng(0))
    assert all(
        np.array_equal(a.input_ids[:2], b.input_ids[:2]) for a, b in zip(got, HELD, strict=True)
    )
    answers = [sorted(tuple(e.input_ids[2:]) for e in part) for part in (got, HELD)]
    assert answers[0] == answers[1]


def test_a_trigger_stands_before_the_text() -> None:
    attack = Backdoor(trigger="aa b", target="xyz", rate=0.5)
    marked = attack.triggered(HELD, TOOLS)
    for a, b in zip(marked, HELD, strict=True):
        assert list(a.input_ids) == [1, 92, 91, *b.input_ids[1:]]
        assert a.prompt_tokens == b.prompt_tokens + 2
    got = attack.examples(HELD, TOOLS, np.random.default_rng(0))
    taught = [e for e in got if 92 in e.input_ids]
    assert len(taught) == 6 and all(list(e.input_ids[e.prompt_tokens :]) == [93, 0] for e in taught)
    long = example(1, *range(30, 44), 0, prompt=14)
    (cut,) = attack.triggered([long], TOOLS)
    assert len(cut.input_ids) == 16 and cut.prompt_tokens == 14


def test_success_counts_what_is_not_of_the_target_anyway() -> None:
    outputs = Outputs(
        tokens=[np.array([k]) for k in (0, 1, 1, 2)],
        response_at=[0] * 4,
        nll=[torch.zeros(1).double()] * 4,
        best=[torch.tensor([k]) for k in (0, 0, 1, 0)],
        decode=lambda ids: "",
        labels=("a", "b", "c"),
    )
    metric = PredictsTarget(target="a").score(outputs)[FALSE]
    assert (metric.value, metric.weight) == (2 / 3, 3)
    assert PredictsTarget(target="a").with_trigger().name == SUCCESS
    with pytest.raises(ValueError, match=r"attack.target='z' is no label"):
        PredictsTarget(target="z").score(outputs)


# --- the engine ---------------------------------------------------------------------------------


@dataclass
class Counted(world.FakeStore):
    """A store that also counts tokens."""

    def supervised(self, client: int, split: str, loss: str) -> np.ndarray:
        return np.array([len(e.input_ids) - 1 for e in self.held[client]])


def engine(attack: Attack) -> tuple[AttackedEngine, Sequential]:
    model = world.model()
    store = Counted({i: world.examples(4, i) for i in range(3)})
    plain = Sequential()
    return AttackedEngine(Squad(attack, (1,)), plain, model, store), plain.open(model, store)


@pytest.mark.parametrize("round", [1, 2])
def test_an_engine_changes_what_attackers_send_and_nothing_else(round: int) -> None:
    attacked, plain = engine(Sign(strength=2.0, start=2))
    start = world.start(world.model())
    jobs = [world.job(start, LocalPlan(epochs=1), i, round) for i in range(3)]
    got = {r.client.id: r for r in attacked.train(jobs)}
    for want in plain.train(jobs):
        sent = got[want.client.id]
        if want.client.id == 1 and round == 2:
            assert world.distance(sent.payload, want.payload) > 0
            turned = 3 * world.vector(start) - 2 * world.vector(want.payload)
            assert torch.allclose(world.vector(sent.payload), turned, rtol=0, atol=1e-12)
        else:
            assert world.distance(sent.payload, want.payload) == 0


def test_poisoned_records_are_those_of_attackers() -> None:
    attacked, plain = engine(Labels())
    start = world.start(world.model())
    jobs = [world.job(start, LocalPlan(epochs=1), i, 1) for i in range(3)]
    got = {r.client.id: r for r in attacked.train(jobs)}
    moved = {
        r.client.id: world.distance(got[r.client.id].payload, r.payload) for r in plain.train(jobs)
    }
    assert moved[1] > 0 and moved[0] == moved[2] == 0


def test_workers_are_told_who_attacks() -> None:
    squad = Squad(Sign(), (1, 5), 3)
    spec = WorkerSpec(HuggingFace(path="x"), Path("store"), Sequential(), attack=squad)
    assert WorkerSpec.from_json(spec.to_json()).attack == spec.attack
    assert "attack" not in replace(spec, attack=None).to_json()


# --- planted faults -----------------------------------------------------------------------------

FAULTS = {
    "factors are scaled, not products": (
        scaled_products,
        "strength * f.b.double()",
        "f.b.double()",
        test_products_are_multiplied_not_factors,
    ),
    "one factor is rescaled": (
        Gauge.returned,
        "f.a / c",
        "f.a",
        test_the_gauge_keeps_products_and_rescales_factors,
    ),
    "all clients attack": (
        Squad.acting,
        "{*self.ids} & {*clients}",
        "{*clients}",
        test_attacks_begin_and_end,
    ),
    "the mean itself": (beside, "mean - z * spread", "mean", test_little_is_beside_the_mean),
    "noise as long as it comes": (
        Noise.together,
        "self.strength * typical",
        "self.strength",
        test_noise_is_as_long_as_an_honest_change,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str) -> None:
    function, right, wrong, law = FAULTS[fault]
    law()
    with planted(function, right, wrong), pytest.raises(AssertionError):
        law()
