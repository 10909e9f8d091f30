r"""SLoRA (the federated method, not the serving system S-LoRA): sparse first, then low-rank.

    stage 1   client k trains the coordinates of mask_k:  D ← D + Σ_k p_k mask_k ∘ (D_k - D)
    then      D = U S Vᵀ over the unchanged base W_0:  B = U[:, :r] S[:r] / s_r,  A = V[:, :r]ᵀ
    stage 2   LoRA rounds from there, by the rule of ``aggregator``

Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models",
arXiv:2308.06522. The masks are ``u < density_k`` with one uniform ``u`` for all clients, hence
nested; where the authors' code and paper differ, see docs/fidelity.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.algebra.linalg import client_weights, normalize
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
from fedlora.algebra.summand import Summands, dense
from fedlora.core.checks import (
    at_least,
    fraction,
    one_of,
)
from fedlora.core.payload import Payload
from fedlora.core.seeding import mask_noise
from fedlora.core.types import (
    Adapter,
    Client,
    LocalPlan,
    Ranks,
    Setting,
    Update,
)
from fedlora.server.method import Setup
from fedlora.techniques.sparse.payload import SparseDelta
from fedlora.techniques.sparse.technique import Sparse
from strategies.base import LoRAStrategy

SPARSE, NESTED = "sparse/", "aggregator/"

CODE_DENSITY = {"T1": 0.0012, "T2": 0.0246, "T3": 0.0822, "T4": 0.1222}
"""Density by tier, as in the FlexLoRA code: fractions of a 1.3 B model (T1 and T2 as
misprinted)."""


def lora_share(ranks: Ranks, shapes: Mapping[str, tuple[int, int]], parameters: int) -> float:
    """LoRA parameters at these ranks over the base model's parameters, at most 1."""
    lora = sum(r * sum(shapes[path]) for path, r in ranks.items())
    return min(1.0, lora / parameters)


