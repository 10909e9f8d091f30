"""A round of SplitLoRA: it builds stages and adapters from the server's state, plans the round,
averages adapters within it, and builds the next state.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import Tensor

from fedlora.algebra.state import (
    State,
    order,
    pack,
    prefixed,
    under,
    unpack,
)
from fedlora.core.errors import ConfigError, ModelError
from fedlora.core.rates import learning_rates
from fedlora.core.types import Adapter, Client, Factors, Failure, LocalPlan, TrainJob, Update
from fedlora.data.batches import num_steps
from fedlora.server.method import ClientChannel, Method, RoundOutcome
from fedlora.split.batches import Seeds
from fedlora.split.config import SplitConfig
from fedlora.split.context import RunContext, run_context
from fedlora.split.cost import client_part
from fedlora.split.link import MessageLink
from fedlora.split.protocol import Cut, InitMessage, Terms
from fedlora.split.rounds import Finished, LocalLink, RoundPlan, run_exchanges
from fedlora.split.server import ClientInfo, SplitServer
from fedlora.split.trainable import OptimizerState, TrainableStage
from fedlora.techniques.lora.layer import LowRank
from fedlora.techniques.lora.payload import LowRankPayload

log = logging.getLogger(__name__)

SERVER, MEMORY, COPIES = "server/", "memory/", "copies/"
"""Parts of the server's state: its own adapters, optimizer states, adapters per client."""
HOST = -1
"""The key of the server's own adapters, beside client ids."""


def server_state(adapter: Adapter) -> dict[str, Tensor]:
    """The server's own adapters as tensors of the state."""
    return pack(adapter, SERVER) | {f"{SERVER}order": order(adapter)}


