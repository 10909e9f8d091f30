"""Exchanges come out of Flower records as they went in; a broken reply is its client's failure."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict

from fedlora.core.types import Client, Failure, LocalPlan, Ranks
from fedlora.split.batches import Labels, Shape
from fedlora.split.codec import decode_downs, decode_ups, encode_downs, encode_ups
from fedlora.split.noise import Noise
from fedlora.split.protocol import Cut, Down, InitMessage, Terms, Up
from fedlora.wire.rows import Wire
from tests.fedlora.split.world import MODELS, assert_same, assert_same_state, start

MODEL = MODELS["llama"](double=False)
ADAPTER = start(MODEL)
CLIENTS = {i: Client(i, Ranks(dict.fromkeys(ADAPTER, 2)), 9, f"T{i}") for i in (4, 12)}
MEMORY = {"0/exp_avg": torch.arange(4.0), "0/step": torch.tensor(3.0)}
PARTS = Wire("int8", group=4).encode(torch.randn(5, 8))
TERMS = Terms(7, Wire("topk", k=3), Wire("bf16"), Noise(1.0, 0.5), 0.1, True)


def init(i: int) -> InitMessage:
    plan = LocalPlan(lr=0.123456789, betas=(0.8, 0.99))
    return InitMessage(CLIENTS[i], plan, Cut(1, 2), TERMS, ADAPTER, MEMORY, 3)


def same_parts(a: object, b: object) -> None:
    assert isinstance(a, dict) and isinstance(b, dict)
    assert a.keys() == b.keys()
    assert all(np.array_equal(x, b[n]) and x.dtype == b[n].dtype for n, x in a.items())


def test_what_is_sent_down_arrives() -> None:
    downs = {
        4: Down(8, gradient=PARTS, of=7, rate=0.1 / 3, adapter=ADAPTER, forward=True),
        12: Down(0, middle=PARTS, upload=True),
    }
    content = encode_downs(downs, {12: init(12)}, worker="w", source="s", wire="float32")
    found = decode_downs(content)
    assert (found.worker, found.source, found.wire) == ("w", "s", "float32")
    first, second = found.downs[4], found.downs[12]
    assert (first.step, first.of, first.rate, first.forward) == (8, 7, 0.1 / 3, True)
    same_parts(first.gradient, PARTS)
    same_parts(second.middle, PARTS)
    assert second.upload and second.gradient is None and second.adapter is None
    assert first.adapter is not None
    assert_same(first.adapter, ADAPTER)
    assert list(found.inits) == [12]
    begun = found.inits[12]
    assert (begun.client, begun.plan, begun.cut, begun.terms) == (
        CLIENTS[12],
        init(12).plan,
        Cut(1, 2),
        TERMS,
    )
    assert_same(begun.adapter, ADAPTER)
    assert_same_state(begun.optimizer_state, MEMORY)


def test_what_is_sent_up_arrives() -> None:
    labels = Labels((0, 1), torch.tensor([5, 6, 7]), gaps=(2,))
    ups = {
        4: Up(3, PARTS, Shape((2, 3)), labels, 1.5, 3, 0.25, ADAPTER, MEMORY),
        12: Failure(CLIENTS[12], "KeyError", "no such", "a traceback"),
    }
    found = decode_ups(encode_ups(ups, wire="float32"), CLIENTS)
    up = found[4]
    assert isinstance(up, Up)
    assert (up.step, up.shape, up.loss, up.tokens, up.grad_norm) == (3, Shape((2, 3)), 1.5, 3, 0.25)
    same_parts(up.hidden, PARTS)
    assert up.labels is not None and up.adapter is not None and up.optimizer_state is not None
    assert (up.labels.first, up.labels.gaps) == (labels.first, labels.gaps)
    assert torch.equal(up.labels.targets, labels.targets)
    assert_same(up.adapter, ADAPTER)
    assert_same_state(up.optimizer_state, MEMORY)
    assert found[12] == ups[12]


def test_a_part_of_a_reply_that_is_gone_or_broken_is_one_clients_failure() -> None:
    labels = Labels((0, 2), torch.tensor([5, 6, 7]))
    ups = {i: Up(3, PARTS, Shape((2, 3)), labels, tokens=3) for i in CLIENTS}
    content = encode_ups(ups, wire="float32")
    arrays = dict(content.array_records["arrays"].items())
    del arrays["12/labels/targets"]
    broken = RecordDict({**content, "arrays": ArrayRecord(arrays)})
    found = decode_ups(broken, CLIENTS)
    assert isinstance(found[4], Up)
    failure = found[12]
    assert isinstance(failure, Failure)
    assert failure.kind == "RejectedUpdate"
    assert "its reply cannot be read: KeyError" in failure.message
    silent = decode_ups(encode_ups({4: ups[4]}, wire="float32"), CLIENTS)[12]
    assert isinstance(silent, Failure)
    assert silent.kind == "NoReply"


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_memory_travels_exactly_whatever_the_adapters_wire(wire: str) -> None:
    memory = {"0/exp_avg": torch.randn(9), "0/step": torch.tensor(3.0)}
    up = Up(0, adapter=ADAPTER, optimizer_state=memory)
    found = decode_ups(encode_ups({4: up}, wire=wire), {4: CLIENTS[4]})[4]
    assert isinstance(found, Up) and found.optimizer_state is not None
    assert_same_state(found.optimizer_state, memory)
