"""A small exact world for engines: float64 networks, a few clients with random examples."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora.core.payload import Payload, plain_factors
from fedlora.core.types import Adapter, Client, LocalPlan, Ranks, TrainJob
from fedlora.models.language_model import LanguageModel
from fedlora.techniques.lora.payload import LowRankPayload
from tests.fedlora.models.networks import VOCABULARY, adapter, gpt2, llama, wrap
from tests.generators import as_payload

SEED = 11
EOS = 0


@dataclass(frozen=True, eq=False)
class FakeExample:
    input_ids: Any
    prompt_tokens: int
    responses: Any = None
    label: int = -1
    states: Any = None


@dataclass
class FakeStore:
    """Examples by client; every split is the same."""

    held: dict[int, list[FakeExample]]
    texts: dict[int, list[str]] = field(default_factory=dict)
    key: str = "fake"
    folder: Path = Path("fake")
    attach: Any = None

    def with_states(self, attach: Any) -> "FakeStore":
        return replace(self, attach=attach)

    def count(self, client: int, split: str) -> int:
        return len(self.held[client])

    def examples(self, client: int, split: str) -> list[FakeExample]:
        held = list(self.held[client])
        return held if self.attach is None else self.attach(client, split, held)

    def references(self, client: int, split: str) -> list[str]:
        return list(self.texts[client])


def example(ids: list[int], prompt_tokens: int = 1) -> FakeExample:
    return FakeExample(np.array(ids, dtype=np.int32), prompt_tokens)


def examples(n: int, seed: int = 0, longest: int = 12) -> list[FakeExample]:
    """Of unequal length, each with a response of at least one token."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        length = int(rng.integers(4, longest + 1))
        ids = [1, *rng.integers(1, VOCABULARY, length - 2).tolist(), EOS]
        found.append(example(ids, int(rng.integers(1, length - 1))))
    return found


def conversation(of: FakeExample, seed: int = 0) -> FakeExample:
    """The same tokens with several answers: some have a loss, the last one's first among them."""
    answers = np.random.default_rng(seed).random(len(of.input_ids)) < 0.5
    answers[of.prompt_tokens] = True
    return FakeExample(of.input_ids, of.prompt_tokens, answers)


def exact(network: Any) -> Any:
    """The network in float64 throughout: Llama's own norm computes in float32."""
    network = network.double()
    for name, layer in list(network.named_modules()):
        if type(layer).__name__ == "LlamaRMSNorm":
            parent, _, leaf = name.rpartition(".")
            norm = nn.RMSNorm(layer.weight.shape[0], eps=layer.variance_epsilon)
            setattr(network.get_submodule(parent), leaf, norm.double())
    return network


NETWORKS = {"llama": lambda: exact(llama()), "gpt2": lambda: exact(gpt2())}


def model(name: str = "gpt2") -> LanguageModel:
    return wrap(NETWORKS[name]())


def start(on: LanguageModel, rank: Any = 2, seed: int = 1) -> LowRankPayload:
    return adapter(on.info.modules, rank, seed)


def client(factors: Payload | None, id: int = 0, n: int = 7) -> Client:
    low_rank = None if factors is None else plain_factors(factors)
    ranks = {"none": 1} if low_rank is None else {p: f.rank for p, f in low_rank.items()}
    return Client(id, Ranks(ranks), n)


def job(factors: Payload | Adapter, plan: LocalPlan, id: int = 0, round: int = 3) -> TrainJob:
    factors = as_payload(factors)
    return TrainJob(SEED, round, client(factors, id), factors, plan)


def vector(payload: Payload | Adapter) -> torch.Tensor:
    """All numbers of a payload in one row."""
    return torch.cat([t.reshape(-1) for _, t in as_payload(payload).tensors()])


def distance(a: Payload | Adapter, b: Payload | Adapter) -> float:
    return float((vector(a) - vector(b)).norm())
