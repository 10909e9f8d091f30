"""One round of a split: the same exchanges over any transport.

    step k    gradients of step k-1 down, activations of step k up        (k < K)
    U-shape   hidden states down to the tails, their gradients up
    average   every so many steps: adapters up, their average down with the next step
    the end   the last gradient down, adapters and optimizer state up

A client whose answer is missing or wrong loses that step, and a log line names it. The others
continue without it. After `MOST_MISSES` in a row it is out for the round.
"""

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedlora.core.errors import CLIENT_ERRORS
from fedlora.core.types import (
    Adapter,
    Client,
    Expected,
    Failure,
    Update,
)
from fedlora.data.batches import TokenExample
from fedlora.models.stages import Stages
from fedlora.server.norm_bound import compare, move
from fedlora.server.validation import check_update
from fedlora.split.client import SplitClient
from fedlora.split.progress import ClientProgress, Gradient, Phase
from fedlora.split.protocol import Down, InitMessage, Up, parts_bytes
from fedlora.split.server import Answer, SplitServer, SpoiledStep
from fedlora.split.trainable import OptimizerState, check_optimizer_state
from fedlora.techniques.lora.payload import LowRankPayload, factor_tensors
from fedlora.wire.codec import decode_payload, encode_payload, payload_bytes, update_bytes


class Link(Protocol):
    """A transport of a round's exchanges. A client gets its `InitMessage` with its first one."""

    @property
    def wire(self) -> str:
        """Number format of adapters."""

    def exchange(self, downs: Mapping[int, Down]) -> Mapping[int, Up | Failure]:
        """Send a message to each client; its answer, or the failure that explains why there is
        none, by id."""


class LocalLink:
    """Clients in this process: the same values, no messages.

    Args:
        stages: of the resident model.
        inits: of the round's clients, by id.
        examples: reads what a client trains on.
        wire: number format of adapters, which are rounded as a message would round them.
    """

    def __init__(
        self,
        stages: Stages,
        inits: Mapping[int, InitMessage],
        examples: Callable[[InitMessage], Sequence[TokenExample]],
        wire: str = "float32",
    ) -> None:
        self.stages, self.examples, self.wire = stages, examples, wire
        self.inits = {
            i: replace(o, adapter=pass_through_wire(o.adapter, wire)) for i, o in inits.items()
        }
        self.clients: dict[int, SplitClient] = {}

    def exchange(self, downs: Mapping[int, Down]) -> Mapping[int, Up | Failure]:
        return {i: self._one(i, down) for i, down in sorted(downs.items())}

    def _one(self, i: int, down: Down) -> Up | Failure:
        init = self.inits[i]
        try:
            if i not in self.clients:
                self.clients[i] = SplitClient(self.stages, self.examples(init), init)
            if down.adapter is not None:
                down = replace(down, adapter=pass_through_wire(down.adapter, self.wire))
            up = self.clients[i].receive(down)
            return (
                up
                if up.adapter is None
                else replace(up, adapter=pass_through_wire(up.adapter, self.wire))
            )
        except CLIENT_ERRORS as error:
            return failure_of(init.client, error)


def pass_through_wire(adapter: Adapter, wire: str) -> Adapter:
    """Encode and decode an adapter, as a message does."""
    found = decode_payload(*encode_payload(LowRankPayload(adapter), wire)).low_rank()
    assert found is not None
    return found


def failure_of(client: Client, error: BaseException) -> Failure:
    """An exception as a record that can travel."""
    return Failure(client, type(error).__name__, str(error), traceback.format_exc())


@dataclass(frozen=True)
class RoundPlan:
    """Starts, steps, learning rates and averages of a round."""

    starts: Mapping[int, Adapter]
    """Adapters that each client starts from."""
    done: Mapping[int, int]
    """Steps of each client before this round: its next step has this number."""
    steps: Mapping[int, int]
    """Steps of each client in this round."""
    server_rates: Sequence[float]
    """The server's learning rate at each step of the round."""
    client_rates: Sequence[float]
    """The clients' learning rate at each step of the round."""
    average_after: frozenset[int] = frozenset()
    """Steps of the round (counted from 1) after which adapters are averaged; never the last."""
    norm_factor: float = 0.0
    """How many medians of the clients' changes such an average takes in
    (`fedlora.server.norm_bound`); 0: any."""

    @property
    def length(self) -> int:
        """Steps of the longest client."""
        return max(self.steps.values())


@dataclass(frozen=True)
class Finished:
    """The result of a client at the end of the round."""

    adapter: Adapter
    optimizer_state: OptimizerState
    done: int
    """Its steps so far, this round included."""
    metrics: Mapping[str, float]


