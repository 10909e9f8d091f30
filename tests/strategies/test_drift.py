"""SCAFFOLD and FedDyn on quadratics, where local optima, drift and the common optimum are known."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.algebra.server_optimizer import FedAvgM
from fedlora.algebra.state import Kept, State, pack, under, unpack
from fedlora.core.rates import LR_SUM
from fedlora.core.types import Client, LocalPlan, Setting, Update
from fedlora.server.method import Setup
from fedlora.techniques.lora.corrected import CorrectedPayload
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.training.terms import Correction, FedProx
from strategies.drift import MEAN, SCAFFOLD, TOTAL, DriftCorrected, FedDyn
from strategies.fedit import FedIT
from tests.generators import ALPHA, as_payload, single_module_setting
from tests.strategies.laws import DOUBLE, _in, close, job

POPULATION = single_module_setting(3, 2, (1, 1, 1, 1, 1))
RATE, STEPS = 0.1, 5
SGD = LocalPlan(optimizer="sgd", max_grad_norm=0.0)


class World:
    """Clients whose losses are ``curvature_k / 2 ‖θ - target_k‖²``, and what they keep."""

    def __init__(self, method: Any, population: Setting = POPULATION, steps: int = STEPS) -> None:
        self.method, self.population, self.steps = method, population, steps
        self.state: State = _in(DOUBLE, method.init_state(population))
        self.kept: dict[int, Kept] = {}
        g = torch.Generator().manual_seed(3)
        like = pack(method.global_update(self.state))

        def drawn(t: Tensor) -> Tensor:
            return torch.randn(t.shape, generator=g, dtype=torch.float64)

        self.targets = {c.id: {n: drawn(t) for n, t in like.items()} for c in population.clients}
        self.curvature = {c.id: 1.0 + c.id for c in population.clients}

    def gradient(self, client: int, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: self.curvature[client] * (t - self.targets[client][n]) for n, t in at.items()}

    def trained(self, client: Client) -> Update:
        """As an engine trains it: the loss's gradient and the start's correction."""
        start = as_payload(self.method.client_start(self.state, client, self.kept.get(client.id)))
        plan = self.method.plan(self.state, client, SGD)
        begin = pack(start.low_rank())
        linear = {} if start.linear() is None else pack(start.linear())
        pull = plan.term.proximal if isinstance(plan.term, Correction) else 0.0
        now = dict(begin)
        for _ in range(self.steps):
            for name, g in self.gradient(client.id, now).items():
                more = linear[name] if linear else 0.0
                now[name] = now[name] - RATE * (g + more + pull * (now[name] - begin[name]))
        factors = {p: unpack(now, ALPHA)[p] for p in start.low_rank()}
        said = {LR_SUM: RATE * self.steps}
        return Update(client, LowRankPayload(factors), client.num_examples, said)

    def round(self, ids: Sequence[int]) -> None:
        updates = [self.trained(self.population.clients[i]) for i in sorted(ids)]
        kept = {}
        for u in updates:
            before = self.kept.get(u.client.id)
            start = as_payload(self.method.client_start(self.state, u.client, before))
            kept[u.client.id] = self.method.kept(self.state, u.client, before, start, u)
        self.state = self.method.aggregate(self.state, updates)
        self.kept |= kept

    def run(self, rounds: int, present: int) -> "World":
        draw = random.Random(1)
        for _ in range(rounds):
            self.round(draw.sample(range(len(self.population.clients)), present))
        return self

    def shares(self, uniform: bool) -> list[float]:
        n = [1.0 if uniform else float(c.num_examples) for c in self.population.clients]
        return [x / sum(n) for x in n]

    def optimum(self, uniform: bool) -> dict[str, Tensor]:
        """Where the (weighted) mean of all gradients is zero."""
        h = [q * k for q, k in zip(self.shares(uniform), self.curvature.values(), strict=True)]
        return {
            name: sum(x * self.targets[i][name] for i, x in enumerate(h)) / sum(h)
            for name in self.targets[0]
        }

    def error(self, uniform: bool) -> float:
        """Distance from the optimum, as a share of the distance of the first state from it."""
        due, now = self.optimum(uniform), pack(self.method.global_update(self.state))
        first = _in(DOUBLE, self.method.init_state(self.population))
        return _distance(now, due) / _distance(pack(self.method.global_update(first)), due)


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return float(torch.stack([(t - other[n]).norm() for n, t in one.items()]).norm())


BOTH: list[Callable[..., DriftCorrected]] = [SCAFFOLD, lambda **kw: FedDyn(strength=2.0, **kw)]
IDS = ["scaffold", "feddyn"]


@pytest.mark.parametrize("make", BOTH, ids=IDS)
@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_the_fixed_point_is_the_optimum_with_some_clients_a_round(
    make: Callable[..., DriftCorrected], weights: str
) -> None:
    """SCAF-4, SCAF-5, SCAF-9, DYN-1, DYN-3: of the objective that the weights say, and no other."""
    world = World(make(weights=weights)).run(400, present=3)
    uniform = weights == "uniform"
    assert world.error(uniform) < 1e-6
    assert world.error(not uniform) > 1e-2


def test_plain_averaging_stops_short_of_it() -> None:
    """SCAF-7: full participation, so nothing but drift is left."""
    world = World(FedIT()).run(400, present=5)
    assert world.error(uniform=False) > 1e-2


@pytest.mark.parametrize("make", BOTH, ids=IDS)
@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_the_servers_mean_is_that_of_what_all_clients_keep(
    make: Callable[..., DriftCorrected], weights: str
) -> None:
    """SCAF-2, DYN-2: over all clients that train, zero for one that never took part."""
    world = World(make(weights=weights))
    for ids in ((0, 2), (1, 2), (0, 3), (2,)):  # client 4 never
        world.round(ids)
        q = world.shares(weights == "uniform")
        for name, mean in under(world.state, MEAN).items():
            due = sum(q[i] * kept[name] for i, kept in world.kept.items())
            assert isinstance(due, Tensor)
            close(mean, due, 1e-12, name)


def test_the_clients_of_scaffold_keep_the_mean_of_their_own_gradients() -> None:
    """SCAF-1, of one step: the gradient of the loss where the round began."""
    world = World(SCAFFOLD(), steps=1).run(4, present=3)
    start = pack(world.method.global_update(world.state))
    world.round((1, 3))
    for i in (1, 3):
        for name, g in world.gradient(i, start).items():
            close(world.kept[i][name], g, 1e-10, name)


def test_the_clients_of_feddyn_keep_their_gradient_at_the_fixed_point() -> None:
    world = World(FedDyn(strength=2.0)).run(400, present=4)
    at = pack(world.method.global_update(world.state))
    for i in range(5):
        for name, g in world.gradient(i, at).items():
            close(world.kept[i][name], g, 1e-5, name)
    assert world.method.report(world.state)["feddyn/shift"] < 1e-5


def test_only_clients_that_train_count() -> None:
    """Held-out clients and those without examples are no part of the mean."""
    *others, last = POPULATION.clients
    clients = (*others, dataclasses.replace(last, num_examples=0))
    some = dataclasses.replace(POPULATION, clients=clients)
    assert float(SCAFFOLD(weights="uniform").init_state(some)[TOTAL]) == 4
    held_out = dataclasses.replace(some, trainable=(0, 1, 3))
    assert float(SCAFFOLD(weights="uniform").init_state(held_out)[TOTAL]) == 3
    n = sum(POPULATION.clients[i].num_examples for i in (0, 1, 3))
    assert float(SCAFFOLD().init_state(held_out)[TOTAL]) == n


@pytest.mark.parametrize("make", BOTH, ids=IDS)
def test_the_first_round_is_that_of_the_plain_average_but_for_the_step_of_feddyn(
    make: Callable[..., DriftCorrected],
) -> None:
    world, plain = World(make()), World(FedIT())
    everybody = world.population.clients
    start = world.method.client_start(world.state, everybody[0])
    assert isinstance(start, CorrectedPayload)
    assert not any(bool(t.any()) for t in pack(start.linear()).values())
    if isinstance(world.method, SCAFFOLD):
        for w in (world, plain):
            w.round(range(5))
        for name, t in pack(world.method.global_update(world.state)).items():
            assert torch.equal(t, pack(plain.method.global_update(plain.state))[name])


def test_traffic() -> None:
    """SCAF-3: up is FedIT's; down adds ``c`` once it has moved. FedDyn's is FedIT's both ways."""
    for method, later in ((SCAFFOLD(), 2), (FedDyn(), 1)):
        world = World(method)
        host = sum(t.numel() for t in pack(method.global_update(world.state)).values())
        client = world.population.clients[0]
        for factor in (1, later):
            asked = job(method, world.state, client)
            assert method.bytes_down(world.state, asked, "float32") == 4 * host * factor
            assert method.bytes_down(world.state, asked, "bfloat16") == 2 * host * factor
            update = world.trained(client)
            assert method.bytes_up(world.state, update, asked.plan, "float32") == 4 * host
            world.round((0, 1))


