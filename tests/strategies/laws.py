"""The laws of every strategy, as plain functions that raise AssertionError.

A law takes a strategy, a seed and a precision, sees the strategy only through its hooks, and works
for any payload. The contract applies all of them to everything under conf/strategy; the planted
faults show that each fault is caught by at least one of them. A law that is about some strategies
only says so in `ABOUT`, so that a test of another can be seen to be skipped.

Updates are compared as products, never as factors, and errors are measured against ``||W||_F``.
"""

import dataclasses
import importlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType

import safetensors.torch
import torch
from torch import Tensor

from fedlora.algebra import summand
from fedlora.algebra.linalg import normalize
from fedlora.algebra.server_optimizer import NoServerOptimizer
from fedlora.algebra.state import Kept, State, pack
from fedlora.algebra.summand import Product, Summands
from fedlora.core.payload import Payload
from fedlora.core.rates import LR_SUM
from fedlora.core.types import Client, Factors, LocalPlan, Ranks, Setting, TrainJob, Update
from fedlora.server.missed import SEEN
from fedlora.techniques.cores.payload import CorePayload
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.techniques.spp.payload import MaskedScale
from fedlora.techniques.spp.technique import Scaling
from fedlora.techniques.switchlora.technique import SwitchTraining
from fedlora.wire.codec import encode_payload
from strategies.base import LoRAStrategy
from tests.generators import (
    as_payload,
    dense,
    roomy_setting,
    setting,
    trained,
    with_tensors,
)

PLAN = LocalPlan(lr=0.02, weight_decay=0.1)
METRICS = MappingProxyType({LR_SUM: 0.25})
"""What every update states."""


@dataclass(frozen=True)
class Precision:
    """Of the numbers that clients send, and what is asked of results in return."""

    dtype: torch.dtype
    tolerance: float
    """Largest error, as a share of ``||W||_F``."""


DOUBLE = Precision(torch.float64, 1e-12)
SINGLE = Precision(torch.float32, 1e-5)
"""What a run computes in."""


def job(strategy: LoRAStrategy, state: State, client: Client) -> TrainJob:
    """What a client is asked for in the round that begins from a state."""
    c = strategy.enlist(state, client)
    start = as_payload(strategy.client_start(state, c))
    return TrainJob(0, 1, c, start, strategy.plan(state, c, PLAN))


def cohort(
    strategy: LoRAStrategy,
    state: State,
    population: Setting,
    seed: int,
    precision: Precision = DOUBLE,
) -> list[Update]:
    """What every client of the population sends back after some training."""
    updates = []
    for client in population.clients:
        c = strategy.enlist(state, client)
        start = strategy.client_start(state, c)
        moved = trained(start, 1000 * seed + c.id)
        sent = answer(start, moved, strategy.plan(state, c, PLAN))
        payload = _each(sent, lambda t: t.to(precision.dtype))
        updates.append(Update(c, payload, c.num_examples, METRICS))
    return updates


def answer(start: Payload, trained: Payload, plan: LocalPlan) -> Payload:
    """What a client sends that ended at ``trained``: a factor that its plan froze as it was, and
    after exchanges of its own what became of its weights."""
    if not isinstance(start, Rebased | Mapping):
        return trained
    assert not isinstance(trained, SparseDelta | Rebased)
    if isinstance(plan.technique, SwitchTraining):
        return Rebased(dense(Rebased(start.shift, trained)))
    kept = start.factors if isinstance(start, Rebased) else start
    found = {}
    for path, f in trained.items():
        a = f.a if plan.train_a else kept[path].a.clone()
        b = f.b if plan.train_b else kept[path].b.clone()
        found[path] = Factors(a, b, f.alpha)
    return LowRankPayload(found) if plan.choice is None else chosen(kept, found, plan)


def chosen(start: Mapping[str, Factors], probed: Mapping[str, Factors], plan: LocalPlan) -> Payload:
    """What a client sends whose trial and whose training both ended at ``probed``: the rank indices
    that it chooses, and all others as they were."""
    asked = Client(0, Ranks(dict.fromkeys(start, 1)), 1)
    assert plan.choice is not None
    indices = plan.choice.choose(TrainJob(0, 1, asked, LowRankPayload(start), plan), probed)
    found = {}
    for path, f in probed.items():
        a, b, at = start[path].a.to(f.a, copy=True), start[path].b.to(f.b, copy=True), indices[path]
        a[list(at)], b[:, list(at)] = f.a[list(at)], f.b[:, list(at)]
        found[path] = Factors(a, b, f.alpha)
    return LowRankPayload(found, indices)


def reached(strategy: LoRAStrategy, state: State, update: Update) -> dict[str, Tensor]:
    """What the weights of an update's client differ from the base's by."""
    payload, start = update.payload, strategy.client_start(state, update.client)
    if isinstance(start, Rebased) and not isinstance(payload, SparseDelta | Rebased):
        return dense(Rebased(start.shift, payload))
    return dense(payload)


def population_for(
    strategy: LoRAStrategy, tiers: Sequence[str] = ("T1", "T2", "T3", "T4", "T1", "T4")
) -> Setting:
    """A population on modules and at ranks that a strategy can do something with."""
    usual = setting(tiers)
    for module in usual.modules:
        lowest, highest = strategy.rank_range(module)
        if not lowest <= usual.min_ranks[module.path] <= usual.max_ranks[module.path] <= highest:
            return roomy_setting(tiers)
    return usual


def _each(payload: Payload, do: Callable[[Tensor], Tensor]) -> Payload:
    """What a client sends, with each of its tensors replaced; not those of a scale's merges."""
    if isinstance(payload, Rebased):
        return Rebased({path: do(t) for path, t in payload.shift.items()})
    if isinstance(payload, SparseDelta):
        values = {path: do(v) for path, v in payload.values.items()}
        return dataclasses.replace(payload, values=values)
    if isinstance(payload, MaskedScale):
        names = ("alpha", "beta", "change")
        done = {n: {p: do(t) for p, t in getattr(payload, n).items()} for n in names}
        return dataclasses.replace(payload, **done)
    if isinstance(payload, CorePayload):
        return with_tensors(payload, do)
    each = {p: Factors(do(f.a), do(f.b), f.alpha) for p, f in payload.items()}
    return LowRankPayload(each, as_payload(payload).indices)


def _in(precision: Precision, state: State) -> State:
    """A first state in the precision of what clients send: it is float32 itself."""
    wide = precision.dtype
    return {k: t.to(wide) if t.dtype == torch.float32 else t for k, t in state.items()}


