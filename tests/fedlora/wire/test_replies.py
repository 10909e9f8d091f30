"""Replies of a rounding wire are changes: what arrives, what it costs, what is kept for later."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlora.core.payload import Payload
from fedlora.core.types import Client, Failure, LocalPlan, Ranks, TrainJob, Update
from fedlora.wire.codec import Named, decode_payload, encode_payload, encode_reply, payload_bytes
from fedlora.wire.messages import decode_jobs, decode_results, encode_jobs, encode_results
from strategies.base import LoRAStrategy
from strategies.fedit import FedIT
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA
from strategies.slora import SLoRA
from strategies.spp import SPP
from tests.generators import setting, trained

METHODS = [FedIT(), FlexLoRA(), HeteroLoRA(), SLoRA(aggregator=FlexLoRA()), SPP()]
SIZE = 1e-3
"""Of the change of a number; the starts' are near 1."""


def moved(payload: Payload, seed: int, size: float = SIZE) -> Payload:
    """Trained a little, float32 as engines return it."""
    found = trained(payload, seed, size)
    wide = {name: t.float() for name, t in found.tensors()}
    return type(found).from_header(found.header(), wide)


def starts(method: LoRAStrategy) -> dict[int, tuple[Client, Payload]]:
    """Of a state in which every factor is of some size, float32."""
    population = setting()
    state = method.init_state(population)
    found = {}
    for c in population.clients:
        client = method.enlist(state, c)
        start = method.technique.payload(method.client_start(state, client))
        found[c.id] = client, moved(start, 100 + c.id, size=1.0)
    return found


def exchanged(
    jobs: list[TrainJob], wire: str
) -> tuple[list[Update], dict[int, Payload], dict[int, Payload]]:
    """Updates as the server reads them, starts as clients received them, and what they sent."""
    received = decode_jobs(encode_jobs(jobs, worker="{}", source="s", wire=wire)).jobs
    done = [Update(j.client, moved(j.start, j.client.id), 1, {}) for j in received]
    content = encode_results(done, wire=wire, jobs=received)
    asked = {j.client.id: j.client for j in jobs}
    arrived = decode_results(content, asked, {j.client.id: j.start for j in jobs})
    for u in arrived:
        array = content.array_records["payloads"][str(u.client.id)].numpy()
        assert array.nbytes == payload_bytes(u.payload, wire)
    updates = [u for u in arrived if isinstance(u, Update)]
    assert len(updates) == len(jobs)
    return (
        updates,
        {j.client.id: j.start for j in received},
        {u.client.id: u.payload for u in done},
    )


def tensors(payload: Payload) -> dict[str, Tensor]:
    return {name: t.double() for name, t in payload.tensors()}


