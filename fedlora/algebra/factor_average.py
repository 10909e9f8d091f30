r"""Averaging each LoRA factor by itself: the core of FedAvg, FedIT and what mends their average.

    A ← Σ_k p_k A_k        B ← Σ_k p_k B_k

Factors can only be averaged if their shapes agree. In a population of unequal ranks every client
trains the smallest one (the "bucket effect"), or each rank index is averaged over the clients that
have it (``covered``). The pair of the largest rank ``R`` is then the global one, and a client of
rank ``r`` holds its first rows and columns, both times ``sqrt(r / R)``: the same products at the
scale ``alpha / r``. State: ``alpha``, the factors under ``global/``, what the server optimizer
remembers under ``server/``, and ``round`` if factors are aligned.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedlora.algebra.align import aligned
from fedlora.algebra.init import initial_factors
from fedlora.algebra.linalg import (
    at_rank,
    average,
    client_weights,
    factors_of_rank,
    normalize,
    svd,
)
from fedlora.algebra.owners import REFUSE, SMALLEST, at_ranks, common_ranks, mean_change
from fedlora.algebra.ridge import corrected
from fedlora.algebra.server_optimizer import NoServerOptimizer, ServerOptimizer
from fedlora.algebra.state import (
    Kept,
    State,
    integers,
    order,
    pack,
    prefixed,
    scalar,
    under,
    unpack,
)
from fedlora.algebra.summand import Summands, dense, factor_changes
from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import Payload
from fedlora.core.types import Adapter, Client, Factors, Ranks, Setting, Update

GLOBAL, SERVER = "global/", "server/"
COVERED = "covered"


@dataclass(frozen=True, eq=False, kw_only=True)
class FactorAverage:
    """The hooks of a strategy (`strategies.base.LoRAStrategy`) that averages factors."""

    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    heterogeneous: str = "smallest"
    """Clients of unequal rank: all train the ``smallest``; ``covered``: a rank index is averaged
    over the clients that have it; or ``refuse``."""
    align: str = "none"
    """``rotate`` each client's pair towards what it was sent, before it is averaged
    (`fedlora.algebra.align`), or ``none``."""
    align_strength: float = 1.0
    """``λ`` of ``align=rotate``, in [0, 1]."""
    correct: str = "none"
    """Move ``B`` towards the mean of products by ``ridge`` regression (`fedlora.algebra.ridge`), or
    ``none``."""
    ridge: float = 0.1
    """``λ`` of ``correct=ridge`` as a multiple of ``tr(A Aᵀ) / r``, ``>= 0``."""
    server_optimizer: ServerOptimizer = field(default_factory=NoServerOptimizer)
    """Acts on ``A`` and ``B``."""

    def __post_init__(self) -> None:
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        one_of("strategy.heterogeneous", self.heterogeneous, (SMALLEST, COVERED, REFUSE))
        one_of("strategy.align", self.align, ("none", "rotate"))
        one_of("strategy.correct", self.correct, ("none", "ridge"))
        at_least("strategy.ridge", self.ridge, 0)
        if not 0 <= self.align_strength <= 1:
            raise ValueError(f"strategy.align_strength={self.align_strength!r} must lie in [0, 1]")
        if self.correct == "ridge" and self.heterogeneous == COVERED:
            raise ValueError(
                "strategy.correct=ridge moves B towards the mean over all clients, and "
                "strategy.heterogeneous=covered averages over those that have a rank index: choose "
                "strategy.heterogeneous=smallest, or strategy.correct=none"
            )

    def init_state(self, setting: Setting) -> State:
        """The common initialisation at the population's smallest rank per module, or the largest.

        Raises:
            ValueError: if clients hold unequal ranks and that was to be refused.
        """
        ranks = common_ranks(setting, self.heterogeneous, COVERED)
        return self._state(initial_factors(setting, ranks), setting.alpha, round=0)

    def enlist(self, state: State, client: Client) -> Client:
        """The client at the rank that all clients train, or at its own."""
        if self.heterogeneous == COVERED:
            return client
        ranks = Ranks({path: state[f"{GLOBAL}{path}/a"].shape[0] for path in client.ranks})
        return at_ranks(client, ranks)

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        found = factors(state)
        if self.heterogeneous != COVERED:
            return found
        return {path: first_of(found[path], r) for path, r in client.ranks.items()}

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        """The weighted average of the updates' factors, passed through the server optimizer."""
        p = normalize(self.reference_weights(updates))
        sent = [self._aligned(state, u) for u in updates]
        mean = {
            path: self._mean(path, old, [s[path] for s in sent], p)
            for path, old in factors(state).items()
        }
        return self._stepped(state, pack(mean))

    @property
    def inexact(self) -> str:
        return "it averages A and B each by itself"

    @property
    def needs_updates(self) -> str:
        if self.heterogeneous == COVERED:
            return (
                "strategy.heterogeneous=covered divides by the weights of the clients that have a "
                "rank index; choose strategy.heterogeneous=smallest"
            )
        if self.correct == "ridge":
            return "strategy.correct=ridge needs clients' products; choose strategy.correct=none"
        return ""

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """The changes of ``A`` and ``B`` at the common rank."""
        if self.needs_updates:
            return None
        assert isinstance(start, Mapping)
        found: dict[str, Tensor] = {}
        for path, f in self._aligned(state, update).items():
            found |= factor_changes(path, start[path], f)
        return found

    def adds_state(self, state: State) -> State:
        """The state if factors are aligned to it; otherwise nothing: a client knows its start."""
        return {} if self.align == "none" else state

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """The factors plus ``total / weight``, passed through the server optimizer."""
        old = pack(factors(state))
        return self._stepped(state, {k: t + dense(total[k]) / weight for k, t in old.items()})

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """The state whose update is ``T_r`` of the given dense update, at the rank that it has.

        Directions beyond the rank of ``delta`` keep the rows of ``A`` that they have.
        """
        alpha = float(state["alpha"])
        start = {
            path: factors_of_rank(svd(delta[path]), f.rank, alpha, "b", f.a)
            for path, f in factors(state).items()
        }
        return self._state(start, alpha, round=int(state.get("round", 0)))

    def global_update(self, state: State, ranks: Ranks | None = None) -> Adapter:
        """The global factors as they are, or at other ranks: the same update, or what clients of
        unequal rank have of it."""
        found = factors(state)
        if ranks is None:
            return found
        cut = first_of if self.heterogeneous == COVERED else at_rank
        return {path: cut(found[path], r) for path, r in ranks.items()}

    def _aligned(self, state: State, update: Update) -> Adapter:
        """What a client sent, turned towards what it started from: ``A`` after odd rounds, counted
        from 0, and ``B`` after even ones."""
        if self.align == "none":
            return update.adapter
        start = self.client_start(state, update.client)
        by = "a" if int(state["round"]) % 2 else "b"
        return {
            path: aligned(f, start[path], by, self.align_strength)
            for path, f in update.adapter.items()
        }

    def _mean(
        self, path: str, old: Factors, sent: Sequence[Factors], p: Sequence[float]
    ) -> Factors:
        """One module's average."""
        if self.heterogeneous == COVERED:
            return covered_average(old, sent, p)
        mean = average(sent, p)
        if mean.a.shape != old.a.shape:
            raise ValueError(
                f"{path}: clients sent rank {mean.rank}, the global rank is {old.rank}"
            )
        return corrected(mean, sent, p, self.ridge) if self.correct == "ridge" else mean

    def _stepped(self, state: State, mean: Mapping[str, Tensor]) -> State:
        old = pack(factors(state))
        new, memory = self.server_optimizer.step(old, mean, under(state, SERVER))
        kept = {key: state[key] for key in ("alpha", f"{GLOBAL}order")}
        if self.align == "rotate":
            kept["round"] = state["round"] + 1
        return kept | prefixed(new, GLOBAL) | prefixed(memory, SERVER)

    def _state(self, start: Adapter, alpha: float, round: int) -> State:
        packed = pack(start)
        return (
            {"alpha": scalar(alpha), f"{GLOBAL}order": order(start)}
            | ({"round": integers(round)} if self.align == "rotate" else {})
            | prefixed(packed, GLOBAL)
            | prefixed(self.server_optimizer.init(packed), SERVER)
        )