def after_rounds(
    strategy: LoRAStrategy,
    population: Setting,
    seed: int,
    rounds: int = 1,
    precision: Precision = DOUBLE,
) -> tuple[State, list[Update]]:
    """A state some rounds in, and the updates of one more round; copies, so that a law may do with
    them what it likes."""
    state = _state_after(strategy, population, seed, rounds, precision)
    updates = _one_more_round(strategy, population, seed, rounds, precision)
    return _copied(state), [_update_copied(u) for u in updates]


def _copied(state: State) -> State:
    return {name: t.clone() for name, t in state.items()}


def _update_copied(update: Update) -> Update:
    if isinstance(update.payload, MaskedScale):  # its merges too
        return dataclasses.replace(update, payload=deepcopy(update.payload))
    return dataclasses.replace(update, payload=_each(update.payload, Tensor.clone))


@lru_cache(maxsize=64)  # most laws look at the same rounds of one strategy
def _state_after(
    strategy: LoRAStrategy, population: Setting, seed: int, rounds: int, precision: Precision
) -> State:
    if not rounds:
        return _in(precision, strategy.init_state(population))
    state = _copied(_state_after(strategy, population, seed, rounds - 1, precision))
    updates = cohort(strategy, state, population, seed + 17 * (rounds - 1), precision)
    return strategy.aggregate(state, updates)


@lru_cache(maxsize=64)
def _one_more_round(
    strategy: LoRAStrategy, population: Setting, seed: int, rounds: int, precision: Precision
) -> list[Update]:
    state = _copied(_state_after(strategy, population, seed, rounds, precision))
    return cohort(strategy, state, population, seed + 1, precision)


def kept_by(
    strategy: LoRAStrategy, state: State, updates: Sequence[Update]
) -> dict[int, Kept | None]:
    """What each client keeps after a round that was its first."""
    return {
        u.client.id: strategy.kept(
            state, u.client, None, as_payload(strategy.client_start(state, u.client)), u
        )
        for u in updates
    }


def effects(
    strategy: LoRAStrategy,
    state: State,
    population: Setting,
    kept: Mapping[int, Kept | None] = MappingProxyType({}),
) -> list[dict[str, Tensor]]:
    """What each client's start adds to the base weights."""
    return [
        dense(strategy.client_start(state, strategy.enlist(state, c), kept.get(c.id)))
        for c in population.clients
    ]


def close(
    got: Tensor, want: Tensor, tolerance: float = DOUBLE.tolerance, what: str = "tensors"
) -> None:
    """``||got - want||_F <= tolerance ||want||_F``."""
    assert got.shape == want.shape, f"{what}: shapes {tuple(got.shape)} and {tuple(want.shape)}"
    error, norm = float((got.double() - want.double()).norm()), float(want.double().norm())
    assert error <= tolerance * norm, f"{what}: error {error:.3g} of norm {norm:.3g}"


def assert_close(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], precision: Precision, what: str
) -> None:
    assert list(got) == list(want), f"{what}: modules {list(got)} and {list(want)}"
    for path, w in want.items():
        close(got[path], w, precision.tolerance, f"{what}: {path}")


def assert_same(a: Payload, b: Payload, what: str) -> None:
    """Bit by bit."""
    left, right = dict(as_payload(a).tensors()), dict(as_payload(b).tensors())
    assert list(left) == list(right), f"{what}: {list(left)} and {list(right)}"
    for name, t in left.items():
        assert torch.equal(t, right[name]), f"{what}: {name}"


def weights(strategy: LoRAStrategy, round: int) -> str:
    """What an average weights clients by in this round, counted from 1."""
    if hasattr(strategy, "aggregator") and getattr(strategy, "stage1_rounds", 0) < round:
        return weights(strategy.aggregator, round)
    declared = str(getattr(strategy, "weights", "examples"))
    if declared not in ("examples", "uniform"):
        return declared
    return {1: "uniform", 3: "examples"}.get(_share(strategy), OWN)


OWN = "of its own"


@cache
def _share(strategy: LoRAStrategy) -> float:
    """How much more a client counts in an average whose update counts for three times as many
    examples: a method may override the hook."""
    population = population_for(strategy)
    one = cohort(strategy, strategy.init_state(population), population, 1)[0]
    less, more = strategy.reference_weights(
        [one, dataclasses.replace(one, num_examples=3 * one.num_examples)]
    )
    return round(more / less, 9)


def _untrained(strategy: LoRAStrategy, state: State, client: Client) -> Payload:
    start = strategy.client_start(state, client)
    factors = start.factors if isinstance(start, Rebased) else start
    return answer(start, factors, strategy.plan(state, client, PLAN))


def everything(
    strategy: LoRAStrategy, state: State, population: Setting
) -> list[tuple[str, Payload]]:
    """Every payload that a state can give."""
    out = [("global", strategy.global_update(state))]
    for c in population.clients:
        e = strategy.enlist(state, c)
        out.append((f"start of {c.id}", strategy.client_start(state, e)))
        out.append((f"global at {c.id}", strategy.global_update(state, e.ranks)))
    return out


# ---------------------------------------------------------------------------------------- laws


