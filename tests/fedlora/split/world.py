"""A small split federation: a model of four blocks, clients with random examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import RecordDict

from fedlora.core.rates import learning_rates
from fedlora.core.types import Adapter, Client, Factors, Failure, LocalPlan
from fedlora.data.batches import num_steps
from fedlora.models.language_model import LanguageModel
from fedlora.models.stages import Stages, block_of
from fedlora.server.method import ClientChannel
from fedlora.split.batches import Seeds
from fedlora.split.codec import decode_downs, encode_ups
from fedlora.split.link import MessageLink
from fedlora.split.protocol import Cut, InitMessage, Terms
from fedlora.split.rounds import Finished, Link, LocalLink, RoundPlan, run_exchanges
from fedlora.split.server import ClientInfo, Rule, SplitServer
from fedlora.split.trainable import OptimizerState, TrainableStage
from fedlora.split.worker import SplitWorker
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.wire.rows import Wire
from tests.fedlora.engine.world import SEED, FakeExample, client, exact, examples
from tests.fedlora.models import networks
from tests.fedlora.models.networks import adapter, wrap

BLOCKS = 4
DOUBLE = Terms(SEED, activations=Wire("fp64"), gradients=Wire("fp64"))
SGD = LocalPlan(
    optimizer="sgd",
    lr=1.0,
    steps=1,
    batch_size=3,
    schedule="constant",
    max_grad_norm=0.0,
    dropout=0.0,
)
"""One plain step: what an adapter moves by is its gradient."""


def llama(double: bool = True) -> LanguageModel:
    network = networks.llama(BLOCKS)
    return wrap(exact(network) if double else network)


def gpt2(double: bool = True) -> LanguageModel:
    network = networks.gpt2(BLOCKS)
    return wrap(exact(network) if double else network)


MODELS = {"llama": llama, "gpt2": gpt2}


def start(on: LanguageModel, rank: Any = 2, seed: int = 1) -> Adapter:
    """An adapter of every module, in the type that the model trains in."""
    return adapter(on.info.modules, rank, seed, dtype=on.dtype)


def part(whole: Adapter, cut: Cut, *, client: bool) -> Adapter:
    """What the client, or the server, holds of an adapter."""
    return {path: f for path, f in whole.items() if cut.owns(block_of(path) or 0, BLOCKS) == client}


@dataclass
class Federation:
    """A split of some clients; every field has the plainest value."""

    model: LanguageModel
    plan: LocalPlan
    whole: Adapter
    """What everybody starts from."""
    clients: Sequence[int] = (0,)
    cuts: Mapping[int, Cut] = field(default_factory=dict)
    rule: Rule = field(default_factory=Rule)
    terms: Terms = field(default_factory=lambda: Terms(SEED))
    held: Mapping[int, list[FakeExample]] = field(default_factory=dict)
    done: Mapping[int, int] = field(default_factory=dict)
    optimizer_states: Mapping[int, OptimizerState] = field(default_factory=dict)
    """Of clients; of the server under -1."""
    adapters: Mapping[int, Adapter] = field(default_factory=dict)
    """Of clients and servers where they differ from `whole`; see `optimizer_states`."""
    average_after: frozenset[int] = frozenset()
    norm_factor: float = 0.0
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stages = Stages(self.model)
        self.held = dict(self.held) or {i: examples(7 + i, seed=i) for i in self.clients}

    def cut(self, i: int) -> Cut:
        return self.cuts.get(i, Cut(2))

    def init(self, i: int) -> InitMessage:
        own = self.adapters.get(i, part(self.whole, self.cut(i), client=True))
        who = replace(client(LowRankPayload(own), id=i), num_examples=len(self.held[i]))
        memory = self.optimizer_states.get(i, {})
        return InitMessage(who, self.plan, self.cut(i), self.terms, own, memory, 1)

    @property
    def wire(self) -> str:
        """Number format that changes no adapter."""
        return "float64" if self.model.dtype == torch.float64 else "float32"

    @property
    def inits(self) -> dict[int, InitMessage]:
        return {i: self.init(i) for i in self.clients}

    def local(self) -> LocalLink:
        return LocalLink(self.stages, self.inits, lambda o: self.held[o.client.id], self.wire)

    def messages(self, models: Sequence[LanguageModel] = (), nodes: int = 1) -> MessageLink:
        """Through Flower records; each model is another process, and they take turns."""
        workers = [
            SplitWorker(Stages(m), lambda o: self.held[o.client.id]) for m in models or [self.model]
        ]
        return MessageLink(FakeChannel(workers, nodes, self.wire), self.inits)

    def server(self) -> SplitServer:
        each = self.rule.update == "per_client"
        keys = list(self.clients) if each else [-1]
        lowest = min((self.cut(i) for i in self.clients), key=lambda c: c.first)
        trainables = {}
        for key in keys:
            cut = self.cut(key) if each else lowest
            own = self.adapters.get(-1 - key if each else -1) or part(self.whole, cut, client=False)
            updates: Any = LowRankPayload(own).updates(self.model, self.plan.dropout)
            trainables[key] = TrainableStage(
                updates, self.plan, self.optimizer_states.get(-1 - key if each else -1)
            )
        clients = {
            i: ClientInfo(self.init(i).client, self.cut(i), Seeds(seed=SEED, client=i))
            for i in self.clients
        }
        return SplitServer(self.stages, trainables, clients, self.plan, self.rule, self.terms)

    def round_plan(self) -> RoundPlan:
        steps = {i: num_steps(len(self.held[i]), self.plan) for i in self.clients}
        rates = learning_rates(max(steps.values()), self.plan)
        done = {i: self.done.get(i, 0) for i in self.clients}
        starts = {i: self.init(i).adapter for i in self.clients}
        return RoundPlan(starts, done, steps, rates, rates, self.average_after, self.norm_factor)

    def play(self, link: Link | None = None) -> "Outcome":
        server = self.server()
        found = run_exchanges(
            link or self.local(), server, self.round_plan(), mean_of_factors, self.said.append
        )
        return Outcome(found, server)


@dataclass
class FakeChannel(ClientChannel):
    """Nodes, and processes that serve their messages in turn; answers come last first."""

    workers: Sequence[SplitWorker]
    nodes: int
    wire: str
    turn: Callable[[int], int] = lambda n: n * n // 3
    """Which process serves the n-th message: often another than the last, sometimes the same."""
    worker: str = "{}"
    source: str = ""

    def __post_init__(self) -> None:
        self.states = [RecordDict() for _ in range(self.nodes)]
        self.records: list[RecordDict] = []
        """All that was sent, either way."""
        self.served = 0

    def say(self, line: str) -> None:
        raise NotImplementedError

    def on_step(self, step: int, steps: int, loss: float) -> None:
        raise NotImplementedError

    def exchange(
        self,
        clients: Sequence[Client],
        action: str,
        content: Callable[[Sequence[Client]], RecordDict],
    ) -> list[tuple[Sequence[Client], RecordDict | str]]:
        assert action == "split"
        found: list[tuple[Sequence[Client], RecordDict | str]] = []
        for node, state in enumerate(self.states):
            who = [c for c in clients if c.id % self.nodes == node]
            if who:
                found.insert(0, (who[::-1], self._answer(content(who[::-1]), state)))
        return found

    def _answer(self, request: RecordDict, state: RecordDict) -> RecordDict:
        asked = decode_downs(request)
        worker = self.workers[self.turn(self.served) % len(self.workers)]
        self.served += 1
        reply = encode_ups(worker.answer(asked, state), wire=asked.wire, nonce=asked.nonce)
        self.records += [request, reply]
        return reply


@dataclass
class Outcome:
    found: Mapping[int, Finished | Failure]
    server: SplitServer

    def client(self, i: int = 0) -> Finished:
        found = self.found[i]
        assert isinstance(found, Finished), found
        return found

    def whole(self, i: int = 0) -> dict[str, Factors]:
        """A client's adapters and the server's that belong to them, in module order."""
        own = self.client(i).adapter
        key = i if self.server.rule.update == "per_client" else -1
        server = self.server.trainables[key].adapter()
        return {p: own[p] if p in own else server[p] for p in self.server.model.layers}


def gradient(before: Adapter, after: Adapter) -> dict[str, torch.Tensor]:
    """What a step of `SGD` has subtracted."""
    start = named(dict(before))
    return {name: start[name] - t for name, t in named(dict(after)).items()}


def mean_of_factors(adapters: Mapping[int, Adapter]) -> Mapping[int, Adapter]:
    """The plain average of everybody's factors."""
    n, first = len(adapters), next(iter(adapters.values()))
    mean = {
        path: Factors(
            sum((a[path].a for a in adapters.values()), torch.zeros_like(f.a)) / n,
            sum((a[path].b for a in adapters.values()), torch.zeros_like(f.b)) / n,
            f.alpha,
        )
        for path, f in first.items()
    }
    return dict.fromkeys(adapters, mean)