Average = Callable[[Mapping[int, Adapter]], Mapping[int, Adapter]]
"""Maps all clients' adapters to those that each client continues with."""


def run_exchanges(
    link: Link,
    server: SplitServer,
    plan: RoundPlan,
    average: Average,
    say: Callable[[str], None] = lambda _: None,
    on_step: Callable[[int, float], None] = lambda _, __: None,
) -> dict[int, Finished | Failure]:
    """Run all exchanges of a round.

    Args:
        link: to the clients.
        server: its adapters are trained in place.
        plan: of the round.
        average: of adapters in the middle of the round.
        say: takes one line for every step that a client loses.
        on_step: takes the number of each finished step and its mean loss.

    Returns:
        For every client of the plan, its result or why there is none.
    """
    return _Round(link, server, plan, average, say, on_step).run()


class _Round:
    def __init__(
        self,
        link: Link,
        server: SplitServer,
        plan: RoundPlan,
        average: Average,
        say: Callable[[str], None],
        on_step: Callable[[int, float], None],
    ) -> None:
        self.link, self.server, self.plan = link, server, plan
        self.average, self.say, self.on_step = average, say, on_step
        self.clients = {
            i: ClientProgress(
                client=server.clients[i].client,
                done=plan.done[i],
                steps=steps,
                u_shaped=server.clients[i].cut.u_shaped,
            )
            for i, steps in plan.steps.items()
        }
        self.k = 0
        """Steps of the round so far."""

    def run(self) -> dict[int, Finished | Failure]:
        # A client with fewer steps than others returns after its last one; the last exchange of all
        # (k = length) brings the last gradient down and the adapters up.
        for k in range(self.plan.length + 1):
            self.k = k
            if k in self.plan.average_after:
                self._average()
            downs = {
                i: client.ask(k, forward=k < client.steps)
                for i, client in self._training().items()
                if k <= client.steps
            }
            ups = self._exchange(downs)
            self._learn({i: up for i, up in ups.items() if downs[i].forward})
        self._fetch_adapters()
        return {i: self._result(i) for i in sorted(self.clients)}

    def _training(self) -> dict[int, ClientProgress]:
        return {i: c for i, c in self.clients.items() if c.phase is Phase.TRAINING}

    # --- an exchange ----------------------------------------------------------------------------

    def _exchange(self, downs: Mapping[int, Down]) -> dict[int, Up]:
        """Send one message to each client; the valid answers. A client without one loses its
        step."""
        answers = self.link.exchange(downs) if downs else {}
        good: dict[int, Up] = {}
        for i, down in downs.items():
            client = self.clients[i]
            client.stats.down += self._down_bytes(down)
            answer = self._check_answer(i, down, answers.get(i))
            if isinstance(answer, Up):
                client.on_answer(down, answer)
                good[i] = answer
            else:
                self.say(client.on_miss(down, answer))
        return good

    def _down_bytes(self, down: Down) -> int:
        sent = parts_bytes(down.gradient) + parts_bytes(down.middle)
        if down.adapter is not None:
            sent += payload_bytes(LowRankPayload(down.adapter), self.link.wire)
        return sent

    def _check_answer(self, i: int, down: Down, answer: Up | Failure | None) -> Up | Failure:
        """A valid answer, or a failure that says what is wrong with it.

        Only what a client can cause is its failure: activations are moved to the server's device
        outside of the checks.
        """
        client = self.clients[i].client
        activations = None
        if answer is None:
            return Failure(client, "NoReply", "no answer came")
        if isinstance(answer, Failure):
            return answer
        try:
            if answer.step != down.step:
                raise ValueError(
                    f"client {i} answered step {answer.step}, was asked for {down.step}"
                )
            if down.forward:
                activations = self.server.activations(i, answer)
            if down.middle is not None:
                self.server.receive_tail(i, answer)
            if down.upload:
                self._check_adapter(i, answer)
        except Exception as error:  # an answer is foreign input: a check may meet anything in it
            return failure_of(client, error)
        if activations is not None:
            self.server.store(i, activations)
        return answer

    def _check_adapter(self, i: int, up: Up) -> None:
        """Raise unless the adapter can be averaged: one that is not finite would spoil the average
        of all clients."""
        if up.adapter is None:
            raise ValueError(f"client {i} was asked for its adapters and sent none")
        check_update(self._update(i, up.adapter), self._expected(i), max_norm=0)
        check_optimizer_state(up.optimizer_state or {}, up.adapter, self.server.plan)

    def _update(self, i: int, adapter: Adapter) -> Update:
        client = self.clients[i].client
        return Update(client, LowRankPayload(adapter), client.num_examples)

    def _expected(self, i: int) -> Expected:
        start = LowRankPayload(self.plan.starts[i])
        return Expected(self.clients[i].client, start, self.server.plan)

    # --- a step of the server -------------------------------------------------------------------

    def _learn(self, ups: Mapping[int, Up]) -> None:
        """The server's turns on one step's activations."""
        if not ups:
            return
        answers: dict[int, Answer] = {}
        for group in self.server.groups(list(ups), max(ups[i].step for i in ups)):
            answers |= self._turn({i: ups[i] for i in group})
        rate = self.plan.client_rates[self.k]
        for i, answer in answers.items():
            gradient = Gradient(ups[i].step, answer.gradient, rate)
            self.clients[i].on_step(gradient, answer.loss, answer.tokens)
        if answers:
            tokens = sum(a.tokens for a in answers.values())
            mean = sum(a.loss * a.tokens for a in answers.values()) / tokens
            self.on_step(self.k + 1, mean)

    def _turn(self, ups: Mapping[int, Up]) -> dict[int, Answer]:
        """One optimizer step of the server; with a U-shape, an exchange with the tails within.

        A client whose numbers would spoil the step is out, and the others take it without that
        client.
        """
        left, tails = dict(ups), dict[int, Up]()
        asked = not any(self.clients[i].u_shaped for i in ups)  # no tails to be asked
        while left:
            try:
                if not any(self.clients[i].u_shaped for i in left):
                    return self.server.learn(left, self.plan.server_rates[self.k])
                middles = self.server.middle(left)
                if not asked:
                    downs = {i: Down(step=left[i].step, middle=m) for i, m in middles.items()}
                    tails, asked = self._exchange(downs), True
                found = {i: tails[i] for i in left if i in tails}
                return self.server.finish(left, found, self.plan.server_rates[self.k])
            except SpoiledStep as error:
                del left[error.client]
                self.say(self.clients[error.client].refuse(str(error)))
        return {}

    # --- adapters -------------------------------------------------------------------------------

    def _fetch_adapters(self) -> None:
        """Ask all clients that are still training for their adapters, until each sends or fails."""
        while training := self._training():
            self._exchange({i: c.ask(self.k, forward=False) for i, c in training.items()})

    def _average(self) -> None:
        """Average all adapters; clients get the average with their next step.

        A client that has no more steps in this round, while others have some, keeps the average
        too.
        """
        self._fetch_adapters()
        there = self._comparable()
        if not there:
            return
        averages = self.average({i: client.adapter for i, client in there.items()})
        for i, client in there.items():
            if self.k < client.steps:
                client.stats.up += self._returned_bytes(client)
                client.resume(averages[i])
            else:
                assert client.answer is not None
                client.answer = replace(client.answer, adapter=averages[i])

    def _comparable(self) -> dict[int, ClientProgress]:
        """The clients whose adapters have arrived and did not move too far."""
        there = {i: c for i, c in sorted(self.clients.items()) if c.phase is Phase.RETURNED}
        if not self.plan.norm_factor:
            return there
        moves = [move(self._update(i, c.adapter), self._expected(i)) for i, c in there.items()]
        refused = compare(moves, self.plan.norm_factor).refused
        for i, reason in refused.items():
            self.say(there[i].refuse(reason))
        return {i: c for i, c in there.items() if i not in refused}

    def _returned_bytes(self, client: ClientProgress) -> int:
        """Bytes of adapters sent within the round; those at its end are counted as the update."""
        return update_bytes(LowRankPayload(client.adapter), self.server.plan, self.link.wire)

    def _result(self, i: int) -> Finished | Failure:
        client = self.clients[i]
        if client.failure is not None:
            return client.failure
        if not client.stats.losses:
            return Failure(client.client, "NoStep", "none of its steps reached the server")
        assert client.answer is not None
        moved = _distance(self.plan.starts[i], client.adapter)
        return Finished(
            adapter=client.adapter,
            optimizer_state=client.answer.optimizer_state or {},
            done=client.done + client.steps,
            metrics=client.stats.metrics(moved),
        )


def _distance(start: Adapter, end: Adapter) -> float:
    """Euclidean norm of the change of all factors."""
    squares = [
        float((e - s).double().square().sum())
        for (_, s), (_, e) in zip(factor_tensors(start), factor_tensors(end), strict=True)
    ]
    return math.sqrt(math.fsum(squares))
