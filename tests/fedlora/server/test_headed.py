"""Heads beside any method of LoRA: averaged by the method's weights, or each client's own."""

import math
import random
from dataclasses import replace

import pytest
import torch

from fedlora.algebra.state import under
from fedlora.algebra.summand import total
from fedlora.core.errors import RejectedUpdate
from fedlora.core.types import Expected, LocalPlan, Update
from fedlora.models.headed import HEAD, WithHead
from fedlora.server.byte_account import ByteAccount
from fedlora.server.combine import unusable
from fedlora.server.headed import Headed
from fedlora.server.norm_bound import compare, move
from fedlora.server.training_round import same_payload, training_jobs
from fedlora.server.validation import check_update
from fedlora.techniques.lora.technique import LoRA
from fedlora.wire.codec import decode_payload, encode_payload
from tests.generators import setting, trained
from tests.strategies.laws import METRICS, answer
from tests.strategies.test_contract import NAMES, composed

HEADS = {"classifier.weight": (3, 5), "classifier.bias": (3,)}
PLAN = LocalPlan(lr=0.02)


def head(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=g, dtype=torch.float64) for n, shape in HEADS.items()}


def world(name: str = "fedit", mode: str = "averaged"):
    inner = composed(f"strategy={name}")
    if inner.technique is not LoRA or not inner.shares or name == "splitlora":
        pytest.skip(f"{inner.label} averages no factors of LoRA that stand beside a head")
    method = Headed(inner, head(0), mode)
    return method, method.init_state(setting())


def cohort(method, state, seed: int = 1) -> list[Update]:
    """What every client sends after some training of factors and head."""
    updates = []
    for client in setting().clients:
        c = method.enlist(state, client)
        start = method.client_start(state, c)
        moved = trained(start.update, 1000 * seed + c.id)
        payload = WithHead(
            answer(start.update, moved, method.plan(state, c, PLAN)),
            head(1000 * seed + c.id),
            start.travels,
        )
        updates.append(Update(c, payload, c.num_examples, METRICS))
    return updates


def bare(update: Update) -> Update:
    return replace(update, payload=update.payload.update)