def factors(state: State) -> dict[str, Factors]:
    """The global factors."""
    return unpack(state, float(state["alpha"]), GLOBAL)


def first_of(f: Factors, rank: int) -> Factors:
    """The first ``rank`` rank indices, whose products stay what they are at the scale of the rank.

    Raises:
        ValueError: if there are fewer.
    """
    if rank > f.rank:
        raise ValueError(f"rank {rank} exceeds the global rank {f.rank}")
    if rank == f.rank:
        return f
    root = math.sqrt(rank / f.rank)
    return Factors(root * f.a[:rank], root * f.b[:, :rank], f.alpha)


def covered_average(old: Factors, sent: Sequence[Factors], p: Sequence[float]) -> Factors:
    """Each rank index moved by the mean change of the clients that have it.

    Args:
        old: the global factors, of rank ``R``; a client of rank ``r`` started from their
            `first_of`.
        sent: the clients' factors.
        p: their weights, of sum 1.
    """
    changes_a, changes_b = [], []
    for f in sent:
        start, root = first_of(old, f.rank), math.sqrt(old.rank / f.rank)
        changes_a.append(root * (f.a - start.a))  # [r_k, d_in]
        changes_b.append(root * (f.b - start.b).T)  # [r_k, d_out]
    a, b = (mean_change(c, p, old.rank) for c in (changes_a, changes_b))
    return Factors(old.a + a, old.b + b.T, old.alpha)
