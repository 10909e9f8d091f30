"""A small split federation: a model of four blocks, clients with random examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedlora.batches import num_steps
from fedlora.engine.loop import learning_rates
from fedlora.models.language_model import LanguageModel
from fedlora.models.stages import Stages, block_of
from fedlora.split.batches import Seeds
from fedlora.split.party import Memory, Party
from fedlora.split.protocol import Cut, Opening, Terms
from fedlora.split.rounds import Finished, Itinerary, Link, LocalLink, play
from fedlora.split.server import Guest, Rule, SplitServer
from fedlora.types import Adapter, Factors, Failure, LocalPlan
from tests.fedlora.engine.world import SEED, FakeExample, client, exact, examples
from tests.fedlora.models.networks import VOCABULARY, adapter, wrap

BLOCKS = 4


def llama(double: bool = True) -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    network = LlamaForCausalLM(config)
    return wrap(exact(network) if double else network)


def gpt2(double: bool = True) -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=BLOCKS,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    network = GPT2LMHeadModel(config)
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
    memories: Mapping[int, Memory] = field(default_factory=dict)
    """Of clients; of the server under -1."""
    adapters: Mapping[int, Adapter] = field(default_factory=dict)
    """Of clients and servers where they differ from `whole`; see `memories`."""
    average_after: frozenset[int] = frozenset()
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stages = Stages(self.model)
        self.held = dict(self.held) or {i: examples(7 + i, seed=i) for i in self.clients}

    def cut(self, i: int) -> Cut:
        return self.cuts.get(i, Cut(2))

    def opening(self, i: int) -> Opening:
        own = self.adapters.get(i, part(self.whole, self.cut(i), client=True))
        who = replace(client(own, id=i), num_examples=len(self.held[i]))
        memory = self.memories.get(i, {})
        return Opening(who, self.plan, self.cut(i), self.terms, own, memory)

    def local(self) -> Link:
        openings = {i: self.opening(i) for i in self.clients}
        wire = "float64" if self.model.dtype == torch.float64 else "float32"
        return LocalLink(self.stages, openings, lambda o: self.held[o.client.id], wire)

    def server(self) -> SplitServer:
        each = self.rule.update == "per_client"
        keys = list(self.clients) if each else [-1]
        lowest = min((self.cut(i) for i in self.clients), key=lambda c: c.first)
        parties = {}
        for key in keys:
            cut = self.cut(key) if each else lowest
            own = self.adapters.get(-1 - key if each else -1) or part(self.whole, cut, client=False)
            updates: Any = self.model.updates(own, self.plan.dropout)
            parties[key] = Party(updates, self.plan, self.memories.get(-1 - key if each else -1))
        guests = {
            i: Guest(self.opening(i).client, self.cut(i), Seeds(seed=SEED, client=i))
            for i in self.clients
        }
        return SplitServer(self.stages, parties, guests, self.plan, self.rule, self.terms)

    def itinerary(self) -> Itinerary:
        steps = {i: num_steps(len(self.held[i]), self.plan) for i in self.clients}
        rates = learning_rates(max(steps.values()), self.plan)
        done = {i: self.done.get(i, 0) for i in self.clients}
        starts = {i: self.opening(i).adapter for i in self.clients}
        return Itinerary(starts, done, steps, rates, rates, self.average_after)

    def play(self, link: Link | None = None) -> "Outcome":
        server = self.server()
        found = play(
            link or self.local(), server, self.itinerary(), mean_of_factors, self.said.append
        )
        return Outcome(found, server)


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
        server = self.server.parties[key].adapter()
        return {p: own[p] if p in own else server[p] for p in self.server.model.layers}


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