def close(one, other) -> None:
    assert one.keys() == other.keys()
    for name, t in one.items():
        torch.testing.assert_close(t, other[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("mode", ["averaged", "local"])
@pytest.mark.parametrize("name", NAMES)
def test_the_inner_method_does_what_it_does_without_heads(name, mode):
    method, state = world(name, mode)
    plain = composed(f"strategy={name}")
    alone = plain.init_state(setting())
    for t in (1, 2):
        updates = cohort(method, state, t)
        state = method.aggregate(state, updates)
        alone = plain.aggregate(alone, [bare(u) for u in updates])
        assert state.keys() == {*alone, *(f"{HEAD}{n}" for n in HEADS)}
        assert all(torch.equal(state[k], x) for k, x in alone.items())
        found, wanted = method.global_update(state), plain.global_update(alone)
        assert same_payload(found.update, plain.technique.payload(wanted))


@pytest.mark.parametrize("name", NAMES)
def test_averaged_heads_are_the_weighted_mean_and_obey_its_laws(name):
    method, state = world(name)
    updates = cohort(method, state)
    weights = method.reference_weights(updates)
    after = under(method.aggregate(state, updates), HEAD)
    for n in HEADS:
        mean = sum(w * u.payload.values[n] for w, u in zip(weights, updates, strict=True))
        torch.testing.assert_close(after[n], mean / math.fsum(weights), rtol=1e-12, atol=1e-12)

    shuffled = random.Random(3).sample(updates, len(updates))
    close(under(method.aggregate(state, shuffled), HEAD), after)

    lone = method.aggregate(state, updates[2:3])
    assert all(torch.equal(lone[f"{HEAD}{n}"], updates[2].payload.values[n]) for n in HEADS)
    assert not unusable(method, lone)


def test_a_client_split_in_two_counts_as_one():
    method, state = world()
    updates = cohort(method, state)
    half = replace(updates[1], num_examples=5)
    rest = replace(updates[1], num_examples=updates[1].num_examples - 5)
    split = [updates[0], half, rest, *updates[2:]]
    close(method.aggregate(state, split), method.aggregate(state, updates))


@pytest.mark.parametrize("mode", ["averaged", "local"])
def test_adding_and_absorbing_is_aggregating(mode):
    method, state = world("fedit", mode)
    updates = cohort(method, state)
    weights = method.reference_weights(updates)
    starts = [method.client_start(state, u.client) for u in updates]
    terms = [method.adds(state, s, u) for s, u in zip(starts, updates, strict=True)]
    after = method.absorb(state, total(terms, weights), math.fsum(weights))
    close(after, method.aggregate(state, updates))
    still = method.adds(state, starts[0], replace(updates[0], payload=starts[0]))
    assert all(not still[name].any() for name in still)


def test_hooks_change_and_alias_nothing():
    method, state = world()
    before = {k: t.clone() for k, t in state.items()}
    updates = cohort(method, state)
    sent = {k: t.clone() for k, t in updates[0].payload.tensors()}
    after = method.aggregate(state, updates)
    start = method.client_start(after, updates[0].client)
    for t in start.values.values():
        t.clone().zero_()
    assert all(torch.equal(state[k], t) for k, t in before.items())
    assert all(torch.equal(dict(updates[0].payload.tensors())[k], t) for k, t in sent.items())


# --- local heads ----------------------------------------------------------------------------------


def test_a_local_head_stays_with_its_client():
    method, state = world("fedit", "local")
    updates = cohort(method, state)
    after = method.aggregate(state, updates)
    assert all(torch.equal(after[f"{HEAD}{n}"], t) for n, t in head(0).items())
    mine, other = updates[0], updates[1].client
    start = method.client_start(state, mine.client)
    kept = method.kept(state, mine.client, None, start, mine)
    again = method.client_start(after, mine.client, kept)
    assert all(torch.equal(again.values[n], t) for n, t in mine.payload.values.items())
    personal = method.personal_update(after, mine.client, kept)
    assert all(torch.equal(personal.values[n], t) for n, t in mine.payload.values.items())
    fresh = method.client_start(after, other)
    assert all(torch.equal(fresh.values[n], t) for n, t in head(0).items())


def test_clients_with_a_head_of_their_own_do_not_share_a_start():
    method, state = world("fedit", "local")
    updates = cohort(method, state)
    store = {
        u.client.id: method.kept(state, u.client, None, method.client_start(state, u.client), u)
        for u in updates[:2]
    }
    clients = [u.client for u in updates]
    jobs = training_jobs(method, state, clients, PLAN, seed=1, round=1, kept=store.get)
    for job, update in zip(jobs, updates, strict=True):
        own = update.payload.values if update.client.id in store else head(0)
        assert all(torch.equal(job.start.values[n], t) for n, t in own.items())


def test_what_the_inner_method_lets_clients_keep_is_kept_beside_a_local_head():
    method = Headed(composed("strategy=local"), head(0), "local")
    state = method.init_state(setting())
    update = cohort(method, state)[0]
    start = method.client_start(state, update.client)
    kept = method.kept(state, update.client, None, start, update)
    plain = composed("strategy=local")
    inner = plain.kept(plain.init_state(setting()), update.client, None, start, bare(update))
    assert kept.keys() == {*inner, *(f"{HEAD}{n}" for n in HEADS)}
    again = method.client_start(state, update.client, kept)
    assert same_payload(again.update, update.payload.update)


@pytest.mark.parametrize(("mode", "counted"), [("averaged", True), ("local", False)])
def test_bytes_count_heads_that_travel(mode, counted):
    method, state = world("fedit", mode)
    plain = composed("strategy=fedit")
    update = cohort(method, state)[0]
    (job,) = training_jobs(method, state, [update.client], PLAN, seed=1, round=1)
    account = ByteAccount.open(method, state, [job], "float32")
    alone = [replace(job, start=job.start.update)]
    inner = ByteAccount.open(plain, plain.init_state(setting()), alone, "float32")
    scalars = sum(math.prod(shape) for shape in HEADS.values())
    assert account.down(update) - inner.down(bare(update)) == counted * 4 * scalars
    assert account.up(update) - inner.up(bare(update)) == counted * 4 * scalars


# --- hostile replies ------------------------------------------------------------------------------


def expected(method, state, update):
    return Expected(update.client, method.client_start(state, update.client), PLAN)


def test_an_honest_head_passes():
    method, state = world()
    for update in cohort(method, state):
        check_update(update, expected(method, state, update), 0.0)


def nan(values):
    return {**values, "classifier.bias": torch.full((3,), torch.nan)}


def cut(values):
    return {**values, "classifier.weight": values["classifier.weight"][:2]}


def lost(values):
    return {n: t for n, t in values.items() if n != "classifier.bias"}


def more(values):
    return {**values, "embeddings.weight": torch.zeros(2, 2)}


def whole(values):
    return {n: t.long() for n, t in values.items()}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (nan, r"head/classifier\.bias has 3 of 3 entries that are NaN"),
        (cut, r"head/classifier\.weight has shape \(2, 5\), expected \(3, 5\)"),
        (lost, r"head: it lacks classifier\.bias"),
        (more, r"head: it has the unknown embeddings\.weight"),
        (whole, r"head/classifier\.weight is torch\.int64"),
    ],
)
def test_a_spoiled_head_is_refused(spoil, said):
    method, state = world()
    update = cohort(method, state)[0]
    wrong = replace(update, payload=update.payload.with_head(spoil(update.payload.values)))
    with pytest.raises(RejectedUpdate, match=said):
        check_update(wrong, expected(method, state, update), 0.0)


def test_a_head_although_frozen_and_none_although_due_are_refused():
    method, state = world()
    update = cohort(method, state)[0]
    due = expected(method, state, update)
    with pytest.raises(RejectedUpdate, match="factors where an update with a head"):
        check_update(bare(update), due, 0.0)
    with pytest.raises(RejectedUpdate, match="an update with a head where factors"):
        check_update(update, replace(due, start=due.start.update), 0.0)
    stays = replace(update, payload=replace(update.payload, travels=False))
    with pytest.raises(RejectedUpdate, match="travels otherwise"):
        check_update(stays, due, 0.0)


def test_a_head_that_moves_much_further_than_the_rest_is_left_out():
    method, state = world()
    updates = cohort(method, state)
    far = {n: 1e5 * t for n, t in updates[3].payload.values.items()}
    updates[3] = replace(updates[3], payload=updates[3].payload.with_head(far))
    moves = [move(u, expected(method, state, u)) for u in updates]
    assert list(compare(moves, 50.0).refused) == [updates[3].client.id]
    with pytest.raises(RejectedUpdate, match="change of its weights"):
        check_update(updates[3], expected(method, state, updates[3]), 1000.0)


def test_a_client_cannot_have_a_class_imported_by_its_header():
    method, state = world()
    array, header = encode_payload(cohort(method, state)[0].payload, "float32")
    planted = header.replace("fedlora.techniques.lora.payload.LowRankPayload", "antigravity.Fly")
    with pytest.raises(ValueError, match="names no payload class"):
        decode_payload(array, planted, trusted=False)