def unweighted_mean_of_controls(
    self: Any, right: Callable[..., State], state: State, updates: Sequence[Update]
) -> State:
    """OpenFedLLM: models by examples, controls uniformly (SCAF-8)."""
    alike = [dataclasses.replace(u, num_examples=1) for u in updates]
    even = {**state, TOTAL: torch.tensor(5.0, dtype=torch.float64)}
    means = {k: t for k, t in right(even, alike).items() if k.startswith(MEAN)}
    return {**right(state, updates), **means}


def divided_by_participants(
    self: Any, right: Callable[..., State], state: State, updates: Sequence[Update]
) -> State:
    """The mean over those who came, in place of all."""
    n = float(sum(u.num_examples for u in updates))
    few = {**state, TOTAL: torch.tensor(n, dtype=torch.float64)}
    return {**right(few, updates), TOTAL: state[TOTAL]}


def never_moved(
    self: Any, right: Callable[..., State], state: State, updates: Sequence[Update]
) -> State:
    """The server forgets its mean."""
    return {**right(state, updates), **{k: t for k, t in state.items() if k.startswith(MEAN)}}


@pytest.mark.parametrize(
    "fault", [unweighted_mean_of_controls, divided_by_participants, never_moved]
)
@pytest.mark.parametrize("cls", [SCAFFOLD, FedDyn])
def test_planted_faults_of_the_mean_are_found(cls: Any, fault: Callable[..., State]) -> None:
    def aggregate(self: Any, state: State, updates: Sequence[Update]) -> State:
        return fault(self, lambda *a: cls.aggregate(self, *a), state, updates)

    broken = type(cls.__name__, (cls,), {"aggregate": aggregate})()
    with pytest.raises(AssertionError):
        test_the_servers_mean_is_that_of_what_all_clients_keep(lambda **_: broken, "examples")


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        (SCAFFOLD(), {"optimizer": "adamw"}, r"client\.optimizer=adamw: .*client=sgd"),
        (FedDyn(), {"optimizer": "adamw"}, r"client\.optimizer=adamw: .*client=sgd"),
        (SCAFFOLD(), {"momentum": 0.9}, r"client\.momentum=0\.9: .*client\.momentum=0"),
        (SCAFFOLD(), {"max_grad_norm": 1.0}, r"client\.max_grad_norm=1: "),
        (SCAFFOLD(), {"lr": 0.0}, r"client\.lr=0: "),
        (FedDyn(), {"term": FedProx()}, r"client\.term=FedProx: .*client/term=none"),
    ],
)
def test_what_would_make_them_another_method_is_refused(
    method: DriftCorrected, change: dict[str, Any], said: str
) -> None:
    method.check(Setup(SGD))
    with pytest.raises(ValueError, match=said):
        method.check(Setup(dataclasses.replace(SGD, **change)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FedDyn(strength=0.0), r"strategy\.strength"),
        (lambda: FedDyn(server_optimizer=FedAvgM()), "strategy/server_optimizer=none"),
        (lambda: SCAFFOLD(heterogeneous="covered"), r"strategy\.heterogeneous"),
        (lambda: SCAFFOLD(align="rotate"), r"strategy\.align"),
        (lambda: FedDyn(correct="ridge"), r"strategy\.correct"),
    ],
)
def test_options_that_mean_nothing_here_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_an_update_that_does_not_state_its_rates_is_named() -> None:
    world = World(SCAFFOLD())
    update = dataclasses.replace(world.trained(world.population.clients[2]), metrics={})
    with pytest.raises(ValueError, match="client 2 states 0 as the lr_sum"):
        world.method.aggregate(world.state, [update])
