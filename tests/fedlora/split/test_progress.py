"""One client's state in a round: what it is asked, what a missing answer costs, when it is out."""

import numpy as np
import pytest

from fedlora.core.types import Client, Failure, Ranks
from fedlora.split.progress import ClientProgress, Gradient, Loss, Phase
from fedlora.split.protocol import Down, Up

CLIENT = Client(5, Ranks({}), 3)
SILENT = Failure(CLIENT, "NoReply", "no answer came")
PARTS = {"values": np.zeros(2, np.float32)}


def progress(u_shaped: bool = False) -> ClientProgress:
    return ClientProgress(CLIENT, done=10, steps=4, u_shaped=u_shaped)


@pytest.mark.parametrize(
    ("down", "loss", "dropped", "words"),
    [
        (Down(12, forward=True), Loss.STEP, 1, "loses step 12"),
        (Down(12, gradient=PARTS, of=11, forward=True), Loss.STEP, 1, "loses step 12"),
        (Down(12, middle=PARTS), Loss.STEP, 1, "loses step 12"),
        (Down(14, gradient=PARTS, of=13), Loss.GRADIENT, 1, "loses the gradient of step 13"),
        (Down(14), Loss.ADAPTERS, 0, "sends no adapters"),
    ],
)
def test_what_a_missing_answer_costs(down: Down, loss: Loss, dropped: int, words: str) -> None:
    client = progress()
    assert Loss.of(down) is loss
    assert client.on_miss(down, SILENT) == f"client 5 {words}: NoReply: no answer came"
    assert client.stats.dropped == dropped
    assert client.phase is Phase.TRAINING


def test_a_client_is_out_after_two_misses_in_a_row() -> None:
    client = progress()
    for k in (0, 2):
        client.on_miss(client.ask(k, forward=True), SILENT)
        client.on_answer(client.ask(k + 1, forward=True), Up(11 + k))
    assert client.phase is Phase.TRAINING
    client.on_miss(client.ask(3, forward=True), SILENT)
    assert client.on_miss(client.ask(4, forward=False), SILENT).startswith(
        "client 5 sends no adapters and is out for the round"
    )
    assert (client.phase, client.failure, client.stats.dropped) == (Phase.LOST, SILENT, 3)


def test_with_a_u_shape_the_tails_answer_decides() -> None:
    client = progress(u_shaped=True)
    client.on_miss(client.ask(0, forward=True), SILENT)
    client.on_answer(client.ask(1, forward=True), Up(11))
    assert client.misses == 1
    client.on_answer(Down(11, middle=PARTS), Up(11))
    assert client.misses == 0


def test_a_gradient_goes_down_once_and_an_average_until_it_is_answered() -> None:
    client = progress()
    client.resume({})
    client.on_step(Gradient(10, PARTS, 0.5), 2.0, 7)
    first = client.ask(1, forward=True)
    assert (first.step, first.of, first.rate, first.gradient) == (11, 10, 0.5, PARTS)
    client.on_miss(first, SILENT)
    second = client.ask(2, forward=True)
    assert (second.gradient, second.of, second.adapter) == (None, -1, {})
    client.on_answer(second, Up(12))
    assert client.ask(3, forward=True).adapter is None


def test_a_client_that_has_returned_may_resume() -> None:
    client = progress()
    client.on_answer(client.ask(2, forward=False), Up(12, adapter={}))
    assert client.phase is Phase.RETURNED
    assert client.adapter == {}
    client.resume({})
    assert (client.phase, client.answer) == (Phase.TRAINING, None)
