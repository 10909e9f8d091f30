"""The values of federated LoRA: immutable dataclasses that validate their fields.

Nothing here computes more than a property, reads a file or knows Flower. Symbols follow the
papers: a client ``k`` holds factors ``A_k [r, d_in]`` and ``B_k [d_out, r]`` of each adapted
linear layer and adds ``(alpha / r) B_k A_k`` to its frozen weight ``W [d_out, d_in]``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

from torch import Tensor

from fedlora.core.checks import at_least, fraction, one_of
from fedlora.core.choice import Chosen, IndexChoice
from fedlora.core.example_privacy import ExamplePrivacy
from fedlora.core.metric import Metric, Scorer
from fedlora.core.payload import Payload, plain_factors
from fedlora.core.recall import Recall
from fedlora.core.technique import Technique, default_technique
from fedlora.core.terms import LocalTerm


@dataclass(frozen=True)
class Module:
    """One linear layer of the base model that carries an adapter."""

    path: str
    """The name in ``model.named_modules()``, for example ``model.layers.0.self_attn.q_proj``."""
    kind: Literal["attention", "mlp"]
    d_out: int
    d_in: int

    @property
    def max_rank(self) -> int:
        """The largest rank that means anything: ``min(d_out, d_in)``."""
        return min(self.d_out, self.d_in)


class Ranks(Mapping[str, int]):
    """The rank of every adapted module of one client. Immutable, hashable, ordered by module.

    Equal means the same ranks of the same modules in the same order: states and messages store
    ranks by position. Two clients with equal ``Ranks`` can share one start adapter, which is what
    messages exploit.
    """

    __slots__ = ("_by_path", "_hash")

    def __init__(self, ranks: Mapping[str, int]) -> None:
        for path, r in ranks.items():
            if r < 1:
                raise ValueError(f"rank {r} of {path} must be >= 1")
        self._by_path = dict(ranks)
        self._hash = hash(tuple(self._by_path.items()))

    def __getitem__(self, path: str) -> int:
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self._by_path)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ranks):
            return NotImplemented
        return tuple(self._by_path.items()) == tuple(other._by_path.items())

    def __repr__(self) -> str:
        return f"Ranks({self.label})"

    @property
    def label(self) -> str:
        """Short key for records and tables: ``8``, or ``30/200`` where modules differ.

        Ranks come in the order of the modules in which they first appear: 30 in attention and 200
        in the MLP is not 200 in attention and 30 in the MLP.
        """
        return "/".join(str(r) for r in dict.fromkeys(self._by_path.values()))

    @property
    def text(self) -> str:
        """In words, for messages: ``rank 8``, or ``ranks 30 and 200`` where modules differ."""
        *rest, last = [str(r) for r in dict.fromkeys(self._by_path.values())]
        return f"ranks {', '.join(rest)} and {last}" if rest else f"rank {last}"


@dataclass(frozen=True)
class Factors:
    """One linear layer's low-rank update ``ΔW = (alpha / r) B A``. The scale travels with it."""

    a: Tensor
    """``[r, d_in]``"""
    b: Tensor
    """``[d_out, r]``"""
    alpha: float

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"factors A {tuple(self.a.shape)} and B {tuple(self.b.shape)} do not share a rank: "
                "A must be [r, d_in] and B [d_out, r]"
            )

    @property
    def rank(self) -> int:
        """The shared dimension ``r``."""
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The dense update ``(alpha / r) B A``, ``[d_out, d_in]``."""
        return self.scale * (self.b @ self.a)


Adapter: TypeAlias = Mapping[str, Factors]
"""Module path -> factors, in the order of the model's modules."""


@dataclass(frozen=True)
class Client:
    """A virtual client: who it is, what it can hold, how much data it has."""

    id: int
    ranks: Ranks
    num_examples: int
    """Training examples. Zero: it can be evaluated, never trained."""
    tier: str = ""
    """Name of its resource tier."""


