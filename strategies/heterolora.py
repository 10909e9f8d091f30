r"""HeteroLoRA: truncate to send, zero-pad to average, and let clients prune their own ranks.

    send      B[:, :r_k],  A[:r_k, :]
    train     loss + λ Σ_modules ||B[:, tail]||_F ||A[tail, :]||_F, then maybe drop the tail
    average   B ← Σ_k q_k pad(B_k),  A ← Σ_k q_k pad(A_k),   q_k ∝ ||s_k B_k A_k||_F
    change    B ← B + Σ_k p_k pad(√s_k (B_k - B⁰_k)),  A alike: ``average=change``, not the paper's

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA),
arXiv:2401.06432. With unequal ranks the scale ``alpha / r`` is unequal too; ``scale=absorb``
averages ``sqrt(s_k)`` times the factors and divides again on the way out. ``average=change`` needs
no more than a sum of what clients add, and entries that no client trains do not shrink. See
docs/fidelity.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora.algebra.init import initial_a
from fedlora.algebra.linalg import (
    client_weights,
    coverage,
    factors_of_rank,
    normalize,
    product_norm,
    svd,
)
from fedlora.algebra.state import (
    Kept,
    State,
    order,
    paths,
    scalar,
)
from fedlora.algebra.summand import Summands, dense, factor_changes, total
from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import Payload
from fedlora.core.types import Adapter, Client, Factors, LocalPlan, Ranks, Setting, Update
from fedlora.techniques.lora.self_pruning import SelfPrune
from fedlora.techniques.lora.technique import with_pruning
from strategies.base import LoRAStrategy

GLOBAL = "global/"
WEIGHTS = ("sparsity", "examples", "examples_sparsity", "uniform")
SUM_WEIGHTS = ("examples", "uniform")
"""Weights that follow from the client alone, not from what it sent."""


def sparsity_shares(norms: Sequence[float], examples: Sequence[int], weights: str) -> list[float]:
    """``q_k`` by product norm (``sparsity``), ``n_k`` (``examples``), both, or neither
    (``uniform``); all zero: uniform."""
    raw = {
        "uniform": [1.0] * len(norms),
        "sparsity": list(norms),
        "examples": [float(n) for n in examples],
        "examples_sparsity": [n * x for n, x in zip(examples, norms, strict=True)],
    }[weights]
    return normalize(raw if any(raw) else [1.0] * len(raw))


def padded_average(
    factors: Sequence[Factors], q: Sequence[float], rank: int, *, absorb: bool
) -> tuple[Tensor, Tensor]:
    """``Σ q_k pad(A_k) [rank, d_in]`` and ``Σ q_k pad(B_k) [d_out, rank]``.

    With ``absorb``, each factor is multiplied by ``sqrt(s_k)`` first.
    """
    dtype = torch.promote_types(factors[0].a.dtype, torch.float32)
    a = torch.zeros(rank, factors[0].a.shape[1], dtype=dtype)
    b = torch.zeros(factors[0].b.shape[0], rank, dtype=dtype)
    for f, w in zip(factors, q, strict=True):
        c = w * (math.sqrt(f.scale) if absorb else 1.0)
        a[: f.rank] += c * f.a.to(dtype)
        b[:, : f.rank] += c * f.b.to(dtype)
    return a, b


@dataclass(frozen=True, eq=False, kw_only=True)
class HeteroLoRA(LoRAStrategy):
    gamma: float = 0.99
    """Share of a client's rank that is not its tail."""
    penalty_weight: float = 1e-3
    """``λ`` of the regulariser."""
    min_rank: int = 1
    """No module is pruned below this."""
    prune: bool = True
    """Regularise the tail and prune ranks; false: neither, ranks stay."""
    weights: str = "sparsity"
    """``sparsity``, ``examples``, ``examples_sparsity`` or ``uniform``."""
    norm_scope: str = "layer"
    """The norm in a weight is of one ``layer`` (each has its own weights) or the ``model``."""
    scale: str = "absorb"
    """``absorb`` ``sqrt(alpha / r)`` into the averaged factors, or average them ``raw``."""
    uncovered: str = "keep"
    """Rank indices that no client returned: ``keep`` them, or ``zero`` ``B`` and restart ``A``."""
    average: str = "value"
    """Average the ``value`` of factors, as published, or the ``change`` from what clients started
    from."""

    def __post_init__(self) -> None:
        one_of("strategy.weights", self.weights, WEIGHTS)
        one_of("strategy.average", self.average, ("value", "change"))
        one_of("strategy.norm_scope", self.norm_scope, ("layer", "model"))
        one_of("strategy.scale", self.scale, ("absorb", "raw"))
        one_of("strategy.uncovered", self.uncovered, ("keep", "zero"))
        at_least("strategy.min_rank", self.min_rank, 1)
        at_least("strategy.penalty_weight", self.penalty_weight, 0)
        if not 0 < self.gamma <= 1:
            raise ValueError(f"strategy.gamma={self.gamma!r} must lie in (0, 1]")
        if self.average == "change":
            self._check_change()

    def _check_change(self) -> None:
        refused = (
            ("weights", self.weights, self.weights not in SUM_WEIGHTS, "uniform or examples"),
            ("prune", self.prune, self.prune, "false"),
            ("uncovered", self.uncovered, self.uncovered != "keep", "keep"),
        )
        for name, value, wrong, instead in refused:
            if wrong:
                raise ValueError(
                    f"strategy.{name}={value} with strategy.average=change: the sum of changes "
                    "knows neither the norms nor the ranks of those who sent them; choose "
                    f"strategy.{name}={instead}, or strategy.average=value"
                )

    def init_state(self, setting: Setting) -> State:
        top = setting.max_ranks
        state: dict[str, Tensor] = {
            "alpha": scalar(setting.alpha),
            f"{GLOBAL}order": order(top),
            "ranks": torch.tensor(
                [list(c.ranks.values()) for c in setting.clients], dtype=torch.int32
            ),
        }
        for m in setting.modules:
            r = top[m.path]
            a0 = initial_a(setting.seed, m, r)
            fresh = torch.full((r,), int(self.average == "value"), dtype=torch.uint8)
            a = a0 * self._gain(setting.alpha, r) if self.average == "change" else a0.clone()
            state |= _module_state(m.path, a, torch.zeros(m.d_out, r), a0, fresh)
        return state

    def enlist(self, state: State, client: Client) -> Client:
        """The client with the ranks that its pruning has left it."""
        if not self.prune:
            return client
        now = state["ranks"][client.id].tolist()
        ranks = Ranks(dict(zip(client.ranks, now, strict=True)))
        return client if ranks == client.ranks else replace(client, ranks=ranks)

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        return {path: self._truncate(state, path, r) for path, r in client.ranks.items()}

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        if not self.prune:
            return base
        prune = SelfPrune(weight=self.penalty_weight, gamma=self.gamma, min_rank=self.min_rank)
        return with_pruning(base, prune)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        if self.average == "change":
            weights = self.reference_weights(updates)
            terms = [self._changes(state, self.client_start(state, u.client), u) for u in updates]
            return self.absorb(state, total(terms, weights), math.fsum(weights))
        return self._averages(state, updates)

    def _averages(self, state: State, updates: Sequence[Update]) -> State:
        names = list(updates[0].adapter)
        factors = {path: [u.adapter[path] for u in updates] for path in names}
        norms = {path: [self._norm(f) for f in factors[path]] for path in names}
        if self.norm_scope == "model":
            whole = [math.hypot(*(norms[path][k] for path in names)) for k in range(len(updates))]
            norms = dict.fromkeys(names, whole)
        examples = [u.num_examples for u in updates]
        new = dict(state)
        for path in names:
            q = sparsity_shares(norms[path], examples, self.weights)
            new |= self._average(state, path, factors[path], q)
        if self.prune:
            ranks = state["ranks"].clone()
            for u in updates:
                ranks[u.client.id] = torch.tensor(list(u.client.ranks.values()), dtype=ranks.dtype)
            new["ranks"] = ranks
        return new

    @property
    def inexact(self) -> str:
        return "it averages A and B each by itself"

    @property
    def needs_updates(self) -> str:
        if self.average == "value":
            return (
                "strategy.average=value: clients' factors are averaged, not their changes; choose "
                "strategy.average=change with strategy.prune=false and "
                "strategy.weights=examples or uniform"
            )
        return ""

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """The changes of ``√s A`` and ``√s B``, padded to the largest rank, if
        ``average=change``."""
        if self.average == "value":
            return None
        assert isinstance(start, Mapping)
        return self._changes(state, start, update)

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        new = dict(state)
        for key, change in total.items():
            new[f"{GLOBAL}{key}"] = state[f"{GLOBAL}{key}"] + dense(change) / weight
        return new

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        """Examples, unless all count alike: weights by norm are no property of a client."""
        return client_weights(updates, "uniform" if self.weights == "uniform" else "examples")

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """Clients of any rank ``r`` start from ``T_r``: singular directions are nested.

        Raises:
            ValueError: with ``scale=raw`` where ranks are unequal, for one pair of raw factors
                cannot mean the same at two scales.
        """
        alpha, new = float(state["alpha"]), dict(state)
        unequal = bool((state["ranks"] != state["ranks"][:1]).any())
        if self.scale == "raw" and unequal:
            raise ValueError(
                "strategy.scale='raw' cannot continue from a given update at unequal ranks: "
                "choose scale=absorb"
            )
        for path, w in delta.items():
            a0 = state[f"{GLOBAL}{path}/a0"]
            top = a0.shape[0]
            f = factors_of_rank(svd(w), top, alpha, "b", a0)
            c = self._gain(alpha, top)
            fresh = (f.b == 0).all(dim=0).to(torch.uint8)
            if self.average == "change":
                fresh = torch.zeros_like(fresh)
            a = torch.where(fresh.bool()[:, None], f.a, c * f.a)
            new |= _module_state(path, a, c * f.b, a0, fresh)
        return new

    def global_update(self, state: State, ranks: Ranks | None = None) -> Adapter:
        if ranks is None:
            whole = {path: state[f"{GLOBAL}{path}/a0"] for path in paths(state, "a0", GLOBAL)}
            ranks = Ranks({path: a0.shape[0] for path, a0 in whole.items()})
        return {path: self._truncate(state, path, r) for path, r in ranks.items()}

    def _gain(self, alpha: float, rank: int) -> float:
        """The factor by which A and B of a rank are multiplied in the state."""
        return math.sqrt(alpha / rank) if self.scale == "absorb" else 1.0

    def _changes(self, state: State, start: Adapter, update: Update) -> dict[str, Tensor]:
        """Per module ``a [r_max, d_in]`` and ``b [d_out, r_max]``. A client has every rank index
        below its own, so the padding comes after them."""
        found: dict[str, Tensor] = {}
        for path, f in update.adapter.items():
            moved = factor_changes(path, start[path], f)
            c = self._gain(f.alpha, f.rank)
            missing = state[f"{GLOBAL}{path}/a0"].shape[0] - f.rank
            found[f"{path}/a"] = pad(c * moved[f"{path}/a"], (0, 0, 0, missing))
            found[f"{path}/b"] = pad(c * moved[f"{path}/b"], (0, missing))
        return found

    def _norm(self, f: Factors) -> float:
        return product_norm(f.b, f.a) * (f.scale if self.scale == "absorb" else 1.0)

    def _truncate(self, state: State, path: str, rank: int) -> Factors:
        """The first ``rank`` global rows and columns, with the scale of that rank taken out."""
        alpha = float(state["alpha"])
        a, b, fresh = (state[f"{GLOBAL}{path}/{name}"] for name in ("a", "b", "fresh"))
        if rank > a.shape[0]:
            raise ValueError(f"{path}: rank {rank} exceeds the global rank {a.shape[0]}")
        a, b = a[:rank], b[:, :rank]
        if self.scale == "absorb":
            root = self._gain(alpha, rank)
            a, b = torch.where(fresh[:rank, None].bool(), a, a / root), b / root
        return Factors(a=a.clone(), b=b.clone(), alpha=alpha)

    def _average(
        self, state: State, path: str, factors: Sequence[Factors], q: Sequence[float]
    ) -> dict[str, Tensor]:
        """One module's new state; rank indices of zero total weight count as uncovered."""
        old_a, old_b, a0, old_fresh = (
            state[f"{GLOBAL}{path}/{name}"] for name in ("a", "b", "a0", "fresh")
        )
        top = a0.shape[0]
        a, b = padded_average(factors, q, top, absorb=self.scale == "absorb")
        covered = torch.zeros(top, dtype=torch.bool)
        cover = coverage(q, [f.rank for f in factors])
        covered[: cover.shape[0]] = cover > 0
        if self.uncovered == "keep":
            rest_a, rest_b, rest_fresh = old_a, old_b, old_fresh
        else:
            rest_a, rest_b, rest_fresh = a0, torch.zeros_like(old_b), torch.ones_like(old_fresh)
        return _module_state(
            path,
            torch.where(covered[:, None], a, rest_a.to(a.dtype)),
            torch.where(covered, b, rest_b.to(b.dtype)),
            a0,
            torch.where(covered, torch.zeros_like(old_fresh), rest_fresh),
        )


def _module_state(path: str, a: Tensor, b: Tensor, a0: Tensor, fresh: Tensor) -> dict[str, Tensor]:
    """``a [r_max, d_in]``, ``b [d_out, r_max]``, ``a0`` and ``fresh [r_max]``.

    A fresh row of ``a`` comes from the initialisation: no scale was absorbed into it, so none is
    taken out when it is sent.
    """
    named = {"a": a, "b": b, "a0": a0, "fresh": fresh}
    return {f"{GLOBAL}{path}/{name}": t for name, t in named.items()}
