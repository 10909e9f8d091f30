"""One round of a split: the same exchanges whatever carries them.

    step k    gradients of step k-1 down, activations of step k up        (k < K)
    U-shape   hidden states down to the tails, their gradients up
    average   every so many steps: adapters up, their average down with the next step
    the end   the last gradient down, adapters and optimizer memory up

A client whose answer does not come, or makes no sense, loses that step and is named; the others go
on as if it were not there. After `PATIENCE` misses in a row it is out for the round.
"""

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedlora.core.types import (
    Adapter,
    Client,
    Failure,
    Update,
    payload_tensors,
)
from fedlora.data.batches import TokenExample
from fedlora.models.stages import Stages
from fedlora.server.validation import check_update
from fedlora.split.client import SplitClient
from fedlora.split.compression import Parts
from fedlora.split.protocol import Down, Opening, Up, label_bytes, parts_bytes
from fedlora.split.server import Answer, SplitServer
from fedlora.split.trainable import Memory
from fedlora.training.loop import Trace
from fedlora.wire.codec import (
    decode_payload,
    encode_payload,
    payload_bytes,
    update_bytes,
)

PATIENCE = 2
"""Answers in a row that may be missing or wrong, before a client is out for the round."""


class Link(Protocol):
    """What carries a round's exchanges. Clients are opened with their first one."""

    @property
    def wire(self) -> str:
        """Number format of adapters."""

    def exchange(self, downs: Mapping[int, Down]) -> Mapping[int, Up | Failure]:
        """One answer, or what became of it, for every client that was sent something."""


class LocalLink:
    """Clients in this process: the same values, no messages.

    Args:
        stages: of the resident model.
        openings: of the round's clients, by id.
        examples: what a client trains on.
        wire: number format of adapters; what a message would round is rounded here too.
    """

    def __init__(
        self,
        stages: Stages,
        openings: Mapping[int, Opening],
        examples: Callable[[Opening], Sequence[TokenExample]],
        wire: str = "float32",
    ) -> None:
        self.stages, self.examples, self.wire = stages, examples, wire
        self.openings = {
            i: replace(o, adapter=through(o.adapter, wire)) for i, o in openings.items()
        }
        self.clients: dict[int, SplitClient] = {}

    def exchange(self, downs: Mapping[int, Down]) -> Mapping[int, Up | Failure]:
        return {i: self._one(i, down) for i, down in sorted(downs.items())}

    def _one(self, i: int, down: Down) -> Up | Failure:
        opening = self.openings[i]
        try:
            if i not in self.clients:
                self.clients[i] = SplitClient(self.stages, self.examples(opening), opening)
            if down.adapter is not None:
                down = replace(down, adapter=through(down.adapter, self.wire))
            up = self.clients[i].receive(down)
            return up if up.adapter is None else replace(up, adapter=through(up.adapter, self.wire))
        except Exception as error:
            return failed(opening.client, error)


def through(adapter: Adapter, wire: str) -> Adapter:
    """An adapter as it comes out of a message."""
    payload = decode_payload(*encode_payload(adapter, wire))
    assert isinstance(payload, Mapping)
    return payload


def failed(client: Client, error: Exception) -> Failure:
    """An exception as what the server hears of it."""
    return Failure(client, type(error).__name__, str(error), traceback.format_exc())


@dataclass(frozen=True)
class Itinerary:
    """What a round consists of."""

    starts: Mapping[int, Adapter]
    """Of each client."""
    done: Mapping[int, int]
    """Steps that each client has behind it: its next one has this number."""
    steps: Mapping[int, int]
    """Steps of each client in this round."""
    server_rates: Sequence[float]
    """Learning rate of each step of the round."""
    client_rates: Sequence[float]
    average_after: frozenset[int] = frozenset()
    """Steps of the round (counted from 1) after which adapters are averaged; never the last."""

    @property
    def length(self) -> int:
        """Steps of the longest client."""
        return max(self.steps.values())


@dataclass
class Ledger:
    """What happened to one client in the round."""

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    up: int = 0
    """Bytes of activations, labels and gradients that it sent, and of adapters within the round."""
    down: int = 0
    """Bytes of gradients and hidden states that it was sent, and of averages within the round."""
    dropped: int = 0
    """Steps that it lost, or whose gradient it did not get."""
    rows: int = 0
    """Tokens whose activations it sent."""
    widest: int = 0
    """Tokens of its largest step, padding included."""

    def metrics(self, moved: float) -> dict[str, float]:
        """As of any client (`Trace.metrics`), beside bytes and lost steps.

        Args:
            moved: how far the client's adapters have moved in the round.
        """
        norms = tuple(self.norms) or (0.0,)  # its one gradient may have been lost
        trace = Trace(tuple(self.losses), tuple(self.tokens), norms, moved)
        return trace.metrics() | {
            "exchanged_up": float(self.up),
            "exchanged_down": float(self.down),
            "exchanged_tokens": float(self.rows),
            "step_tokens": float(self.widest),
            "dropped_steps": float(self.dropped),
        }