def named(adapters: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    return {f"{p}/{n}": t for p, f in adapters.items() for n, t in (("a", f.a), ("b", f.b))}


def assert_same(a: Adapter, b: Adapter) -> None:
    """Bit by bit."""
    left, right = named(dict(a)), named(dict(b))
    assert list(left) == list(right)
    for name, t in left.items():
        assert torch.equal(t, right[name]), f"{name}: {float((t - right[name]).abs().max()):.3g}"


def assert_near(a: Adapter, b: Adapter, tolerance: float) -> None:
    """Within a share of the norm."""
    left, right = named(dict(a)), named(dict(b))
    assert list(left) == list(right)
    for name, t in left.items():
        error, norm = float((t - right[name]).norm()), float(right[name].norm())
        assert error <= tolerance * norm, f"{name}: {error:.3g} of {norm:.3g}"


def assert_equal(a: Outcome, b: Outcome) -> None:
    """Two rounds, bit by bit: every client and the server, adapters, memory and numbers."""
    assert a.found.keys() == b.found.keys()
    for i, x in a.found.items():
        y = b.found[i]
        assert type(x) is type(y), f"client {i}: {x} and {y}"
        if isinstance(x, Finished) and isinstance(y, Finished):
            assert_same(x.adapter, y.adapter)
            assert_same_state(x.optimizer_state, y.optimizer_state)
            assert x.metrics == y.metrics
            assert x.done == y.done
    for key, trainable in a.server.trainables.items():
        assert_same(trainable.adapter(), b.server.trainables[key].adapter())
        assert_same_state(trainable.optimizer_state(), b.server.trainables[key].optimizer_state())


def assert_same_state(a: OptimizerState, b: OptimizerState) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[name]) for name, t in a.items())