def client_order_does_not_matter(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    population = population_for(strategy)
    state, updates = after_rounds(strategy, population, seed, precision=precision)
    shuffled = random.Random(seed).sample(updates, len(updates))
    one, other = (strategy.aggregate(state, u) for u in (updates, shuffled))
    kept = kept_by(strategy, state, updates)
    for x, y in zip(
        effects(strategy, one, population, kept),
        effects(strategy, other, population, kept),
        strict=True,
    ):
        assert_close(x, y, precision, "another order")


def a_lone_client_gets_its_update_back(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    population = population_for(strategy)
    state = _in(precision, strategy.init_state(population))
    for update in cohort(strategy, state, population, seed, precision):
        after = strategy.aggregate(state, [update])
        client = strategy.enlist(after, population.clients[update.client.id])
        kept = kept_by(strategy, state, [update])[client.id]
        back = dense(strategy.client_start(after, client, kept))
        sent = reached(strategy, state, update)
        assert_close(back, sent, precision, f"lone client {client.id}")


Effects = list[dict[str, Tensor]]


def whole_and_split(
    strategy: LoRAStrategy, seed: int, precision: Precision
) -> tuple[Effects, Effects]:
    """Starts after one client took part, and after two took part that hold half of it each."""
    population = population_for(strategy)
    state, updates = after_rounds(strategy, population, seed, precision=precision)
    whole = dataclasses.replace(updates[0], num_examples=40)
    halves = [dataclasses.replace(updates[0], num_examples=n) for n in (25, 15)]
    one, two = (strategy.aggregate(state, [*k, *updates[1:]]) for k in ([whole], halves))
    kept = kept_by(strategy, state, updates)
    return effects(strategy, one, population, kept), effects(strategy, two, population, kept)


def splitting_a_client_in_two_changes_nothing(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    for x, y in zip(*whole_and_split(strategy, seed, precision), strict=True):
        assert_close(y, x, precision, "a split client")


def splitting_a_client_in_two_doubles_its_vote(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """The other half: weights that do not see how much data is behind an update."""
    for x, y in zip(*whole_and_split(strategy, seed, precision), strict=True):
        for path, w in x.items():
            change = float((y[path] - w).norm() / w.norm())
            assert change > 1e-3, f"a split client changes {path} by {change:.3g}"


def examples_are_what_is_averaged(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Where nothing is lost (equal ranks, equal A), the result is the mean per example."""
    population = population_for(strategy, ("T4", "T4", "T4"))
    state = _in(precision, strategy.init_state(population))
    updates = cohort(strategy, state, population, seed, precision)
    first = updates[0].payload
    start = strategy.client_start(state, updates[0].client)
    if isinstance(first, MaskedScale):
        updates = [_with_alpha(u, first) for u in updates]
    elif isinstance(start, Mapping):
        assert isinstance(first, Mapping)
        updates = [
            dataclasses.replace(
                u,
                payload=LowRankPayload(
                    {p: Factors(first[p].a, f.b, f.alpha) for p, f in u.adapter.items()}
                ),
            )
            for u in updates
        ]
    after = strategy.aggregate(state, updates)
    total = sum(u.num_examples for u in updates)
    parts = [
        {p: u.num_examples / total * d for p, d in reached(strategy, state, u).items()}
        for u in updates
    ]
    mean = {p: sum((part[p] for part in parts[1:]), parts[0][p]) for p in parts[0]}
    for got in effects(strategy, after, population):
        assert_close(got, mean, precision, "mean per example")


def _with_alpha(update: Update, first: MaskedScale) -> Update:
    """The same beta on the first client's alpha."""
    assert isinstance(update.payload, MaskedScale)
    return dataclasses.replace(update, payload=dataclasses.replace(first, beta=update.payload.beta))


def inputs_are_not_touched(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Neither changed nor aliased."""
    population = population_for(strategy)
    state, updates = after_rounds(strategy, population, seed, precision=precision)
    copies = {k: t.clone() for k, t in state.items()}
    sent = [{n: t.clone() for n, t in as_payload(u.payload).tensors()} for u in updates]
    after = strategy.aggregate(state, updates)
    everything(strategy, after, population)
    everything(strategy, state, population)
    assert list(copies) == list(state), "the state's names changed"
    for key, t in state.items():
        assert torch.equal(copies[key], t), f"{key} of the state changed"
    storage = {t.untyped_storage().data_ptr() for t in after.values() if t.numel()}
    for update, before in zip(updates, sent, strict=True):
        for name, t in as_payload(update.payload).tensors():
            assert torch.equal(before[name], t), f"{name} of an update changed"
            aliased = t.numel() and t.untyped_storage().data_ptr() in storage
            assert not aliased, f"the state aliases {name} of client {update.client.id}"


def hooks_are_pure(strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE) -> None:
    population = population_for(strategy)
    state, updates = after_rounds(strategy, population, seed, precision=precision)
    first, second = (strategy.aggregate(state, updates) for _ in range(2))
    assert list(first) == list(second)
    for key, t in first.items():
        assert torch.equal(t, second[key]), f"{key} differs between two calls"
    for (name, x), (_, y) in zip(
        everything(strategy, first, population),
        everything(strategy, first, population),
        strict=True,
    ):
        assert_same(x, y, name)
    for c in population.clients:
        assert strategy.enlist(first, c) == strategy.enlist(first, c)
        assert strategy.plan(first, c, PLAN) == strategy.plan(first, c, PLAN)


def a_state_is_a_complete_checkpoint(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Through safetensors bytes and back, bit by bit, and so is the round after it."""
    population = population_for(strategy)
    for rounds in (0, 1, 2):
        state, updates = after_rounds(strategy, population, seed, rounds, precision)
        loaded = safetensors.torch.load(safetensors.torch.save(dict(state)))
        pairs = (state, loaded), tuple(strategy.aggregate(s, updates) for s in (state, loaded))
        for one, other in pairs:
            for (name, x), (_, y) in zip(
                everything(strategy, one, population),
                everything(strategy, other, population),
                strict=True,
            ):
                assert_same(x, y, f"{name} after loading round {rounds}")
            for c in population.clients:
                assert strategy.enlist(one, c) == strategy.enlist(other, c)
                assert strategy.plan(one, c, PLAN) == strategy.plan(other, c, PLAN)


def no_direction_is_dead(strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE) -> None:
    """A generic loss has a gradient for every rank index of every start, at every rank."""
    population = population_for(strategy)
    state = strategy.init_state(population)
    states = [state]
    moved = cohort(strategy, state, population, seed, precision)
    still = [dataclasses.replace(u, payload=_untrained(strategy, state, u.client)) for u in moved]
    smallest = [u for u in moved if u.client.ranks == moved[0].client.ranks]
    states += [strategy.aggregate(state, u) for u in (moved, still, moved[:1], smallest)]
    second = cohort(strategy, states[1], population, seed + 1, precision)
    states.append(strategy.aggregate(states[1], second))
    for i, s in enumerate(states):
        for c in population.clients:
            payload = strategy.client_start(s, strategy.enlist(s, c))
            if isinstance(payload, Rebased):
                payload = payload.factors
            if isinstance(payload, Mapping):
                _assert_alive(payload, f"state {i}, client {c.id}")
            if isinstance(payload, CorePayload):
                _assert_core_alive(payload, f"state {i}, client {c.id}")


def _assert_alive(adapter: Mapping[str, Factors], what: str) -> None:
    for path, f in adapter.items():
        g = torch.randn(
            f.b.shape[0], f.a.shape[1], generator=torch.Generator().manual_seed(1)
        ).double()
        of_b = f.scale * g @ f.a.double().T  # [d_out, r]
        of_a = f.scale * f.b.double().T @ g  # [r, d_in]
        alive = of_b.norm(dim=0) + of_a.norm(dim=1)
        assert bool((alive > 1e-6).all()), f"{what}: {path} has a dead direction: {alive.tolist()}"


def _assert_core_alive(payload: CorePayload, what: str) -> None:
    """Every entry of every block has a gradient, ``s Uᵀ G Vᵀ``, whatever the blocks are."""
    made = payload.parametrisation(torch.float64, torch.device("cpu"))
    values = {name: t.clone().requires_grad_() for name, t in made.start.items()}
    g = torch.Generator().manual_seed(1)
    for path, f in made.factors(values).items():
        delta = f.delta()
        (delta * torch.randn(delta.shape, generator=g, dtype=delta.dtype)).sum().backward()
        for name, t in values.items():
            if name.startswith(f"{path}/core"):
                assert t.grad is not None and bool((t.grad.abs() > 1e-9).all()), f"{what}: {name}"


def starts_have_the_ranks_of_their_clients(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    population = population_for(strategy)
    for rounds in (0, 1, 2):
        state, _ = after_rounds(strategy, population, seed, rounds, precision)
        for c in population.clients:
            e = strategy.enlist(state, c)
            whole = strategy.global_update(state, e.ranks)
            payloads = [strategy.client_start(state, e)]
            if strategy.plan(state, e, PLAN).choice is not None:
                _assert_room_to_choose(e, payloads[0], whole)
                continue
            if isinstance(whole, Rebased) and not whole.factors:
                exact = strategy.global_update(state)  # dense: nothing is cut for any rank
                assert dict(whole.tensors()).keys() == dict(exact.tensors()).keys()
                for (name, t), (_, due) in zip(whole.tensors(), exact.tensors(), strict=True):
                    assert torch.equal(t, due), f"{name} depends on the rank {e.ranks}"
            else:
                payloads.append(whole)
            for payload in payloads:
                if isinstance(payload, Rebased):
                    got = Ranks({p: f.rank for p, f in payload.factors.items()})
                    assert got == e.ranks, f"client {c.id} of {e.ranks} got {got}"
                elif isinstance(payload, CorePayload):
                    got = Ranks({p: core.rank for p, core in payload.cores.items()})
                    assert got == e.ranks, f"client {c.id} of {e.ranks} got {got}"
                elif isinstance(payload, Mapping):
                    got = Ranks({p: f.rank for p, f in payload.items()})
                    assert got == e.ranks, f"client {c.id} of {e.ranks} got {got}"
                    assert all(f.alpha == population.alpha for f in payload.values())


def _assert_room_to_choose(client: Client, start: Payload, whole: Payload) -> None:
    """A client that chooses its rank indices starts from the global factors, at no smaller rank."""
    assert isinstance(start, Mapping)
    assert_same(start, whole, f"start of client {client.id}, which chooses")
    for path, rank in client.ranks.items():
        assert start[path].rank >= rank, f"client {client.id}: {path} has rank {start[path].rank}"


def unequal_ranks_are_applied(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Clients that hold unequal ranks get payloads of unequal size."""
    population = population_for(strategy)
    for rounds in (0, 1):
        state, _ = after_rounds(strategy, population, seed, rounds, precision)
        sizes = {
            c.tier: sum(
                t.numel()
                for _, t in as_payload(
                    strategy.client_start(state, strategy.enlist(state, c))
                ).tensors()
            )
            for c in population.clients
        }
        assert sizes["T1"] < sizes["T2"] < sizes["T3"] < sizes["T4"], f"payload sizes {sizes}"


def equal_variants_start_alike(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """A start and a plan depend on a client by its variant alone: others may share them."""
    population = population_for(strategy)
    state, _ = after_rounds(strategy, population, seed, precision=precision)
    for c in population.clients:
        e = strategy.enlist(state, c)
        others = [
            Client(id=99, ranks=e.ranks, num_examples=1),
            Client(id=e.id, ranks=e.ranks, num_examples=e.num_examples + 1),
        ]
        variant = strategy.variant(state, e)
        twins = [o for o in others if strategy.variant(state, o) == variant]
        assert twins, f"a variant of {variant} depends on what a client holds, not on who it is"
        for twin in twins:
            one, two = strategy.client_start(state, e), strategy.client_start(state, twin)
            assert_same(one, two, "a twin")
            assert strategy.plan(state, e, PLAN) == strategy.plan(state, twin, PLAN)


def training_is_not_forgotten(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """After a round every client starts from something else than before it."""
    population = population_for(strategy)
    state = strategy.init_state(population)
    updates = cohort(strategy, state, population, seed, precision)
    after = strategy.aggregate(state, updates)
    kept = kept_by(strategy, state, updates)
    for before, now in zip(
        effects(strategy, state, population),
        effects(strategy, after, population, kept),
        strict=True,
    ):
        moved = sum(float((now[path].double() - d.double()).norm()) for path, d in before.items())
        assert moved > 1e-3, "a client starts from what it started from before"


def everything_is_finite_when_nobody_trains(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    population = population_for(strategy)
    state = strategy.init_state(population)
    for _ in range(3):
        updates = []
        for client in population.clients:
            c = strategy.enlist(state, client)
            start = _untrained(strategy, state, c)
            updates.append(Update(c, start, c.num_examples, METRICS))
        state = strategy.aggregate(state, updates)
        for name, payload in everything(strategy, state, population):
            for key, t in as_payload(payload).tensors():
                assert bool(torch.isfinite(t).all()), f"{name}: {key}"


def everybody_has_one_mask(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """What a client is told to scale, and what the server holds, is the base that was pruned."""
    population = population_for(strategy)
    state, _ = after_rounds(strategy, population, seed, precision=precision)
    for name, payload in everything(strategy, state, population):
        mask = getattr(payload, "mask", "none")
        assert mask == population.mask, f"{name}: mask {mask}, the base has {population.mask}"


def a_pruned_base_keeps_its_zeros(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Whatever is merged, and in whatever number format: no zero is filled and none is made."""
    population = population_for(strategy)
    g = torch.Generator().manual_seed(seed)
    base = {
        m.path: torch.randn(m.d_out, m.d_in, generator=g)
        * (torch.rand(m.d_out, m.d_in, generator=g) < 0.5)
        for m in population.modules
    }
    state, _ = after_rounds(strategy, population, seed, rounds=2, precision=precision)
    for name, payload in everything(strategy, state, population):
        for path, effect in dense(payload).items():
            w = base[path].to(effect.dtype)
            merged = w * (1 + effect) if isinstance(payload, MaskedScale) else w + effect
            moved = int(((merged.float() == 0) != (w == 0)).sum())
            assert moved == 0, f"{name}: {moved} zeros of {path} have moved"


def what_is_not_sent_is_not_read(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Garbage in factors that stay with their clients, or that the round has frozen, or in rank
    indices that a client has not chosen, changes no state and no summand."""
    population = population_for(strategy)
    for rounds in (0, 1, 2):
        state, updates = after_rounds(strategy, population, seed, rounds, precision)
        spoilt = [
            dataclasses.replace(u, payload=_spoilt(u.payload, unsent(strategy, state, u.client)))
            for u in updates
        ]
        one, other = (strategy.aggregate(state, u) for u in (updates, spoilt))
        for key, t in one.items():
            assert torch.equal(t, other[key]), f"{key} of the state depends on it"
        summands = (added(strategy, state, u) for u in (updates, spoilt))
        for x, y in zip(*summands, strict=True):
            for name, t in x.items():
                same = torch.equal(summand.dense(t), summand.dense(y[name]))
                assert same, f"{name} depends on it"


def unsent(strategy: LoRAStrategy, state: State, client: Client) -> str:
    """The factors of an update that do not leave its client: its own, and those that its plan
    freezes."""
    return "".join(sorted({*strategy.private, *frozen(strategy, state, client)}))


def frozen(strategy: LoRAStrategy, state: State, client: Client) -> str:
    """The factors that the plan of an enlisted client freezes, of those that it starts from."""
    if not _start_factors(strategy, state, client):
        return ""
    plan = strategy.plan(state, client, PLAN)
    return "a" * (not plan.train_a) + "b" * (not plan.train_b)


def _start_factors(strategy: LoRAStrategy, state: State, client: Client) -> Mapping[str, Factors]:
    """The factors that an enlisted client starts from, over whatever base; empty: it has none."""
    start = strategy.client_start(state, client)
    if isinstance(start, Rebased):
        return start.factors
    return start if isinstance(start, Mapping) else {}


def a_frozen_factor_is_the_same_for_all(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Clients of a smaller rank hold the first rows or columns of what the largest rank holds, so
    that products with it can be averaged factor by factor. The scale is part of B."""
    population = population_for(strategy)
    for rounds in (0, 1, 2, 3):
        state, _ = after_rounds(strategy, population, seed, rounds, precision)
        clients = [strategy.enlist(state, c) for c in population.clients]
        largest = max(clients, key=lambda c: sum(c.ranks.values()))
        whole = _start_factors(strategy, state, largest)
        for c in clients:
            names, mine = frozen(strategy, state, c), _start_factors(strategy, state, c)
            assert names == frozen(strategy, state, largest), f"client {c.id} freezes {names}"
            for path, f in mine.items() if names else ():
                w, what = whole[path], f"round {rounds}, client {c.id}: {path}"
                if "a" in names:
                    assert torch.equal(f.a, w.a[: f.rank]), f"{what}: A differs"
                if "b" in names:
                    want = w.scale * w.b[:, : f.rank]
                    close(f.scale * f.b, want, precision.tolerance, f"{what}: B")


def _spoilt(payload: Payload, names: str) -> LowRankPayload:
    indices, found = as_payload(payload).indices, {}
    for path, f in payload.items():
        f = dataclasses.replace(f, **{n: 7 - 3 * getattr(f, n) for n in names})
        out = [] if indices is None else [i for i in range(f.rank) if i not in indices[path]]
        a, b = f.a.clone(), f.b.clone()
        a[out], b[:, out] = 7 - 3 * a[out], 7 - 3 * b[:, out]
        found[path] = Factors(a, b, f.alpha)
    return LowRankPayload(found, indices)


def what_trains_makes_the_start(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """A start whose parametrisation trains in place of its factors: the first values make those
    factors and its own tensors, bit for bit, and what is no function of them is the same for all
    clients, as far as their ranks go."""
    population = population_for(strategy)
    for rounds in (0, 1, 2):
        state, _ = after_rounds(strategy, population, seed, rounds, precision)
        clients = [strategy.enlist(state, c) for c in population.clients]
        widest = max(clients, key=lambda c: sum(c.ranks.values()))
        common = as_payload(strategy.client_start(state, widest)).low_rank()
        for c in clients:
            start = as_payload(strategy.client_start(state, c))
            made = start.parametrisation(precision.dtype, torch.device("cpu"))
            if made is None:
                continue
            assert_same(start.retrained(made.start), start, f"round {rounds}, client {c.id}")
            values = {name: t.clone().requires_grad_() for name, t in made.start.items()}
            due = start.low_rank()
            assert due is not None and common is not None
            for path, f in made.factors(values).items():
                what = f"round {rounds}, client {c.id}: {path}"
                assert f.alpha == due[path].alpha, what
                assert torch.equal(f.a, due[path].a) and torch.equal(f.b, due[path].b), what
                if not f.a.requires_grad:
                    assert torch.equal(f.a, common[path].a[: f.rank]), f"{what}: A differs"
                assert f.a.requires_grad or f.b.requires_grad, f"{what}: nothing trains"


def what_trains_is_all_that_is_sent(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Every byte of such a start and of such an update is a tensor of the payload, and neither is
    larger than what trains: no fixed factor is sent."""
    population = population_for(strategy)
    for rounds in (0, 1, 2):
        state, updates = after_rounds(strategy, population, seed, rounds, precision)
        for u in updates:
            asked = job(strategy, state, u.client)
            made = asked.start.parametrisation(precision.dtype, torch.device("cpu"))
            if made is None:
                continue
            held = 4 * sum(t.numel() for _, t in asked.start.tensors())
            down = strategy.bytes_down(state, asked, "float32")
            what = f"round {rounds}, client {u.client.id}"
            assert down == (held if rounds else 0), f"{what}: {down} bytes down, it holds {held}"
            up = strategy.bytes_up(state, u, asked.plan, "float32")
            sent = encode_payload(u.payload)[0].nbytes
            assert up == sent, f"{what}: {up} bytes up, it sends {sent}"
            trains = 4 * sum(t.numel() for t in made.start.values())
            assert max(down, up) <= trains, f"{what}: {down} down, {up} up, of {trains} trained"


def the_model_is_the_mean_of_its_clients(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """``Σ_k p_k s_k B_k A_k``, at equal ranks, with whatever factors the round trains."""
    population = population_for(strategy, ("T4", "T4", "T4"))
    for rounds in (0, 1, 2):
        state, updates = after_rounds(strategy, population, seed, rounds, precision)
        p = normalize(strategy.reference_weights(updates))
        mean = _weighted([reached(strategy, state, u) for u in updates], p)
        before, after = _models(strategy, state, updates)
        if type(before) is type(after):  # else it goes on with another kind of update
            got = {path: dense(after)[path] for path in mean}  # of a split, what clients hold
            assert_close(got, mean, precision, f"round {rounds}: mean of the clients' models")


def the_model_moves_by_the_mean_of_changes(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """At unequal ranks: by what the clients' models have moved by, whatever their starts lack."""
    population = population_for(strategy)
    for rounds in (0, 1, 2):
        state, updates = after_rounds(strategy, population, seed, rounds, precision)
        before, after = _models(strategy, state, updates)
        if not added(strategy, state, updates) or type(before) is not type(after):
            continue
        p = normalize(strategy.reference_weights(updates))
        ended = _weighted([reached(strategy, state, u) for u in updates], p)
        began = _weighted([dense(strategy.client_start(state, u.client)) for u in updates], p)
        want = {path: dense(before)[path] + d - began[path] for path, d in ended.items()}
        got = {path: dense(after)[path] for path in want}
        assert_close(got, want, precision, f"round {rounds}: mean of the clients' changes")


def _models(
    strategy: LoRAStrategy, state: State, updates: Sequence[Update]
) -> tuple[Payload, Payload]:
    """The global model before and after a round."""
    return strategy.global_update(state), strategy.global_update(strategy.aggregate(state, updates))


def _weighted(parts: Sequence[dict[str, Tensor]], p: Sequence[float]) -> dict[str, Tensor]:
    scaled = [
        {k: w * t.double() for k, t in part.items()} for w, part in zip(p, parts, strict=True)
    ]
    return {k: sum((x[k] for x in scaled[1:]), scaled[0][k]) for k in scaled[0]}


def idle_clients_leave_the_model(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Clients of equal rank that send what they were sent."""
    _leave_the_model(strategy, population_for(strategy, ("T4", "T4", "T4")), seed, precision)


def idle_clients_of_unequal_rank_leave_the_model(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """What only few clients hold does not fade while nobody moves it."""
    _leave_the_model(strategy, population_for(strategy), seed, precision)


def _leave_the_model(
    strategy: LoRAStrategy, population: Setting, seed: int, precision: Precision
) -> None:
    for rounds in (1, 2):
        state, updates = after_rounds(strategy, population, seed, rounds, precision)
        still = [
            dataclasses.replace(u, payload=_untrained(strategy, state, u.client)) for u in updates
        ]
        before, after = _models(strategy, state, still)
        if type(before) is type(after):
            assert_close(dense(after), dense(before), precision, f"round {rounds}")


def what_is_counted_down_is_what_a_client_lacks(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """A client that keeps what it was sent lacks the factors of its start that have changed since;
    in the beginning it has what follows from the seed. Never less is counted, and no more by
    methods that remember who took part."""
    population = population_for(strategy)
    state = strategy.init_state(population)
    has = {c.id: _named(strategy, state, c) for c in population.clients}
    for t in range(7):
        takes_part = [c for c in population.clients if not (c.id * (t + seed) + t) % 3]
        for c in population.clients:
            asked = dataclasses.replace(job(strategy, state, c), seed=population.seed)
            mine = _named(strategy, state, c)
            lacks = sum(x.numel() for name, x in mine.items() if _other(has[c.id].get(name), x))
            counted = strategy.bytes_down(state, asked, "float32")
            what = f"round {t}, client {c.id} lacks {4 * lacks} bytes and is counted {counted}"
            assert counted >= 4 * lacks, what
            assert counted == 4 * lacks or SEEN not in state, what
            if c in takes_part:
                has[c.id] = mine
        if takes_part:
            some = dataclasses.replace(population, clients=tuple(takes_part))
            updates = cohort(strategy, state, some, seed + t, precision)
            state = strategy.aggregate(state, updates)


def _named(strategy: LoRAStrategy, state: State, client: Client) -> dict[str, Tensor]:
    """The factors that a client is sent, by name."""
    factors = _start_factors(strategy, state, strategy.enlist(state, client))
    return {name: t for name, t in pack(factors).items() if name[-1] not in strategy.private}


def _other(held: Tensor | None, sent: Tensor) -> bool:
    """Whether a client has something else."""
    return held is None or held.shape != sent.shape or bool((held != sent).any())


def is_frozen_and_names_its_source(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    cls = type(strategy)
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} is no dataclass"
    params = cls.__dataclass_params__  # type: ignore[attr-defined]
    assert params.frozen, f"{cls.__name__} is not frozen"
    if cls.__module__.startswith("strategies."):
        text = importlib.import_module(cls.__module__).__doc__ or ""
        assert "arXiv:" in text, f"{cls.__module__} names no source"


# ------------------------------------------------------------------- laws of what clients add

DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "uniform": ("T1", "T2", "T3", "T4", "T1", "T4"),
    "heavy_tail_light": ("T1", "T1", "T1", "T1", "T4"),
    "heavy_tail_strong": ("T4", "T4", "T4", "T4", "T1"),
    "normal": ("T2", "T3", "T3", "T2", "T1", "T4"),
    "homogeneous": ("T3", "T3", "T3"),
}
"""Tiers of small populations, as the files under conf/ranks distribute them."""


def added(strategy: LoRAStrategy, state: State, updates: Sequence[Update]) -> list[Summands]:
    """What each client adds; empty where the method needs the updates themselves."""
    found = []
    for u in updates:
        x = strategy.adds(state, strategy.client_start(state, u.client), u)
        if x is None:
            return []
        found.append(x)
    return found


def _summing(
    strategy: LoRAStrategy, seed: int, precision: Precision, rounds: Sequence[int] = (0, 1, 2)
) -> Iterator[tuple[str, Setting, State, list[Update], list[Summands]]]:
    """Every rank distribution, some rounds in, where the next state needs a sum alone; with what
    its clients add."""
    for name, tiers in DISTRIBUTIONS.items():
        population = population_for(strategy, tiers)
        for t in rounds:
            state, updates = after_rounds(strategy, population, seed, t, precision)
            if terms := added(strategy, state, updates):
                yield f"{name}, round {t}", population, state, updates, terms


def says_whether_sums_are_enough(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """What needs no updates always says what clients add; what does names a way out."""
    population = population_for(strategy)
    if strategy.needs_updates:
        assert "choose" in strategy.needs_updates
        return
    for rounds in (0, 1, 2):
        state, updates = after_rounds(strategy, population, seed, rounds, precision)
        assert added(strategy, state, updates), f"round {rounds}: it does not say what clients add"


def absorbing_the_sum_is_aggregating(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """``aggregate(s, U) = absorb(s, Σ w adds, Σ w)``."""
    for what, population, state, updates, terms in _summing(strategy, seed, precision):
        w = strategy.reference_weights(updates)
        absorbed = strategy.absorb(state, summand.total(terms, w), math.fsum(w))
        aggregated = strategy.aggregate(state, updates)
        assert absorbed.keys() == aggregated.keys(), f"{what}: states of other names"
        one, other = (strategy.global_update(s) for s in (absorbed, aggregated))
        assert_close(dense(one), dense(other), precision, what)
        for x, y in zip(
            effects(strategy, absorbed, population),
            effects(strategy, aggregated, population),
            strict=True,
        ):
            assert_close(x, y, precision, f"{what}: starts")


def who_did_not_move_adds_nothing(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Exactly zero, in the sum as well."""
    for what, _, state, updates, _ in _summing(strategy, seed, precision):
        still = [
            dataclasses.replace(u, payload=_untrained(strategy, state, u.client)) for u in updates
        ]
        for u, x in zip(still, added(strategy, state, still), strict=True):
            for name, t in x.items():
                assert not bool(summand.dense(t).any()), f"{what}: client {u.client.id} adds {name}"
            assert summand.norm(x) == 0, f"{what}: client {u.client.id} adds something"


def absorbing_nothing_changes_nothing(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """As a product. Where a round hands over to another kind of update (SLoRA's last sparse round),
    the new kind holds what it can."""
    for what, _, state, _, terms in _summing(strategy, seed, precision, rounds=(1, 2)):
        nothing = summand.scaled(summand.total(terms, [0.0] * len(terms)), 0.0)
        after = strategy.absorb(state, nothing, 3.0)
        before, now = strategy.global_update(state), strategy.global_update(after)
        if type(before) is type(now):
            assert_close(dense(now), dense(before), precision, what)


def summands_do_not_show_ranks(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Names and shapes are those of every other client. A client of a secure sum, which is sent a
    part of the state, adds the same."""
    for what, _, state, updates, terms in _summing(strategy, seed, precision, rounds=(1,)):
        shapes = [{name: tuple(t.shape) for name, t in x.items()} for x in terms]
        assert all(s == shapes[0] for s in shapes), f"{what}: {shapes}"
        start = strategy.client_start(state, updates[0].client)
        own = strategy.adds(strategy.adds_state(state), start, updates[0])
        assert own is not None
        for name, t in _tensors(own).items():
            assert torch.equal(t, _tensors(terms[0])[name]), f"{what}: {name} at the client"


def summands_have_the_norm_of_dense_ones(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    tolerance = max(1e-10, precision.tolerance)
    for what, _, _, _, terms in _summing(strategy, seed, precision, rounds=(1,)):
        for x in terms:
            whole = summand.norm({name: summand.dense(t).double() for name, t in x.items()})
            assert abs(summand.norm(x) - whole) <= tolerance * whole, what


def order_of_summands_does_not_matter(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    for what, population, state, updates, terms in _summing(strategy, seed, precision, rounds=(1,)):
        results = []
        pairs = list(zip(updates, terms, strict=True))
        for order in (pairs, random.Random(seed).sample(pairs, len(pairs))):
            w = strategy.reference_weights([u for u, _ in order])
            total = summand.total([x for _, x in order], w)
            results.append(effects(strategy, strategy.absorb(state, total, sum(w)), population))
        for x, y in zip(*results, strict=True):
            assert_close(x, y, precision, f"{what}: another order")


def adding_and_absorbing_are_pure(
    strategy: LoRAStrategy, seed: int, precision: Precision = DOUBLE
) -> None:
    """Nothing is changed, nothing of the sum is in the state, and the same comes twice."""
    for what, _, state, updates, _ in _summing(strategy, seed, precision, rounds=(1,)):
        given = [state, *(dict(u.payload.tensors()) for u in updates)]
        copies = [{k: t.clone() for k, t in tensors.items()} for tensors in given]
        w = strategy.reference_weights(updates)
        total = summand.total(added(strategy, state, updates), w)
        parts = _tensors(total)
        before = {k: t.clone() for k, t in parts.items()}
        one, two = (strategy.absorb(state, total, sum(w)) for _ in range(2))
        for tensors, copy in zip([*given, parts], [*copies, before], strict=True):
            for name, t in tensors.items():
                assert torch.equal(t, copy[name]), f"{what}: {name} changed"
        assert all(torch.equal(t, two[k]) for k, t in one.items()), f"{what}: not the same twice"
        storage = {t.untyped_storage().data_ptr() for t in one.values() if t.numel()}
        for name, t in parts.items():
            assert t.untyped_storage().data_ptr() not in storage, f"{what}: the state has {name}"


def _tensors(summands: Summands) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, x in summands.items():
        found |= {f"{name}.b": x.b, f"{name}.a": x.a} if isinstance(x, Product) else {name: x}
    return found


Law = Callable[[LoRAStrategy, int, Precision], None]

LAWS: Sequence[Law] = (
    client_order_does_not_matter,
    a_lone_client_gets_its_update_back,
    splitting_a_client_in_two_changes_nothing,
    splitting_a_client_in_two_doubles_its_vote,
    examples_are_what_is_averaged,
    inputs_are_not_touched,
    hooks_are_pure,
    a_state_is_a_complete_checkpoint,
    no_direction_is_dead,
    starts_have_the_ranks_of_their_clients,
    unequal_ranks_are_applied,
    equal_variants_start_alike,
    training_is_not_forgotten,
    everything_is_finite_when_nobody_trains,
    everybody_has_one_mask,
    a_pruned_base_keeps_its_zeros,
    what_is_not_sent_is_not_read,
    a_frozen_factor_is_the_same_for_all,
    what_trains_makes_the_start,
    what_trains_is_all_that_is_sent,
    the_model_is_the_mean_of_its_clients,
    the_model_moves_by_the_mean_of_changes,
    idle_clients_leave_the_model,
    idle_clients_of_unequal_rank_leave_the_model,
    what_is_counted_down_is_what_a_client_lacks,
    is_frozen_and_names_its_source,
    says_whether_sums_are_enough,
    absorbing_the_sum_is_aggregating,
    who_did_not_move_adds_nothing,
    absorbing_nothing_changes_nothing,
    summands_do_not_show_ranks,
    summands_have_the_norm_of_dense_ones,
    order_of_summands_does_not_matter,
    adding_and_absorbing_are_pure,
)


def _shares(strategy: LoRAStrategy) -> str:
    return "" if strategy.shares else "its clients share nothing"


def _any_share(strategy: LoRAStrategy) -> str:
    if not strategy.shares:
        return ""
    found = weights(strategy, round=2)
    return "" if found in ("examples", "examples_sparsity") else f"its weights={found} ignore n_k"


def _no_share(strategy: LoRAStrategy) -> str:
    if not strategy.shares:
        return _shares(strategy)
    found = weights(strategy, round=2)
    return "" if _any_share(strategy) and found != OWN else f"its weights={found} follow n_k"


def _examples(strategy: LoRAStrategy) -> str:
    if strategy.private:
        return "the model of each of its clients is its own"
    if reason := strategy.beyond_average:
        return reason
    found = weights(strategy, round=1)
    return "" if found == "examples" else f"its weights={found} are not n_k"


def _unequal(strategy: LoRAStrategy) -> str:
    if strategy.technique is Scaling:
        return "its clients are all sent the common factors; ranks say what they train of them"
    if _chooses(strategy):
        return "its clients choose what they train of the common factors; ranks say how much"
    rule = getattr(strategy, "aggregator", strategy)
    if getattr(rule, "heterogeneous", "") == "smallest":
        return "all its clients train the smallest rank"
    return ""


@cache
def _chooses(strategy: LoRAStrategy) -> bool:
    """Whether some client chooses the rank indices that it trains."""
    population = population_for(strategy)
    state = strategy.init_state(population)
    clients = [strategy.enlist(state, c) for c in population.clients]
    return any(strategy.plan(state, c, PLAN).choice is not None for c in clients)


@cache
def _freezes(strategy: LoRAStrategy) -> str:
    population = population_for(strategy)
    state = strategy.init_state(population)
    client = strategy.enlist(state, population.clients[0])
    return "" if frozen(strategy, state, client) else "its clients train both factors"


@cache
def _trains_factors(strategy: LoRAStrategy) -> str:
    population = population_for(strategy)
    for rounds in (0, 2):  # SLoRA begins with another kind of update
        state, _ = after_rounds(strategy, population, 1, rounds)
        client = strategy.enlist(state, population.clients[0])
        start = as_payload(strategy.client_start(state, client))
        if start.parametrisation(torch.float64, torch.device("cpu")) is not None:
            return ""
    return "its clients train factors, or no function of them"


def _trains_factors_from_scratch(strategy: LoRAStrategy) -> str:
    if hasattr(strategy, "aggregator"):
        return "it begins with another kind of update"
    return _trains_factors(strategy)


def _unsent(strategy: LoRAStrategy) -> str:
    return "" if strategy.private else _freezes(strategy)


def _exact(strategy: LoRAStrategy) -> str:
    if _rule(strategy, "residual") == "carry":
        return "its residual=carry adds what no client holds"
    return _exact_changes(strategy)


def _exact_changes(strategy: LoRAStrategy) -> str:
    if strategy.private:
        return "the model of each of its clients is its own"
    return strategy.inexact or _stays(strategy)


def _exact_sums(strategy: LoRAStrategy) -> str:
    return _exact_changes(strategy) or _sums(strategy)


def _forgets(strategy: LoRAStrategy) -> str:
    """Why clients of one rank lose a part of the model when nobody trains."""
    if _rule(strategy, "residual") == "drop" and _rule(strategy, "train") == "both":
        return "its residual=drop forgets what a client's rank cannot hold"
    return strategy.beyond_average or _stays(strategy)


def _fades(strategy: LoRAStrategy) -> str:
    """The same for clients of several ranks."""
    if _rule(strategy, "residual") == "drop":
        return "its residual=drop forgets what a client's rank cannot hold"
    if _rule(strategy, "average") == "value":
        return "its average=value pads what a client's rank cannot hold with zeros"
    return strategy.beyond_average or _stays(strategy)


def _rule(strategy: LoRAStrategy, option: str) -> str:
    """An option of the rule by which a strategy averages; empty: it has no such option."""
    return str(getattr(getattr(strategy, "aggregator", strategy), option, ""))


def _plain(strategy: LoRAStrategy) -> str:
    population = population_for(strategy)
    state = strategy.init_state(population)
    start = strategy.client_start(state, strategy.enlist(state, population.clients[0]))
    return "" if isinstance(start, Mapping) else "its clients start from more than factors"


def _whole(strategy: LoRAStrategy) -> str:
    energy = getattr(strategy, "energy", 1.0)
    return "" if energy == 1 else f"it drops what is beyond {energy:g} of the energy"


def _whole_examples(strategy: LoRAStrategy) -> str:
    return _examples(strategy) or _whole(strategy)


def _pruned(strategy: LoRAStrategy) -> str:
    return "" if strategy.technique is Scaling else "its base need not be pruned"


@cache
def _sums(strategy: LoRAStrategy) -> str:
    population = population_for(strategy)
    for rounds in (0, 1, 2):
        if added(strategy, *after_rounds(strategy, population, 1, rounds)):
            return ""
    return "it needs its clients' updates, not their sum"


def _stays(strategy: LoRAStrategy) -> str:
    optimizer = getattr(strategy, "server_optimizer", NoServerOptimizer())
    if not isinstance(optimizer, NoServerOptimizer):
        return "its server optimizer moves on by itself"
    return ""


def _sums_and_stays(strategy: LoRAStrategy) -> str:
    return _stays(strategy) or _sums(strategy)


ABOUT: Mapping[Law, Callable[[LoRAStrategy], str]] = {
    a_lone_client_gets_its_update_back: lambda s: _whole(s) or s.beyond_average,
    splitting_a_client_in_two_changes_nothing: _any_share,
    splitting_a_client_in_two_doubles_its_vote: _no_share,
    examples_are_what_is_averaged: _whole_examples,
    unequal_ranks_are_applied: _unequal,
    everybody_has_one_mask: _pruned,
    a_pruned_base_keeps_its_zeros: _pruned,
    what_is_not_sent_is_not_read: _unsent,
    a_frozen_factor_is_the_same_for_all: _freezes,
    what_trains_makes_the_start: _trains_factors,
    what_trains_is_all_that_is_sent: _trains_factors_from_scratch,
    the_model_is_the_mean_of_its_clients: _exact,
    the_model_moves_by_the_mean_of_changes: _exact_sums,
    idle_clients_leave_the_model: _forgets,
    idle_clients_of_unequal_rank_leave_the_model: _fades,
    what_is_counted_down_is_what_a_client_lacks: _plain,
    absorbing_the_sum_is_aggregating: _sums,
    who_did_not_move_adds_nothing: _sums,
    absorbing_nothing_changes_nothing: _sums_and_stays,
    summands_do_not_show_ranks: _sums,
    summands_have_the_norm_of_dense_ones: _sums,
    order_of_summands_does_not_matter: _sums,
    adding_and_absorbing_are_pure: _sums,
}


def why_not(law: Law, strategy: LoRAStrategy) -> str:
    """Why a law is not about this strategy; empty: it is."""
    return ABOUT[law](strategy) if law in ABOUT else ""