def loss(got: Payload, own: Payload, sent: Payload, received: Payload) -> float:
    """``||(got - own) - (sent - received)|| / ||sent - received||`` over what a client trains."""
    g, o, s, r = (tensors(p) for p in (got, own, sent, received))
    pairs = [
        (g[n] - o.get(n, 0.0), s[n] - r.get(n, 0.0))
        for n in s
        if not torch.equal(s[n], r.get(n, torch.tensor(torch.nan)))
    ]
    error = sum(float((x - y).square().sum()) for x, y in pairs)
    return (error / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_bfloat16_keeps_the_changes_of_clients(method: LoRAStrategy) -> None:
    own = starts(method)
    jobs = [TrainJob(0, 1, c, start, LocalPlan()) for c, start in own.values()]
    updates, received, sent = exchanged(jobs, "bfloat16")
    for u in updates:
        i = u.client.id
        assert loss(u.payload, own[i][1], sent[i], received[i]) < 0.003
        value = decode_payload(*encode_payload(sent[i], "bfloat16"))
        assert loss(value, own[i][1], sent[i], received[i]) > 0.3, "as it was before"


@pytest.mark.parametrize("wire", ["float32", "float64"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_other_wires_send_values_bit_by_bit(method: LoRAStrategy, wire: str) -> None:
    jobs = [TrainJob(0, 1, c, start, LocalPlan()) for c, start in starts(method).values()]
    updates, _, sent = exchanged(jobs, wire)
    for u in updates:
        before = tensors(sent[u.client.id])
        assert all(torch.equal(t, before[n]) for n, t in tensors(u.payload).items())
        assert encode_reply(u.payload, wire, jobs[0].start)[1] == encode_payload(u.payload, wire)[1]


def test_what_rounding_withholds_comes_with_the_next_rounds() -> None:
    client, own = starts(FedIT())[0]
    residual: Named = {}
    came: dict[str, Tensor] = {}
    learnt: dict[str, Tensor] = {}
    for seed in range(20):
        job = TrainJob(0, 1, client, own, LocalPlan(), residual)
        (got,) = decode_jobs(encode_jobs([job], worker="{}", source="s", wire="bfloat16")).jobs
        assert isinstance(got, TrainJob)
        done = Update(client, moved(got.start, seed), 1, {})
        content = encode_results([done], wire="bfloat16", jobs=[got])
        (update,) = decode_results(content, {client.id: client}, {client.id: own})
        assert isinstance(update, Update)
        assert update.residual is not None
        residual = update.residual
        came = _plus(came, update.payload, own)
        learnt = _plus(learnt, done.payload, got.start)
    for name, t in learnt.items():
        assert float((came[name] - t).norm()) < 1e-3 * float(t.norm())
        assert float((came[name] + residual[name] - t).norm()) < 1e-4 * float(t.norm())
        assert float((came[name] - t).norm()) == pytest.approx(
            float(residual[name].norm()), rel=0.2
        )


def test_what_was_withheld_of_a_factor_waits_while_it_is_frozen() -> None:
    """A client sends no frozen factor, so no correction of it: the server's stays bit for bit."""
    client, own = starts(FedIT())[0]
    residual: Named = {}
    kept: dict[str, Tensor] = {}
    for seed, frozen in enumerate(("a", "b", "a", "b")):
        plan = LocalPlan(train_a=frozen != "a", train_b=frozen != "b")
        job = TrainJob(0, 1, client, own, plan, residual)
        (got,) = decode_jobs(encode_jobs([job], worker="{}", source="s", wire="bfloat16")).jobs
        assert isinstance(got, TrainJob)
        before = dict(got.start.tensors())
        end = {n: before[n] if n[-1] == frozen else t for n, t in moved(got.start, seed).tensors()}
        done = Update(client, own.from_header(own.header(), end), 1, {})
        content = encode_results([done], wire="bfloat16", jobs=[got])
        (update,) = decode_results(content, {client.id: client}, {client.id: own})
        assert isinstance(update, Update)
        sent, started = dict(update.payload.tensors()), dict(own.tensors())
        assert update.residual is not None
        residual = update.residual
        for name, t in sent.items():
            assert torch.equal(t, started[name]) == (name[-1] == frozen)
            if name[-1] == frozen and name in kept:
                assert torch.equal(residual[name], kept[name])
        kept = dict(residual)
    assert all(bool(e.any()) for e in residual.values())


def _plus(total: Mapping[str, Tensor], end: Payload, start: Payload) -> dict[str, Tensor]:
    before = tensors(start)
    return {n: total.get(n, 0.0) + t - before[n] for n, t in tensors(end).items()}


def test_without_an_account_no_residual_travels() -> None:
    client, own = starts(FedIT())[0]
    jobs = [TrainJob(0, 1, client, own, LocalPlan())]
    (update,), _, _ = exchanged(jobs, "bfloat16")
    assert update.residual is None


def test_a_change_without_a_start_is_that_clients_failure() -> None:
    client, own = starts(FedIT())[0]
    job = TrainJob(0, 1, client, own, LocalPlan())
    content = encode_results([Update(client, moved(own, 1), 1, {})], wire="bfloat16", jobs=[job])
    (failure,) = decode_results(content, {client.id: client})
    assert isinstance(failure, Failure)
    assert "a change from a start that is not known here" in failure.message


def test_a_pruned_client_loses_as_little() -> None:
    """Its reply is the leading block of its start, moved."""
    client, own = starts(HeteroLoRA())[3]
    (received,) = decode_jobs(
        encode_jobs(
            [TrainJob(0, 1, client, own, LocalPlan())], worker="", source="", wire="bfloat16"
        )
    ).jobs
    whole = dict(moved(received.start, 1).tensors())
    ranks = {p: max(1, r - 1) for p, r in client.ranks.items()}
    cut = {
        n: t[: ranks[n[:-2]]] if n.endswith("/a") else t[:, : ranks[n[:-2]]]
        for n, t in whole.items()
    }
    payload = type(own).from_header(own.header(), cut)
    update = Update(replace(client, ranks=Ranks(ranks)), payload, 1, {})
    content = encode_results([update], wire="bfloat16", jobs=[received])
    (got,) = decode_results(content, {client.id: client}, {client.id: own})
    assert isinstance(got, Update)
    for name, t in tensors(got.payload).items():
        block = tuple(slice(n) for n in t.shape)
        wanted = cut[name].double() - tensors(received.start)[name][block]
        error = t - tensors(own)[name][block] - wanted
        assert float(error.norm()) < 0.003 * float(wanted.norm())