@dataclass(frozen=True)
class Finished:
    """A client at the end of the round."""

    adapter: Adapter
    memory: Memory
    done: int
    """Steps that it has behind it now."""
    metrics: Mapping[str, float]


Average = Callable[[Mapping[int, Adapter]], Mapping[int, Adapter]]
"""Clients' adapters to what each of them goes on with."""


def play(
    link: Link,
    server: SplitServer,
    itinerary: Itinerary,
    average: Average,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, float], None] = lambda _, __: None,
) -> dict[int, Finished | Failure]:
    """Play a round.

    Args:
        link: to the clients.
        server: its adapters are trained in place.
        itinerary: of the round.
        average: of adapters in the middle of the round.
        say: takes one line for every step that a client loses.
        progress: takes each finished step and its mean loss.

    Returns:
        For every client of the itinerary, where it stands, or why it does not.

    Raises:
        FloatingPointError: naming the client, if the server's loss is not finite.
    """
    return _Round(link, server, itinerary, average, say, progress).play()


class _Round:
    def __init__(
        self,
        link: Link,
        server: SplitServer,
        itinerary: Itinerary,
        average: Average,
        say: Callable[[str], None],
        progress: Callable[[int, float], None],
    ) -> None:
        self.link, self.server, self.itinerary = link, server, itinerary
        self.average, self.say, self.progress = average, say, progress
        self.ledgers = {i: Ledger() for i in itinerary.steps}
        self.strikes = dict.fromkeys(itinerary.steps, 0)
        self.lost: dict[int, Failure] = {}
        self.waiting: dict[int, tuple[int, Parts, float]] = {}
        """Gradients that go down with a client's next exchange: step, gradient, rate."""
        self.fresh: dict[int, Adapter] = {}
        """Averages that go down with every exchange until one is answered."""
        self.homecoming: dict[int, Up] = {}
        """Of clients that have sent their adapters and do not go on."""
        self.k = 0

    def play(self) -> dict[int, Finished | Failure]:
        it = self.itinerary
        for self.k in range(it.length + 1):
            if self.k in it.average_after:
                self._average()
            downs = {
                i: self._down(i, forward=self.k < steps)
                for i, steps in it.steps.items()
                if self._away(i) and self.k <= steps
            }
            ups = self._exchange(downs)
            self._learn({i: up for i, up in ups.items() if downs[i].forward})
        self._fetch()
        return {i: self._finished(i) for i in sorted(it.steps)}

    def _away(self, i: int) -> bool:
        """Whether a client is still to be heard of."""
        return i not in self.lost and i not in self.homecoming

    def _down(self, i: int, *, forward: bool) -> Down:
        step, gradient, rate = self.waiting.pop(i, (-1, None, 0.0))
        return Down(
            step=self.itinerary.done[i] + self.k,
            gradient=gradient,
            of=step,
            rate=rate,
            adapter=self.fresh.get(i),
            forward=forward,
            upload=not forward,
        )

    def _exchange(self, downs: Mapping[int, Down]) -> dict[int, Up]:
        """Answers that can be used; who gave none loses its step."""
        answers = self.link.exchange(downs) if downs else {}
        good: dict[int, Up] = {}
        for i, down in downs.items():
            self._note_down(i, down)
            answer = answers.get(i)
            if isinstance(answer, Up):
                answer = self._checked(i, down, answer)
            if isinstance(answer, Up):
                good[i] = answer
                self._note_up(i, down, answer)
            else:
                self._miss(i, down, answer)
        return good

    def _checked(self, i: int, down: Down, up: Up) -> Up | Failure:
        try:
            if up.step != down.step:
                raise ValueError(f"client {i} answered step {up.step}, was asked for {down.step}")
            if down.forward:
                self.server.receive(i, up)
            if down.middle is not None:
                self.server.receive_tail(i, up)
            if down.upload:
                self._check_adapter(i, up)
        except Exception as error:
            return failed(self.server.guests[i].client, error)
        return up

    def _check_adapter(self, i: int, up: Up) -> None:
        """Raise unless it can be averaged: one adapter that is not a number would spoil all."""
        if up.adapter is None:
            raise ValueError(f"client {i} was asked for its adapters and sent none")
        client = self.server.guests[i].client
        update = Update(client, up.adapter, client.num_examples)
        check_update(update, client, self.itinerary.starts[i], max_norm=0)

    def _note_down(self, i: int, down: Down) -> None:
        sent = parts_bytes(down.gradient) + parts_bytes(down.middle)
        if down.adapter is not None:
            sent += payload_bytes(down.adapter, self.link.wire)
        self.ledgers[i].down += sent

    def _note_up(self, i: int, down: Down, up: Up) -> None:
        ledger = self.ledgers[i]
        ledger.up += parts_bytes(up.hidden) + label_bytes(up)
        if up.shape is not None:
            ledger.rows += up.shape.tokens
            ledger.widest = max(ledger.widest, len(up.shape.lengths) * up.shape.width)
        self.fresh.pop(i, None)
        if not (down.forward and self.server.guests[i].cut.u_shaped):
            self.strikes[i] = 0  # else the tail's answer decides
        if down.gradient is not None:
            ledger.norms.append(up.grad_norm)
        if down.upload:
            self.homecoming[i] = up

    def _miss(self, i: int, down: Down, failure: Failure | None) -> None:
        client = self.server.guests[i].client
        failure = failure or Failure(client, "NoReply", "no answer came")
        self.strikes[i] += 1
        fate = "sends no adapters"
        if down.forward or down.middle is not None:
            fate = f"loses step {down.step}"
        elif down.gradient is not None:
            fate = f"loses the gradient of step {down.of}"
        self.ledgers[i].dropped += "loses" in fate
        if self.strikes[i] >= PATIENCE:
            self.lost[i] = failure
            fate += " and is out for the round"
        self.say(f"client {i} {fate}: {failure.kind}: {failure.message}")

    def _learn(self, ups: Mapping[int, Up]) -> None:
        """The server's turns on one step's activations."""
        if not ups:
            return
        rate = self.itinerary.server_rates[self.k]
        answers: dict[int, Answer] = {}
        for group in self.server.groups(list(ups), max(ups[i].step for i in ups)):
            mine = {i: ups[i] for i in group}
            u_shaped = {i for i in group if self.server.guests[i].cut.u_shaped}
            if not u_shaped:
                answers |= self.server.learn(mine, rate)
                continue
            middles = self.server.middle(mine)
            downs = {i: Down(step=ups[i].step, middle=m) for i, m in middles.items()}
            answers |= self.server.finish(mine, self._exchange(downs), rate)
        for i, answer in answers.items():
            self.waiting[i] = (ups[i].step, answer.gradient, self.itinerary.client_rates[self.k])
            self.ledgers[i].losses.append(answer.loss)
            self.ledgers[i].tokens.append(answer.tokens)
        if answers:
            tokens = sum(a.tokens for a in answers.values())
            self.progress(self.k + 1, sum(a.loss * a.tokens for a in answers.values()) / tokens)

    def _fetch(self) -> None:
        """Adapters of those who have not sent theirs."""
        while missing := [i for i in self.itinerary.steps if self._away(i)]:
            self._exchange({i: self._down(i, forward=False) for i in missing})

    def _average(self) -> None:
        """Everybody's adapters up; their average goes down with the next step. Who has no more
        steps in this round, though others have, keeps the average too."""
        steps = self.itinerary.steps
        self._fetch()
        there = dict(sorted(self.homecoming.items()))
        if not there:
            return
        averages = self.average({i: _adapter(up) for i, up in there.items()})
        for i, up in there.items():
            if self.k < steps[i]:
                self._note_return(i, up)
                self.fresh[i] = averages[i]
                del self.homecoming[i]  # it goes on, and comes home again
            else:
                self.homecoming[i] = replace(up, adapter=averages[i])

    def _note_return(self, i: int, up: Up) -> None:
        """The adapters that a client sends at its end are counted with its update."""
        self.ledgers[i].up += update_bytes(_adapter(up), self.server.plan, self.link.wire)

    def _finished(self, i: int) -> Finished | Failure:
        if i in self.lost:
            return self.lost[i]
        up, ledger = self.homecoming[i], self.ledgers[i]
        if not ledger.losses:
            client = self.server.guests[i].client
            return Failure(client, "NoStep", "none of its steps reached the server")
        adapter = _adapter(up)
        done = self.itinerary.done[i] + self.itinerary.steps[i]
        moved = _distance(self.itinerary.starts[i], adapter)
        return Finished(adapter, up.memory or {}, done, ledger.metrics(moved))


def _distance(start: Adapter, end: Adapter) -> float:
    """Euclidean norm of the change of all factors."""
    squares = [
        float((e - s).double().square().sum())
        for (_, s), (_, e) in zip(payload_tensors(start), payload_tensors(end), strict=True)
    ]
    return math.sqrt(math.fsum(squares))


def _adapter(up: Up) -> Adapter:
    assert up.adapter is not None
    return up.adapter