@dataclass(frozen=True)
class Setting:
    """What a strategy may know before round 1."""

    modules: tuple[Module, ...]
    model_parameters: int
    """Parameters of the base model, for budgets relative to them."""
    alpha: float
    clients: tuple[Client, ...]
    """The whole population, ``clients[i].id == i``; ranks are already clamped to the modules."""
    seed: int
    mask: str = ""
    """Identity of a pruned base's zeros (`fedlora.models.masks`); empty: it is dense."""
    density: float = 1.0
    """Fraction of the modules' weights that are not zero."""
    trainable: tuple[int, ...] | None = None
    """Ids of the clients that may be drawn for training; None: all that have examples."""

    @property
    def trained(self) -> tuple[Client, ...]:
        """The clients that may be drawn for training: whatever is a mean over all clients is one
        over these."""
        if self.trainable is None:
            return tuple(c for c in self.clients if c.num_examples)
        return tuple(self.clients[i] for i in self.trainable)

    @property
    def max_ranks(self) -> Ranks:
        """The largest rank of any client, per module."""
        return Ranks({m.path: max(r[m.path] for r in self.rank_patterns) for m in self.modules})

    @property
    def min_ranks(self) -> Ranks:
        """The smallest rank of any client, per module."""
        return Ranks({m.path: min(r[m.path] for r in self.rank_patterns) for m in self.modules})

    @cached_property
    def rank_patterns(self) -> tuple[Ranks, ...]:
        """The distinct rank patterns of the population, in order of first appearance."""
        return tuple(dict.fromkeys(c.ranks for c in self.clients))


@dataclass(frozen=True)
class LocalPlan:
    """What a client does in one round. Methods describe, engines execute."""

    technique: Technique = field(default_factory=default_technique)
    """What a client trains (`fedlora.techniques`)."""
    optimizer: str = "adamw"
    """``adamw`` or ``sgd``; fresh state every round."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    """SGD only."""
    weight_decay: float = 0.0
    """Decoupled for ``adamw``, L2 for ``sgd`` (as in PyTorch)."""
    schedule: str = "linear"
    """``linear`` to zero, ``cosine`` to zero or ``constant``, within the round, after warm-up."""
    warmup: float = 0.0
    """Fraction of the round's steps over which the learning rate rises linearly from zero."""
    epochs: int = 1
    steps: int = 0
    """If positive, exactly this many optimizer steps (data cycled or cut); else whole epochs."""
    batch_size: int = 4
    """Examples per optimizer step."""
    micro_batch_size: int = 0
    """Examples per forward; 0: the whole batch. Gradients accumulate with token weights, so that
    without dropout the result does not depend on it (up to rounding). With dropout every forward
    draws masks of its own: another division into forwards is another draw."""
    group_by_length: bool = False
    """Whether examples of like length share a batch (`fedlora.data.batches.epoch_order`)."""
    max_examples: int = 0
    """If positive, a client draws at most so many of its training examples each round."""
    max_grad_norm: float = 1.0
    """Global gradient norm bound; 0: no clipping."""
    dropout: float = 0.05
    """Dropout probability of the adapter's input."""
    loss: str = "full"
    """Tokens with a loss: ``full`` (prompt and response) or ``response``."""
    autocast: str = "none"
    """``none`` or ``bf16``."""
    train_a: bool = True
    train_b: bool = True
    term: LocalTerm | None = None
    """One term of the local objective that refers to the start of the round."""
    choice: IndexChoice | None = None
    """Which rank indices train, set by strategies; None: all."""
    privacy: ExamplePrivacy | None = None
    """Set by ``privacy=example``: every step bounds each example's part and adds noise; None: not.
    """

    def __post_init__(self) -> None:
        one_of("client.optimizer", self.optimizer, ("adamw", "sgd"))
        one_of("client.schedule", self.schedule, ("linear", "cosine", "constant"))
        one_of("client.loss", self.loss, ("full", "response"))
        one_of("client.autocast", self.autocast, ("none", "bf16"))
        at_least("client.lr", self.lr, 0)
        at_least("client.epochs", self.epochs, 1)
        at_least("client.steps", self.steps, 0)
        at_least("client.batch_size", self.batch_size, 1)
        at_least("client.micro_batch_size", self.micro_batch_size, 0)
        at_least("client.max_examples", self.max_examples, 0)
        at_least("client.max_grad_norm", self.max_grad_norm, 0)
        at_least("client.weight_decay", self.weight_decay, 0)
        at_least("client.momentum", self.momentum, 0)
        at_least("client.eps", self.eps, 0, strict=True)
        fraction("client.warmup", self.warmup)
        fraction("client.dropout", self.dropout)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"client.betas={list(self.betas)} must be two numbers in [0, 1)")
        if not (self.train_a or self.train_b):
            raise ValueError(
                "client.train_a=false and client.train_b=false: a client would train nothing; one "
                "of the two must be true"
            )