def sparse_step(
    delta: Tensor,
    noise: Tensor,
    values: Sequence[Tensor],
    densities: Sequence[float],
    p: Sequence[float],
    rule: str,
) -> Tensor:
    """``D + Σ_k p_k mask_k ∘ (D_k - D)``; by ``coverage``, divided by ``Σ_k p_k mask_k``.

    Args:
        delta: ``[d_out, d_in]``, the server's ``D``.
        noise: ``[d_out, d_in]``; ``mask_k = noise < densities[k]``.
        values: per client ``[nnz_k]``, its ``D_k`` on its mask in row-major order.
        densities: per client.
        p: per client, summing to 1.
        rule: ``plain`` or ``coverage``.
    """
    change = torch.zeros(delta.numel(), dtype=torch.promote_types(values[0].dtype, delta.dtype))
    cover = torch.zeros_like(change)
    old, u = delta.reshape(-1), noise.reshape(-1)
    for density in sorted(set(densities)):
        at = (u < density).nonzero().squeeze(1)
        group = [k for k, d in enumerate(densities) if d == density]
        for k in group:
            change[at] += p[k] * (values[k] - old[at])
        cover[at] += sum(p[k] for k in group)
    if rule == "coverage":
        change = torch.where(cover > 0, change / cover, change)
    return (old + change).reshape(delta.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class SLoRA(LoRAStrategy):
    aggregator: LoRAStrategy
    """The method of stage 2."""
    stage1_rounds: int = 5
    """Rounds of sparse training; 0: stage 2 from the start."""
    density: str = "budget"
    """A client's fraction of trained coordinates: its LoRA ``budget``, the constants by tier of the
    released ``code``, or one number for all clients."""
    sparse_average: str = "plain"
    """``plain``: a client that does not train a coordinate counts with the server's value;
    ``coverage``: only clients that train a coordinate count."""
    weights: str = "examples"
    """Weights of clients in stage 1: ``examples`` (``n_k``) or ``uniform``."""
    stage1_lr_scale: float = 1.0
    """Stage 1's learning rate divided by the client's, which already includes the round's decay."""

    def __post_init__(self) -> None:
        one_of("strategy.sparse_average", self.sparse_average, ("plain", "coverage"))
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        at_least("strategy.stage1_rounds", self.stage1_rounds, 0)
        at_least("strategy.stage1_lr_scale", self.stage1_lr_scale, 0, strict=True)
        if self.density not in ("budget", "code"):
            self._constant_density()

    def check(self, setup: Setup) -> None:
        super().check(setup)
        self.aggregator.check(setup)
        term = setup.client.term
        if self.stage1_rounds and term is not None and term.needs_factors:
            raise ValueError(
                f"client.term.metric=product with strategy.stage1_rounds={self.stage1_rounds}: "
                "stage 1 trains coordinates of the weights, not factors; use "
                "client.term.metric=factor, or strategy.stage1_rounds=0"
            )

    def init_state(self, setting: Setting) -> State:
        nested = self.aggregator.init_state(setting)
        state = {"rounds": integers(0)} | prefixed(nested, NESTED)
        if not self.stage1_rounds:
            return state
        zero = {m.path: torch.zeros(m.d_out, m.d_in) for m in setting.modules}
        self.aggregator.adopt(nested, zero)  # refused here rather than after stage1_rounds rounds
        patterns = setting.rank_patterns
        state |= {
            f"{SPARSE}order": order(zero),
            f"{SPARSE}seed": integers(setting.seed),
            f"{SPARSE}parameters": integers(setting.model_parameters),
            f"{SPARSE}patterns": torch.tensor([list(p.values()) for p in patterns]),
            f"{SPARSE}densities": torch.stack(
                [scalar(self._density_of(p, setting)) for p in patterns]
            ),
        }
        return state | {f"{SPARSE}{path}/delta": d for path, d in zero.items()}

    def enlist(self, state: State, client: Client) -> Client:
        if self._sparse(state):
            return client
        return self.aggregator.enlist(under(state, NESTED), client)

    def client_start(
        self, state: State, client: Client, kept: Kept | None = None
    ) -> Payload | Adapter:
        if self._sparse(state):
            return _mask_state(state, self._density(state, client.ranks))
        return self.aggregator.client_start(under(state, NESTED), client, kept)

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        """Stage 1 trains without weight decay: coordinates outside the mask stay bitwise the
        base's."""
        if not self._sparse(state):
            return self.aggregator.plan(under(state, NESTED), client, base)
        lr = self.stage1_lr_scale * base.lr
        return replace(base, technique=Sparse(), weight_decay=0.0, lr=lr)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        done = {"rounds": state["rounds"] + 1}
        nested = under(state, NESTED)
        if not self._sparse(state):
            return done | prefixed(self.aggregator.aggregate(nested, updates), NESTED)
        return self._after_sparse(state, self._sparse_round(state, updates))

    @property
    def inexact(self) -> str:
        return self.aggregator.inexact

    @property
    def beyond_average(self) -> str:
        return self.aggregator.beyond_average

    @property
    def needs_updates(self) -> str:
        if self.stage1_rounds and self.sparse_average == "coverage":
            return (
                "strategy.sparse_average=coverage divides each coordinate by the weight of the "
                "clients that trained it; choose strategy.sparse_average=plain"
            )
        return self.aggregator.needs_updates

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """Stage 1: the change of the values at the coordinates of the largest mask, in row-major
        order; ``None`` for ``coverage``, whose denominator depends on the clients that took part.
        Stage 2: what ``aggregator`` adds."""
        if not self._sparse(state):
            return self.aggregator.adds(under(state, NESTED), start, update)
        if self.sparse_average == "coverage":
            return None
        sent, found = _sparse_payload(update), {}
        assert isinstance(start, SparseDelta)
        for path, values in sent.values.items():
            u, largest = self._largest_mask(state, path)
            change = values - start.values[path]
            wide = change.new_zeros(int(largest.sum()))
            wide[u[largest] < sent.density] = change  # a smaller mask is part of the largest
            found[path] = wide
        return found

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        if not self._sparse(state):
            nested = self.aggregator.absorb(under(state, NESTED), total, weight)
            return {"rounds": state["rounds"] + 1} | prefixed(nested, NESTED)
        delta = {}
        for path in paths(state, "delta", SPARSE):
            old, change = state[f"{SPARSE}{path}/delta"], dense(total[path]) / weight
            _, largest = self._largest_mask(state, path)
            delta[path] = old.to(torch.promote_types(old.dtype, change.dtype), copy=True)
            delta[path][largest] += change
        return self._after_sparse(state, delta)

    def kept(
        self, state: State, client: Client, before: Kept | None, start: Payload, update: Update
    ) -> Kept | None:
        """Nothing in stage 1, then what ``aggregator`` lets the client keep."""
        if self._sparse(state):
            return None
        return self.aggregator.kept(under(state, NESTED), client, before, start, update)

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        if isinstance(updates[0].payload, SparseDelta):
            return client_weights(updates, self.weights)
        return self.aggregator.reference_weights(updates)

    def global_update(self, state: State, ranks: Ranks | None = None) -> Payload | Adapter:
        if not self._sparse(state):
            return self.aggregator.global_update(under(state, NESTED), ranks)
        if ranks is None:
            return _mask_state(state, float(state[f"{SPARSE}densities"].max()))
        return _mask_state(state, self._density(state, ranks))

    def _sparse(self, state: State) -> bool:
        return int(state["rounds"]) < self.stage1_rounds

    def _constant_density(self) -> float:
        try:
            value = float(self.density)
        except ValueError:
            raise ValueError(
                f"strategy.density={self.density!r} is not budget, code or a number in [0, 1]"
            ) from None
        fraction("strategy.density", value)
        return value

    def _density_of(self, pattern: Ranks, setting: Setting) -> float:
        if self.density == "budget":
            shapes = {m.path: (m.d_out, m.d_in) for m in setting.modules}
            return lora_share(pattern, shapes, setting.model_parameters)
        if self.density != "code":
            return self._constant_density()
        tier = next(c.tier for c in setting.clients if c.ranks == pattern)
        if tier not in CODE_DENSITY:
            raise ValueError(
                f"strategy.density=code knows the tiers {sorted(CODE_DENSITY)}, not {tier!r}: "
                "choose density=budget or a number"
            )
        return CODE_DENSITY[tier]

    def _density(self, state: State, ranks: Ranks) -> float:
        """The density of a rank pattern of the population. Any other pattern has the constant
        density or its LoRA budget, because the released code's constants belong to tiers, not
        ranks."""
        row = torch.tensor(list(ranks.values()))
        match = (state[f"{SPARSE}patterns"] == row).all(dim=1)
        if bool(match.any()):
            return float(state[f"{SPARSE}densities"][match][0])
        if self.density not in ("budget", "code"):
            return self._constant_density()
        shapes = {p: state[f"{SPARSE}{p}/delta"].shape for p in ranks}
        plain = {p: (int(m), int(n)) for p, (m, n) in shapes.items()}
        return lora_share(ranks, plain, int(state[f"{SPARSE}parameters"]))

    def _largest_mask(self, state: State, path: str) -> tuple[Tensor, Tensor]:
        """A module's noise and the mask of the population's largest density, ``[d_out, d_in]``."""
        shape = state[f"{SPARSE}{path}/delta"].shape
        u = mask_noise(int(state[f"{SPARSE}seed"]), path, *shape)
        return u, u < float(state[f"{SPARSE}densities"].max())

    def _after_sparse(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """The state after a round of stage 1; after the last one ``aggregator`` goes on."""
        done = {"rounds": state["rounds"] + 1}
        if int(done["rounds"]) == self.stage1_rounds:
            return done | prefixed(self.aggregator.adopt(under(state, NESTED), delta), NESTED)
        return dict(state) | done | {f"{SPARSE}{path}/delta": d for path, d in delta.items()}

    def _sparse_round(self, state: State, updates: Sequence[Update]) -> dict[str, Tensor]:
        p = normalize(self.reference_weights(updates))
        payloads = [_sparse_payload(u) for u in updates]
        densities = [s.density for s in payloads]
        out: dict[str, Tensor] = {}
        for path in paths(state, "delta", SPARSE):
            delta = state[f"{SPARSE}{path}/delta"]
            noise = mask_noise(int(state[f"{SPARSE}seed"]), path, *delta.shape)
            values = [s.values[path] for s in payloads]
            out[path] = sparse_step(delta, noise, values, densities, p, self.sparse_average)
        return out


def _mask_state(state: State, density: float) -> SparseDelta:
    """The server's ``D`` on the mask of one density."""
    seed = int(state[f"{SPARSE}seed"])
    values = {}
    for path in paths(state, "delta", SPARSE):
        d = state[f"{SPARSE}{path}/delta"]
        values[path] = d[mask_noise(seed, path, *d.shape) < density]
    return SparseDelta(seed=seed, density=density, values=values)


def _sparse_payload(update: Update) -> SparseDelta:
    if not isinstance(update.payload, SparseDelta):
        raise TypeError(f"client {update.client.id} sent factors where a SparseDelta is required")
    return update.payload