class SplitRound:
    """A round from jobs to results.

    Args:
        config: the method's options.
        method: averages adapters, within the round and at its end (`aggregate`, `client_start`).
        state: of the server.
        jobs: of the round's clients; all have the same plan.
        channel: to these clients.
        cuts: which blocks each client holds, by id.
        copy_of: with ``rule.update=per_client``, returns the server's adapters for one client.

    Raises:
        ModelError: if the model cannot be cut at a client's cut.
    """

    def __init__(
        self,
        config: SplitConfig,
        method: Method,
        state: State,
        jobs: Sequence[TrainJob],
        channel: ClientChannel,
        *,
        cuts: Mapping[int, Cut],
        copy_of: Callable[[State, Client], Mapping[str, Factors]],
    ) -> None:
        self.config, self.method, self.state, self.channel = config, method, state, channel
        self.cuts, self.copy_of = cuts, copy_of
        self.jobs = {j.client.id: j for j in jobs}
        self.context: RunContext = run_context(channel.worker)
        self.plan = jobs[0].plan
        self.terms = Terms(
            seed=jobs[0].seed,
            activations=config.activations,
            gradients=config.gradients,
            noise=config.noise,
            smoothing=config.label_smoothing,
            keep_graphs=config.keep_graphs,
        )
        for cut in self.cuts.values():
            self.context.check(cut)
        blocks = int(state["blocks"])
        if config.tail > 0 and blocks != self.context.stages.blocks:
            raise ModelError(
                f"strategy.tail={config.tail}: the last adapter of the model lies in block "
                f"{blocks - 1} of {self.context.stages.blocks}; a U-shape needs model.targets "
                "and model.layers in the last block"
            )
        self.inits = {i: self._init(i) for i in self.jobs}
        self.copies = {
            i: copy_of(state, j.client)
            for i, j in self.jobs.items()
            if config.rule.update == "per_client"
        }
        self.server = self._server()

    def run(self) -> RoundOutcome:
        """Run all steps."""
        round_plan = self._round_plan()
        if not int(self.state["steps"]):
            self._announce()
        found = run_exchanges(
            self._link(),
            self.server,
            round_plan,
            self._average,
            self.channel.say,
            lambda step, loss: self.channel.on_step(step, round_plan.length, loss),
        )
        results: list[Update | Failure] = []
        for i, end in found.items():
            if isinstance(end, Failure):
                results.append(end)
                continue
            n = self.context.store.count(i, "train")
            metrics = dict(end.metrics) | self._costs(i, end.metrics)
            results.append(Update(self.jobs[i].client, LowRankPayload(end.adapter), n, metrics))
        good = {i: end for i, end in found.items() if isinstance(end, Finished)}
        if self.terms.noise.sigma:
            self._account(good)
        return RoundOutcome(self._after(good, round_plan.length), results)

    def _costs(self, i: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The cost of the round for a real client, by formula (`fedlora.split.cost`): operations
        and bytes of memory. Empty for architectures that the formulas do not cover: an estimate
        never ends a round."""
        cut, rows, steps = self.cuts[i], metrics["exchanged_tokens"], max(1.0, metrics["steps"])
        ranks = {p: f.rank for p, f in self.inits[i].adapter.items()}
        dropout = self.plan.dropout > 0
        length = max(1, round(rows / steps / self.plan.batch_size))
        widest, supervised = int(metrics["step_tokens"]), round(metrics["tokens"] / steps)
        try:
            part = client_part(self.context.model.network, ranks, cut)
            work = part.flops(length)
            held = part.memory(widest, dropout=dropout, supervised=supervised)
        except Exception as error:  # a model of another make can lack anything that they look for
            log.debug("no cost of client %d: %s: %s", i, type(error).__name__, error)
            return {}
        return {
            "client_flops": rows * (work.forward + work.backward),
            "client_memory": float(sum(held)),
        }

    def _announce(self) -> None:
        """Print the cut and the rule before the first round."""
        config, blocks = self.config, self.context.stages.blocks
        cuts = sorted({c.first for c in self.cuts.values()})
        held = f"clients hold the first {'/'.join(map(str, cuts))} of {blocks} blocks"
        if config.tail >= 0:
            held += f" and the last {config.tail} with the head; labels stay with them"
        else:
            held += "; the server is given the labels, which are the text itself"
        self.channel.say(f"split: {held}; {config.rule.update}, {config.transport}")
        if any(first > self.context.model.info.frozen_blocks for first in cuts):
            for note in self.context.notes():
                self.channel.say(f"split: {note}")

    def _account(self, found: Mapping[int, Finished]) -> None:
        """Print what the noise guarantees after the steps so far."""
        releases = rows = 0
        for i, end in found.items():
            held = self.context.examples_of(i, self.plan, self.terms.seed)
            releases = max(releases, math.ceil(end.done * self.plan.batch_size / len(held)))
            rows = max(rows, *(len(e.input_ids) - 1 for e in held))
        if releases:
            self.channel.say(f"split: {self.terms.noise.privacy(releases, rows).text}")

    def _link(self) -> LocalLink | MessageLink:
        if self.config.transport == "messages":
            return MessageLink(self.channel, self.inits)
        return LocalLink(self.context.stages, self.inits, self.context.examples, self.channel.wire)

    def _init(self, i: int) -> InitMessage:
        job = self.jobs[i]
        start = job.start.low_rank()
        assert start is not None
        memory = self._memory(f"{i}/")
        return InitMessage(job.client, job.plan, self.cuts[i], self.terms, start, memory, job.round)

    def _memory(self, whose: str) -> OptimizerState:
        return under(self.state, f"{MEMORY}{whose}") if self.config.memory == "keep" else {}

    def _server(self) -> SplitServer:
        clients = {
            i: ClientInfo(j.client, self.cuts[i], Seeds(seed=self.terms.seed, client=i))
            for i, j in self.jobs.items()
        }
        if self.config.rule.update == "per_client":
            trainables = {
                i: self._trainable(copy, f"server{i}/") for i, copy in self.copies.items()
            }
        else:
            own = unpack(self.state, float(self.state["alpha"]), SERVER)
            trainables = {HOST: self._trainable(own, "server/")}
        stages = self.context.stages
        return SplitServer(stages, trainables, clients, self.plan, self.config.rule, self.terms)

    def _trainable(self, adapter: Adapter, whose: str) -> TrainableStage:
        updates = LowRankPayload(adapter).updates(self.context.model, self.plan.dropout)
        factors = {p: u for p, u in updates.items() if isinstance(u, LowRank)}
        return TrainableStage(factors, self.plan, self._memory(whose))

    def _round_plan(self) -> RoundPlan:
        """Steps, learning rates and averages of the round.

        Raises:
            ConfigError: if the averages do not fit into the round.
        """
        plan, seed, every = self.plan, self.terms.seed, self.config.average_every
        steps = {}
        for i in self.jobs:
            held = plan.batch_size
            if not plan.steps:
                with suppress(ValueError):  # nothing to train on: said when the client is opened
                    held = len(self.context.examples_of(i, plan, seed))
            steps[i] = num_steps(held, plan)
        length = max(steps.values())
        if every and length % every:
            raise ConfigError(
                f"strategy.average_every={every} does not divide the round's {length} steps "
                "(client.steps): a round ends with an average"
            )
        of_clients = self._rates(length, plan)
        if self.config.client_schedule == "constant":
            of_clients = [plan.lr] * length
        return RoundPlan(
            starts={i: o.adapter for i, o in self.inits.items()},
            done={i: int(self.state["done"][i]) for i in self.jobs},
            steps=steps,
            server_rates=self._rates(length, replace(plan, lr=self.config.server_lr or plan.lr)),
            client_rates=of_clients,
            average_after=frozenset(range(every, length, every)) if every else frozenset(),
            norm_factor=self.channel.norm_factor,
        )

    def _rates(self, length: int, plan: LocalPlan) -> list[float]:
        horizon, done = self.config.horizon, int(self.state["steps"])
        if not horizon:
            return learning_rates(length, plan)
        rates = learning_rates(horizon, plan)
        return [rates[min(done + k, horizon - 1)] for k in range(length)]

    def _average(self, adapters: Mapping[int, Adapter]) -> Mapping[int, Adapter]:
        """Average adapters within a round, by the same rule as at its end."""
        updates = [
            Update(
                self.jobs[i].client,
                LowRankPayload(adapters[i]),
                self.jobs[i].client.num_examples,
            )
            for i in sorted(adapters)
        ]
        now = self._with_server(dict(self.state))
        after = self.method.aggregate(now, updates)
        for i, trainable in self.server.trainables.items():
            if i == HOST:
                trainable.load(unpack(after, float(after["alpha"]), SERVER))
            else:
                trainable.load(self.copy_of(after, self.jobs[i].client))
        self.state = after
        starts: dict[int, Adapter] = {}
        for i in adapters:
            start = self.method.client_start(after, self.jobs[i].client)
            assert isinstance(start, Mapping)
            starts[i] = start
        return starts

    def _with_server(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state with the present values of the server's adapters."""
        for i, trainable in self.server.trainables.items():
            if i == HOST:
                state |= server_state(trainable.adapter())
            else:
                state |= pack(trainable.adapter(), f"{COPIES}{i}/")
                state[f"{COPIES}{i}/order"] = order(trainable.adapter())
        return state

    def _after(self, found: Mapping[int, Finished], length: int) -> State:
        """The state at the end of the exchanges."""
        state = self._with_server(dict(self.state))
        state["steps"] = state["steps"] + length
        done = state["done"].clone()
        for i, end in found.items():
            done[i] = end.done
        state["done"] = done
        if self.config.memory == "keep":
            for i, end in found.items():
                state |= prefixed(end.optimizer_state, f"{MEMORY}{i}/")
            for i, trainable in self.server.trainables.items():
                whose = "server/" if i == HOST else f"server{i}/"
                state |= prefixed(trainable.optimizer_state(), f"{MEMORY}{whose}")
        return state