@dataclass(frozen=True)
class EvaluatePlan:
    """What is measured on a client's held-out examples."""

    split: str = "test"
    max_examples: int = 0
    """Examples per client; 0: all."""
    batch_size: int = 8
    generate: bool = True
    """Greedy generation after the prompt, for the metrics that need texts."""
    max_new_tokens: int = 32
    metrics: tuple[Scorer, ...] | None = None
    """What is measured; None: `fedlora.evaluation.scorers.DEFAULT`."""

    def __post_init__(self) -> None:
        one_of("evaluate.split", self.split, ("train", "eval", "test"))
        at_least("evaluate.max_examples", self.max_examples, 0)
        at_least("evaluate.batch_size", self.batch_size, 1)
        at_least("evaluate.max_new_tokens", self.max_new_tokens, 1)
        for metric in self.metrics or ():
            if not isinstance(metric, Scorer):
                raise ValueError(
                    f"evaluate.plan.metrics: {type(metric).__name__} is no metric; it must be a "
                    "dataclass derived from fedlora.core.metric.Scorer"
                )


@dataclass(frozen=True)
class TrainJob:
    """One client's work in one round."""

    seed: int
    round: int
    client: Client
    start: Payload
    plan: LocalPlan
    residual: Mapping[str, Tensor] | None = None
    """The rounding error of the client's changes on the wire, summed so far; ``None``: not
    tracked (`fedlora.wire.change`)."""
    sent: Payload | None = None
    """What travels as its start, where that is rounded; None: the start itself. Its client trains
    from this, and its change is added to the start."""
    chosen: Chosen | None = None
    """The rank indices that train, by the plan's choice. The engine that executes the job decides
    them, so that they never travel to a client; None: not decided, or there is no choice."""
    recall: Recall | None = None
    """What a client on a machine of its own takes up from what it keeps there; None: what it keeps
    is kept for it."""


@dataclass(frozen=True)
class EvaluateJob:
    """One client's evaluation of an adapter (``None``: the base model as it is)."""

    seed: int
    round: int
    client: Client
    adapter: Payload | None
    plan: EvaluatePlan


@dataclass(frozen=True)
class Update:
    """What a client sends back."""

    client: Client
    """The client with the ranks of its payload: smaller than at the start after self-pruning."""
    payload: Payload
    num_examples: int
    """Its weight in the aggregation: training examples it holds (``n_k``)."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    residual: Mapping[str, Tensor] | None = None
    """The new rounding error on the wire; ``None``: not tracked."""
    sent_bytes: int = 0
    """Bytes of the array in which its change came (`fedlora.wire.tensors`); 0: values came."""

    @cached_property
    def adapter(self) -> Adapter:
        """The payload, which must be low-rank factors, or a plain mapping of them."""
        if isinstance(self.payload, Mapping):
            return self.payload
        factors = plain_factors(self.payload)
        if factors is None:
            kind = type(self.payload).__name__
            raise TypeError(f"client {self.client.id} sent a {kind} where factors are required")
        return factors


@dataclass(frozen=True)
class Expected:
    """What an update is checked against (`Payload.check`)."""

    client: Client
    """The client as enlisted for the round."""
    start: Payload
    """What it started the round from; the shapes come from here."""
    plan: LocalPlan
    density: float = 1.0
    """Density of the server's pruned base, for the message to a client that has another."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one client."""

    client: Client
    metrics: Mapping[str, Metric]
    """Name -> metric: the counts ``examples``, ``tokens_full`` and ``tokens_response``, and what
    the plan asked for."""

    @property
    def scalars(self) -> dict[str, float]:
        """The metrics as plain values of this client."""
        return {name: metric.scalar for name, metric in self.metrics.items()}


@dataclass(frozen=True)
class Failure:
    """A client whose work raised. The round goes on without it."""

    client: Client
    kind: str
    message: str
    traceback: str = ""
