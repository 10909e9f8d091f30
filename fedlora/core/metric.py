"""A measured value with its weight, and the open base class of everything that measures.

A `Scorer` turns what a model did on one client's examples (`Outputs`) into metrics by name. The
metric itself says how clients are combined, so that no caller has to know its name: the summary
(`fedlora.evaluation.summary`), the wire and the trackers treat all of them alike.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.checks import one_of
from fedlora.core.confusion import Confusion

MEAN, TOTAL, EXP_MEAN, MACRO_F1 = "mean", "total", "exp_mean", "macro_f1"
LOWEST, HIGHEST = "lowest", "highest"
DERIVED = (
    *("_weighted", "_low", "_high", "_worst_tenth", "_std", "_p10", "_p90"),
    *("_gini", "_jain", "_tier_gap"),
)
"""Endings of the names that a summary gives (`fedlora.evaluation.summary`)."""
SPREADS = ("_std", "_gini", "_jain", "_tier_gap")
"""Those of numbers that say how far clients are apart, not how good they are."""
TIER = "tier/"
"""What it begins the names of one tier's metrics with."""
TRAINED, UNTRAINED = "trained/", "untrained/"
"""What it begins the names of metrics with of clients that keep a model of their own, and of those
that have never trained."""


@dataclass(frozen=True)
class Metric:
    """What was measured on one client, and how clients are combined."""

    value: float
    weight: float = 1.0
    """What the value is a mean over: a number of examples or tokens."""
    over_clients: str = MEAN
    """``mean`` (plain, and weighted beside it), ``total`` (the sum; for counts), ``exp_mean``: the
    value is a logarithm, and the exponential of its mean is reported (one client with a loss of 20
    would outweigh all others in a mean of perplexities), or ``macro_f1``: beside the plain mean,
    the score of the summed `counts`."""
    interval: bool = False
    """Whether a summary also bounds the mean by bootstrapping clients."""
    worst: str = ""
    """Which clients are worst off, those with the ``lowest`` or the ``highest`` values. A summary
    then also describes the distribution over clients, and reports every tier of them; empty: it
    does not."""
    counts: Confusion | None = None
    """``macro_f1``: what the value is computed from."""

    def __post_init__(self) -> None:
        one_of("over_clients", self.over_clients, (MEAN, TOTAL, EXP_MEAN, MACRO_F1))
        one_of("worst", self.worst, ("", LOWEST, HIGHEST))
        if (self.counts is not None) != (self.over_clients == MACRO_F1):
            raise ValueError(f"over_clients={self.over_clients!r}: macro_f1 alone has counts")
        if self.worst and self.over_clients in (TOTAL, EXP_MEAN):
            raise ValueError(f"over_clients={self.over_clients!r} has no worst clients")

    @property
    def scalar(self) -> float:
        """The value as it is reported for this client alone."""
        return exponential(self.value) if self.over_clients == EXP_MEAN else self.value


def count(number: float) -> Metric:
    """A number of things, which is summed over clients."""
    return Metric(float(number), over_clients=TOTAL)


def macro_f1(counts: Confusion) -> Metric:
    """The mean F1 of the classes that have an example, which is pooled over clients."""
    return Metric(counts.macro_f1, counts.examples, MACRO_F1, worst=LOWEST, counts=counts)


def exponential(loss: float) -> float:
    """``exp(loss)``, infinite where a float ends."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model did on one client's evaluated examples. Sequences have an entry per example."""

    tokens: Sequence[NDArray[Any]]
    """The true tokens after BOS, ``[t - 1]``; responses end with EOS."""
    response_at: Sequence[int]
    """Index of the first response token in each; the length where truncation left no response."""
    nll: Sequence[Tensor]
    """Negative log-likelihood of each of these tokens, ``[t - 1]`` float64, on the CPU."""
    best: Sequence[Tensor]
    """The most likely token in the place of each, ``[t - 1]``, on the CPU."""
    decode: Callable[[NDArray[Any]], str]
    """Token ids as text, without special tokens."""
    references: Sequence[str] = ()
    """The response texts, uncut; empty without generation."""
    generated: Sequence[str] = ()
    """What the model wrote after each prompt; empty without generation."""
    truncated: int = 0
    """Prompts that were cut to leave room in the context."""
    labels: Sequence[str] = ()
    """Class names of a classifier, in the order of their index. `tokens` and `best` are then the
    one label of each example, true and predicted, and `nll` the true one's; empty: tokens."""

    @property
    def examples(self) -> int:
        """How many there are: at least one."""
        return len(self.tokens)

    @property
    def tokens_full(self) -> int:
        """All tokens after BOS."""
        return sum(len(loss) for loss in self.nll)

    @property
    def tokens_response(self) -> int:
        """Tokens of responses."""
        return sum(len(loss) - at for loss, at in zip(self.nll, self.response_at, strict=True))


@dataclass(frozen=True)
class Held:
    """What a client is evaluated on, as the server knows it."""

    examples: int
    tokens_full: int
    """All tokens after BOS; of a classifier, one label an example."""
    tokens_response: int
    """Those of them that belong to responses."""
    classes: int = 0
    """How many there are in the data; 0: it has no labels."""
    labels: Mapping[int, int] = field(default_factory=dict)
    """Class -> examples, without those that have none."""


@dataclass(frozen=True)
class Due:
    """What the server holds a metric to when a client sends it."""

    over: str = "examples"
    """Which number of `Held` is its weight; where that is 0, the metric is left out."""
    highest: float = math.inf
    """The largest value that it can have; the smallest is 0."""
    better: str = ""
    """Whether its ``lowest`` or its ``highest`` values are better; empty: it does not say. Early
    stopping asks (``federation.better``)."""


class Scorer(ABC):
    """One entry of ``evaluate.plan.metrics``: a frozen dataclass, found by its ``_target_``."""

    dues: ClassVar[Mapping[str, Due]] = MappingProxyType({})
    """What is known of every metric that it gives. Empty: nothing is; such metrics may be over at
    most as many examples or tokens as the client holds, and are trusted otherwise."""

    needs_texts: ClassVar[bool] = False
    """Whether it reads ``outputs.generated``; such a scorer is left out without generation."""
    reads_labels: ClassVar[bool] = False
    """Whether it is of predicted labels; such a scorer is left out for a language model, and all
    others are for a classifier."""

    @abstractmethod
    def score(self, outputs: Outputs) -> Mapping[str, Metric]:
        """Metrics by name, of one client. What cannot be measured on it is left out."""

    def contradiction(self, metrics: Mapping[str, Metric], held: Held) -> str:
        """What is wrong with a client's metrics by what the server knows; empty: nothing.

        Args:
            metrics: all that the client sent, by name.
            held: what it is evaluated on.
        """
        for name, due in self.dues.items():
            weight, found = getattr(held, due.over), metrics.get(name)
            if (found is None) != (weight == 0):
                return f"its metric {name} is {'missing' if weight else 'of nothing'}"
            if found is None:
                continue
            if found.weight != weight:
                return f"its metric {name} is over {found.weight:g} {due.over}, it has {weight}"
            if math.isfinite(found.value) and not 0 <= found.value <= due.highest:
                return f"its metric {name} is {found.value!r}, expected 0 to {due.highest:g}"
        return ""
