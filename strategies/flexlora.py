r"""FlexLoRA: average the full-size updates, then give each client what its rank can hold.

    W ← Σ_k p_k s_k B_k A_k = U S Vᵀ        s_k = alpha / r_k,  p_k = n_k / Σ_j n_j
    a client of rank r starts from  B = U[:, :r] S[:r] / s_r,  A = V[:, :r]ᵀ:  s_r B A = T_r(W)

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", arXiv:2402.11505. Options from later work: ``weighting=covered`` is raFLoRA's
(arXiv:2602.13486), ``residual=carry`` follows FedHL (arXiv:2505.18494), ``train=b`` is FedSVD (Lee
et al., NeurIPS 2025, arXiv:2505.12805): clients train B alone, over an A of orthonormal rows that
is made anew every round. Where the authors' code and paper differ, see docs/fidelity.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedlora.algebra.init import INITS, initial_factors
from fedlora.algebra.linalg import (
    BACKENDS,
    SPLITS,
    SVD,
    client_weights,
    complete,
    coverage,
    covered_weights,
    factors_of_rank,
    normalize,
    stack,
    svd,
    svd_of_product,
)
from fedlora.algebra.server_optimizer import NoServerOptimizer, ServerOptimizer
from fedlora.algebra.state import (
    Kept,
    State,
    integers,
    order,
    paths,
    prefixed,
    scalar,
    under,
)
from fedlora.algebra.summand import Product, Summands, product_change
from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import Payload
from fedlora.core.types import Adapter, Client, Factors, LocalPlan, Ranks, Setting, Update
from fedlora.server.method import Setup
from strategies.base import LoRAStrategy

GLOBAL, SERVER, ROUND = "global/", "server/", "round"


def stacked(
    factors: Sequence[Factors], p: Sequence[float], weighting: str
) -> tuple[Tensor, Tensor]:
    """``(Bs, As)`` with ``Bs As = W``, every rank index weighted as ``weighting`` says."""
    if weighting == "covered":
        return stack(factors, covered_weights(p, [f.rank for f in factors]))
    return stack(factors, p)


def left_behind(w: SVD, p: Sequence[float], ranks: Sequence[int], weighting: str) -> SVD:
    """``W - Σ_k p_k T_{r_k}(W)``: what the cohort could not hold, without its zero directions.

    Direction ``i`` keeps the share of the clients whose rank is at most ``i``.
    """
    held = coverage(p, ranks)
    if weighting == "covered":
        held = (held > 0).to(held.dtype)
    kept = torch.ones(w.rank, dtype=torch.float64)
    n = min(w.rank, held.shape[0])
    kept[:n] -= held[:n]
    kept[kept < 1e-12] = 0.0
    alive = kept > 0
    return SVD(u=w.u[:, alive], s=w.s[alive] * kept[alive].to(w.s.dtype), v=w.v[alive])


def over(sent: Adapter, start: Adapter) -> Adapter:
    """What clients that train ``B`` alone have sent, over the ``A`` that they were sent."""
    return {path: replace(f, a=start[path].a.to(f.b.dtype)) for path, f in sent.items()}


def on_rows(b: Tensor, a: Tensor, rows: Tensor) -> SVD:
    """``B A = C V`` for given rows ``V [k, n]`` that span those of the product: ``C``'s columns,
    scaled to one, with their lengths, in place of singular vectors and values."""
    v = rows.to(torch.promote_types(rows.dtype, a.dtype))
    c = b.to(v.dtype) @ (a.to(v.dtype) @ torch.linalg.pinv(v))  # [m, k]
    lengths = c.norm(dim=0)
    unit = c / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    return SVD(u=unit, s=lengths, v=v.clone())


@dataclass(frozen=True, eq=False, kw_only=True)
class FlexLoRA(LoRAStrategy):
    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    train: str = "both"
    """The factors that clients train: ``both``, or ``b`` (FedSVD)."""
    period: int = 1
    """Rounds between two SVDs under ``train=b``; in between, ``A`` stays."""
    init_a: str = "kaiming"
    """The first ``A``: ``kaiming``, or ``orthonormal`` rows that span the same."""
    weighting: str = "all"
    """The clients over which a rank index is averaged: ``all``, or those ``covered`` by their
    rank."""
    svd_split: str = "b"
    """Which factor holds the singular values: ``b``, ``balanced`` or ``a``."""
    residual: str = "drop"
    """The part of the average that exceeds all ranks: ``drop`` it, or ``carry`` it to the next
    round."""
    backend: str = "auto"
    """Backend of the SVD: ``auto``, ``dense``, ``core``, ``gram``, or ``random``, which keeps no
    more of ``W`` than the population's largest rank holds and therefore goes with ``residual=drop``
    only.
    """
    server_optimizer: ServerOptimizer = field(default_factory=NoServerOptimizer)
    """Acts on ``W``, dense; then the SVD is dense too."""

    def __post_init__(self) -> None:
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        one_of("strategy.train", self.train, ("both", "b"))
        one_of("strategy.init_a", self.init_a, INITS)
        one_of("strategy.weighting", self.weighting, ("all", "covered"))
        one_of("strategy.svd_split", self.svd_split, SPLITS)
        one_of("strategy.residual", self.residual, ("drop", "carry"))
        one_of("strategy.backend", self.backend, BACKENDS)
        if self.backend == "random" and self.residual == "carry":
            raise ValueError(
                "strategy.backend='random' drops whatever is beyond the population's largest rank, "
                "which strategy.residual='carry' promises to keep: choose residual=drop, or "
                "backend=auto, dense, core or gram"
            )
        at_least("strategy.period", self.period, 1)
        if self.period > 1 and (self.train != "b" or self._steps):
            raise ValueError(
                f"strategy.period={self.period} keeps the A that clients have frozen, with "
                "strategy.train=b and no server optimizer, whose step leaves its rows: choose "
                "strategy.period=1, or strategy.train=b strategy/server_optimizer=none"
            )
        if self.train == "b" and self.svd_split != "b":
            raise ValueError(
                f"strategy.train=b with strategy.svd_split={self.svd_split}: the singular values "
                "belong to the factor that is trained, over an A of orthonormal rows; choose "
                "strategy.svd_split=b, or strategy.train=both"
            )

    def check(self, setup: Setup) -> None:
        super().check(setup)
        if self.train == "b" and not (setup.client.train_a and setup.client.train_b):
            raise ValueError(
                f"client.train_a={setup.client.train_a}, client.train_b={setup.client.train_b}: "
                "strategy.train=b says that clients train B; leave both true"
            )

    def init_state(self, setting: Setting) -> State:
        first = initial_factors(setting, setting.max_ranks, self.init_a)
        a0 = {path: f.a for path, f in first.items()}
        nothing = {m.path: torch.zeros(m.d_out, m.d_in) for m in setting.modules}
        state: dict[str, Tensor] = {
            "alpha": scalar(setting.alpha),
            f"{GLOBAL}order": order(a0),
        }
        for m in setting.modules:
            empty = SVD(torch.zeros(m.d_out, 0), torch.zeros(0), torch.zeros(0, m.d_in))
            state |= _module_state(m.path, empty, a0[m.path])
        if self.period > 1:
            state[ROUND] = integers(0)
        return state | prefixed(self.server_optimizer.init(nothing), SERVER)

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        return self._at(state, client.ranks)

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        return replace(base, train_a=False) if self.train == "b" else base

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p = normalize(self.reference_weights(updates))
        sent = [u.adapter for u in updates]
        if self.train == "b":
            sent = [
                over(f, self._at(state, u.client.ranks)) for u, f in zip(updates, sent, strict=True)
            ]
        averages = {
            path: self._average(_svd(state, path), [s[path] for s in sent], p)
            for path in paths(state, "s", GLOBAL)
        }
        return self._next(state, averages)

    @property
    def needs_updates(self) -> str:
        if self.residual == "drop" or self.weighting == "covered":
            return (
                f"strategy.residual={self.residual}, strategy.weighting={self.weighting}: the new "
                "W depends on the ranks that were drawn, not on a sum of changes alone; choose "
                "strategy.residual=carry and strategy.weighting=all"
            )
        return ""

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """The changes of ``s B A``, as products, if ``residual=carry``.

        Otherwise the new ``W`` holds the average of the starts ``T_{r_k}(W)``, which depends on the
        ranks that were drawn; so it does with the weights of ``weighting=covered``.
        """
        if self.needs_updates:
            return None
        assert isinstance(start, Mapping)
        sent = over(update.adapter, start) if self.train == "b" else update.adapter
        return {p: product_change(p, start[p], f) for p, f in sent.items()}

    def adds_state(self, state: State) -> State:
        """Nothing: a client knows its start."""
        return {}

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """``W + total / weight``, then its SVD."""
        averages = {}
        for path in paths(state, "s", GLOBAL):
            old, change = _svd(state, path), total[path]
            if not isinstance(change, Product):  # a postprocessor made it dense
                w = old.dense() + change / weight
                averages[path] = (w, torch.eye(w.shape[1], dtype=w.dtype))
                continue
            root = old.s.sqrt()
            b = torch.cat([old.u * root, change.b / weight], dim=1)  # [m, k + j]
            averages[path] = (b, torch.cat([root[:, None] * old.v, change.a]))
        return self._next(state, averages)

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        kept = {key: t for key, t in state.items() if not key.startswith(SERVER)}
        memory = prefixed(self.server_optimizer.init(delta), SERVER)
        return _replaced(kept | memory, {path: svd(w) for path, w in delta.items()})

    def global_update(self, state: State, ranks: Ranks | None = None) -> Adapter:
        if ranks is not None:
            return self._at(state, ranks)
        whole = {path: _svd(state, path) for path in paths(state, "s", GLOBAL)}
        return self._at(state, Ranks({path: max(1, w.rank) for path, w in whole.items()}))

    @property
    def _steps(self) -> bool:
        """Whether a server optimizer acts on ``W``."""
        return not isinstance(self.server_optimizer, NoServerOptimizer)

    def _at(self, state: State, ranks: Ranks) -> dict[str, Factors]:
        alpha = float(state["alpha"])
        return {
            path: factors_of_rank(
                _svd(state, path), r, alpha, self.svd_split, state[f"{GLOBAL}{path}/v"]
            )
            for path, r in ranks.items()
        }

    def _average(
        self, old: SVD, factors: Sequence[Factors], p: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """One module's new ``W`` as a product."""
        b, a = stacked(factors, p, self.weighting)
        if self.residual == "carry":
            rest = left_behind(old, p, [f.rank for f in factors], self.weighting)
            root = rest.s.sqrt()
            b = torch.cat([b, (rest.u * root).to(b.dtype)], dim=1)
            a = torch.cat([a, (root[:, None] * rest.v).to(a.dtype)])
        return b, a

    def _next(self, state: State, averages: Mapping[str, tuple[Tensor, Tensor]]) -> State:
        """The state whose ``W`` are these products, after the server optimizer."""
        if self._steps:
            return self._server_step(state, averages)
        if self.period > 1:
            state = dict(state) | {ROUND: state[ROUND] + 1}
            if int(state[ROUND]) % self.period:
                frozen = {path: state[f"{GLOBAL}{path}/v"] for path in averages}
                return _replaced(
                    state, {path: on_rows(b, a, frozen[path]) for path, (b, a) in averages.items()}
                )
        top = {path: state[f"{GLOBAL}{path}/a0"].shape[0] for path in averages}
        return _replaced(
            state,
            {
                path: svd_of_product(b, a, self.backend, top[path])
                for path, (b, a) in averages.items()
            },
        )

    def _server_step(self, state: State, averages: Mapping[str, tuple[Tensor, Tensor]]) -> State:
        old = {path: _svd(state, path).dense() for path in averages}
        mean = {path: b @ a for path, (b, a) in averages.items()}
        new, memory = self.server_optimizer.step(old, mean, under(state, SERVER))
        kept = {key: t for key, t in state.items() if not key.startswith(SERVER)}
        return _replaced(kept | prefixed(memory, SERVER), {path: svd(w) for path, w in new.items()})


def _svd(state: State, path: str) -> SVD:
    u, s, v = (state[f"{GLOBAL}{path}/{name}"] for name in "usv")
    return SVD(u=u, s=s, v=v[: s.shape[0]])


def _module_state(path: str, w: SVD, a0: Tensor) -> dict[str, Tensor]:
    """``u [d_out, k]``, ``s [k]``, ``v [max(k, r_max), d_in]`` and ``a0 [r_max, d_in]``.

    Rows of ``v`` beyond ``k`` are what clients of a larger rank start ``A`` from: orthonormal to
    the first ``k`` and to each other, or ``a0`` itself as long as there is no update.
    """
    v = complete(w.v, a0) if w.rank else a0.clone()  # a file of tensors cannot share memory
    return {f"{GLOBAL}{path}/{name}": t for name, t in zip("usv", (w.u, w.s, v), strict=True)} | {
        f"{GLOBAL}{path}/a0": a0
    }


def _replaced(state: State, updates: Mapping[str, SVD]) -> State:
    new = dict(state)
    for path, w in updates.items():
        new |= _module_state(path, w, state[f"{GLOBAL}{path}/a0"])
    return new
