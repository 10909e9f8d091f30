r"""SPP: clients scale the weights of one pruned model, and no zero of it is ever filled.

    W_k = W ∘ (1 + s F_k)      F_k[i, j] = beta_k[i] alpha_k[g(i), j]      wanted: F = Σ_k p_k F_k

Lu et al., "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models",
arXiv:2405.16057, made federated here. ``F`` is linear in alpha and in beta, not in both:

    alternate   a round trains beta or alpha, the other is common: averages are exact
    beta_only   alpha keeps its initial values from the seed: exact, and the least traffic
    stack       both are trained, and Σ_k p_k F_k is multiplied into W on all sides: exact
    separate    both are trained and averaged by themselves: not exact; the error is measured

All clients hold one mask. A client of smaller rank trains a change of alpha whose rows are repeated
to the common rank, which it must divide: ``F`` is the same at either rank.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.algebra.init import initial_a, sample_a
from fedlora.algebra.linalg import (
    client_weights,
    normalize,
    weighted_sum,
)
from fedlora.algebra.state import (
    Kept,
    State,
    integers,
    order,
    paths,
    scalar,
)
from fedlora.algebra.summand import Summands, dense
from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import Payload
from fedlora.core.seeding import torch_seed
from fedlora.core.types import Client, Ranks, Setting, Update
from fedlora.server.method import Setup
from fedlora.techniques.spp.payload import MaskedScale
from fedlora.techniques.spp.scale import (
    factor,
    mean_factor,
    nested_rank,
    repeat_rows,
)
from fedlora.techniques.spp.technique import Scaling
from strategies.base import LoRAStrategy

log = logging.getLogger(__name__)

GLOBAL, MERGED = "global/", "merged/"
MODES = ("alternate", "beta_only", "stack", "separate")


@dataclass(frozen=True, eq=False, kw_only=True)
class SPP(LoRAStrategy):
    technique = Scaling

    mode: str = "alternate"
    """``alternate``, ``beta_only``, ``stack`` or ``separate`` (not exact)."""
    schedule: tuple[str, ...] = ("beta", "alpha")
    """The factors that successive rounds of ``alternate`` train. A round of beta sends much less
    than a round of alpha; alpha has no gradient while beta is zero."""
    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    heterogeneous: str = "nest"
    """For ranks that do not divide the population's largest: ``nest`` takes the largest smaller
    rank that does, ``refuse`` raises an error."""
    merge_every: int = 0
    """Rounds between two merges: server and clients multiply the factors into W and start new ones,
    so that the total update is not limited by the rank; 0: never. ``stack`` merges every round."""

    def __post_init__(self) -> None:
        one_of("strategy.mode", self.mode, MODES)
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        one_of("strategy.heterogeneous", self.heterogeneous, ("nest", "refuse"))
        at_least("strategy.merge_every", self.merge_every, 0)
        for phase in self.schedule:
            one_of("strategy.schedule", phase, ("alpha", "beta"))
        if not self.schedule or self.schedule[0] != "beta":
            raise ValueError(
                f"strategy.schedule={list(self.schedule)} must begin with beta: alpha has no "
                "gradient while beta is zero"
            )
        if self.mode == "stack" and self.merge_every > 1:
            raise ValueError(
                f"strategy.merge_every={self.merge_every} with strategy.mode=stack, which merges "
                "every round: leave it 0"
            )
        if self.mode == "alternate" and self.merge_every % len(self.schedule):
            raise ValueError(
                f"strategy.merge_every={self.merge_every} must be a multiple of the "
                f"{len(self.schedule)} rounds of strategy.schedule, which begins anew with beta"
            )
        if self.mode == "separate":
            log.warning(
                "strategy.mode=separate averages alpha and beta separately, which is not the "
                "average of the clients' updates: every round records the error (spp/residual); "
                "mode=alternate is exact"
            )

    def check(self, setup: Setup) -> None:
        super().check(setup)
        plan = setup.client
        if not (plan.train_a and plan.train_b):
            raise ValueError(
                "strategy=spp decides which factors a round trains: leave client.train_a and "
                "client.train_b true, and set strategy.mode or strategy.schedule"
            )
        if plan.term is not None and plan.term.needs_factors:
            raise ValueError(
                "client.term.metric=product compares products B A, and strategy=spp trains alpha "
                "and beta: use client.term.metric=factor"
            )
        if setup.quantization != "none":
            raise ValueError(
                f"model.quantization={setup.quantization} with strategy=spp: quantised weights "
                "cannot be scaled one by one; use model.quantization=none"
            )
        if setup.wire == "bfloat16" and (self.mode == "stack" or self.merge_every):
            how = "strategy.mode=stack" if self.mode == "stack" else "strategy.merge_every"
            raise ValueError(
                f"federation.wire=bfloat16 with {how}: clients would multiply rounded factors into "
                "W and the server the factors themselves; use federation.wire=float32"
            )

    def init_state(self, setting: Setting) -> State:
        if not setting.mask:
            raise ValueError(
                "strategy=spp scales the weights of a pruned model, and this one is dense: use "
                "model=pruned (model@model.base=... is what it prunes)"
            )
        top = setting.max_ranks
        if self.heterogeneous == "refuse":
            _require_nested(setting, top)
        state: dict[str, Tensor] = {
            "alpha": scalar(setting.alpha),
            "mask": integers(list(setting.mask.encode())),
            "seed": integers(setting.seed),
            "round": integers(0),
            "weights": integers(_nonzero(setting)),
            "residual": scalar(0.0),
            f"{GLOBAL}order": order(top),
        }
        for m in setting.modules:
            state[f"{GLOBAL}{m.path}/alpha"] = initial_a(setting.seed, m, top[m.path])
            state[f"{GLOBAL}{m.path}/beta"] = torch.zeros(m.d_out)
        return state

    def enlist(self, state: State, client: Client) -> Client:
        """The client at ranks that divide the common ones."""
        top = _tops(state)
        ranks = Ranks({p: nested_rank(r, top[p]) for p, r in client.ranks.items()})
        return client if ranks == client.ranks else replace(client, ranks=ranks)

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> MaskedScale:
        whole, trains = self.global_update(state), self._trains(state)
        if self.mode == "beta_only":
            return replace(whole, alpha={}, seed=_drawn_from(state), trains=trains)
        if self.mode == "stack":
            alpha = {p: a[: client.ranks[p]].clone() for p, a in whole.alpha.items()}
            return replace(whole, alpha=alpha, trains=trains)
        smaller = {p: r for p, r in client.ranks.items() if r < whole.blocks[p]}
        return replace(whole, tied={} if trains == "beta" else smaller, trains=trains)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p = normalize(self.reference_weights(updates))
        sent = [_scale_of(u) for u in updates]
        new = dict(state) | {"round": state["round"] + 1}
        lost, moved, merge = 0.0, 0.0, _next_merge(state)
        for path in paths(state, "alpha", GLOBAL):
            alpha, beta = (state[f"{GLOBAL}{path}/{name}"] for name in ("alpha", "beta"))
            alphas = [_alpha(s, path, alpha) for s in sent]
            betas = [s.beta.get(path, beta) for s in sent]
            if self.mode == "stack":
                new |= _merge(f"{merge}{path}", len(alpha), alphas, betas, p)
                continue
            trains = self._trains(state)
            if trains != "beta":
                new[f"{GLOBAL}{path}/alpha"] = weighted_sum(alphas, p)
            if trains != "alpha":
                new[f"{GLOBAL}{path}/beta"] = weighted_sum(betas, p)
            if trains == "both":
                mean = mean_factor(alphas, betas, p)
                kept = factor(*(new[f"{GLOBAL}{path}/{name}"] for name in ("alpha", "beta")))
                lost += float((mean - kept).square().sum())
                moved += float((mean - factor(alpha, beta)).square().sum())
        new["residual"] = scalar((lost / moved) ** 0.5 if moved else 0.0)
        return self._next(state, new)

    @property
    def inexact(self) -> str:
        if self.mode == "separate":
            return "its mode=separate averages alpha and beta each by itself"
        return ""

    @property
    def needs_updates(self) -> str:
        if self.mode in ("stack", "separate"):
            return (
                f"strategy.mode={self.mode} trains alpha and beta at once, and no sum says what "
                "their product became; choose strategy.mode=alternate or beta_only"
            )
        return ""

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """The change of alpha or beta, whichever is trained, at the common rank; with both trained
        there is no sum that says what clients learnt."""
        trains = self._trains(state)
        if trains == "both":
            return None
        sent, begun, found = _scale_of(update), start, {}
        assert isinstance(begun, MaskedScale)
        for path in paths(state, "alpha", GLOBAL):
            if trains == "beta":
                found[f"{path}/beta"] = sent.beta[path] - begun.beta[path]
            else:
                before = begun.alpha[path]
                found[f"{path}/alpha"] = _alpha_change(sent, path, before)
        return found

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        new = dict(state) | {"round": state["round"] + 1, "residual": scalar(0.0)}
        for key, change in total.items():
            new[f"{GLOBAL}{key}"] = state[f"{GLOBAL}{key}"] + dense(change) / weight
        return self._next(state, new)

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def report(self, state: State) -> Mapping[str, float | int | str]:
        """What the last round trained, the number of merges, and the error of the averages."""
        before = dict(state) | {"round": state["round"] - 1}
        found: dict[str, float | int | str] = {
            "spp/mask": _mask(state),
            "spp/trained": self._trains(before),
            "spp/merges": len(_merges(state)),
        }
        if self.mode == "separate":
            found["spp/residual"] = float(state["residual"])
        return found

    def global_update(self, state: State, ranks: Ranks | None = None) -> MaskedScale:
        """The common factors: their effect is the same at every rank."""
        names = paths(state, "alpha", GLOBAL)
        return MaskedScale(
            mask=_mask(state),
            lora_alpha=float(state["alpha"]),
            blocks=_tops(state),
            alpha={p: state[f"{GLOBAL}{p}/alpha"] for p in names},
            beta={p: state[f"{GLOBAL}{p}/beta"] for p in names},
            merges=_merges(state),
        )

    def _trains(self, state: State) -> str:
        if self.mode == "alternate":
            return self.schedule[int(state["round"]) % len(self.schedule)]
        return "beta" if self.mode == "beta_only" else "both"

    def _next(self, before: State, averaged: dict[str, Tensor]) -> State:
        """The state after averages, with merges where they are due."""
        after = self._restart(averaged)
        _warn_of_growth(before, after)
        return after

    def _restart(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state after a merge: beta is zero and alpha has new initial values."""
        due = self.merge_every and int(state["round"]) % self.merge_every == 0
        if not due and self.mode != "stack":
            return state
        new, top, merge = dict(state), _tops(state), _next_merge(state)
        for path, r in top.items():
            alpha, beta = (state[f"{GLOBAL}{path}/{name}"] for name in ("alpha", "beta"))
            if self.mode != "stack":
                new |= _merge(f"{merge}{path}", r, [alpha], [beta], [1.0])
        seed = _drawn_from(new)
        for path, r in top.items():
            alpha, beta = (state[f"{GLOBAL}{path}/{name}"] for name in ("alpha", "beta"))
            new[f"{GLOBAL}{path}/alpha"] = sample_a(seed, path, r, alpha.shape[1])
            new[f"{GLOBAL}{path}/beta"] = torch.zeros_like(beta)
        return new


def _tops(state: State) -> dict[str, int]:
    """Module path -> rank of the common factors."""
    names = paths(state, "alpha", GLOBAL)
    return {p: int(state[f"{GLOBAL}{p}/alpha"].shape[0]) for p in names}


def _mask(state: State) -> str:
    return bytes(state["mask"].tolist()).decode()


def _require_nested(setting: Setting, top: Ranks) -> None:
    for ranks in setting.rank_patterns:
        for path, r in ranks.items():
            if top[path] % r:
                fit = ", ".join(str(k) for k in range(1, top[path] + 1) if top[path] % k == 0)
                raise ValueError(
                    f"{path}: rank {r} does not divide {top[path]}, the population's largest: "
                    f"choose ranks that do ({fit}), or strategy.heterogeneous=nest"
                )


def _nonzero(setting: Setting) -> int:
    """How many weights of the adapted modules are not zero."""
    return round(setting.density * sum(m.d_out * m.d_in for m in setting.modules))


def _warn_of_growth(before: State, after: State) -> None:
    """Say once that the factors of all merges have become more than the weights they scale."""
    was, now, weights = _merged_numbers(before), _merged_numbers(after), int(after["weights"])
    if was <= weights < now:
        log.warning(
            "the factors of %d merges have %d parameters, more than the %d weights that they "
            "scale: every client is sent all of them, and the checkpoint grows with every "
            "merge; merge seldom (strategy.merge_every), or use mode=alternate",
            len(_names(after)),
            now,
            weights,
        )


def _merged_numbers(state: State) -> int:
    return sum(t.numel() for k, t in state.items() if k.startswith(MERGED))


def _scale_of(update: Update) -> MaskedScale:
    if not isinstance(update.payload, MaskedScale):
        kind = type(update.payload).__name__
        raise TypeError(f"client {update.client.id} sent a {kind} where a MaskedScale is required")
    return update.payload


def _alpha(sent: MaskedScale, path: str, common: Tensor) -> Tensor:
    """A client's alpha at the rank that it trained, or a change of the common one applied."""
    if path in sent.change:
        return common + repeat_rows(sent.change[path], len(common))
    return sent.alpha.get(path, common)


def _alpha_change(sent: MaskedScale, path: str, before: Tensor) -> Tensor:
    """``[r, d_in]``: what a client changed alpha by, at the common rank."""
    if path in sent.change:
        return repeat_rows(sent.change[path], len(before))
    return sent.alpha.get(path, before) - before


def _names(state: State) -> list[str]:
    """The prefixes of what was merged, in order."""
    return sorted({"/".join(k.split("/", 2)[:2]) + "/" for k in state if k.startswith(MERGED)})


def _merges(state: State) -> tuple[Mapping[str, tuple[Tensor, Tensor]], ...]:
    modules = paths(state, "alpha", GLOBAL)
    return tuple(
        {p: (state[f"{name}{p}/alpha"], state[f"{name}{p}/beta"]) for p in modules}
        for name in _names(state)
    )


def _next_merge(state: State) -> str:
    return f"{MERGED}{len(_names(state)):06d}/"


def _merge(
    name: str, top: int, alphas: Sequence[Tensor], betas: Sequence[Tensor], p: Sequence[float]
) -> dict[str, Tensor]:
    """One module's share of a merge: ``Σ_k p_k F_k`` at rank ``top``, with the shares in beta."""
    return {
        f"{name}/alpha": torch.stack([repeat_rows(a, top) for a in alphas]),
        f"{name}/beta": torch.stack([w * b for w, b in zip(p, betas, strict=True)]),
    }


def _drawn_from(state: State) -> int:
    """The seed of alpha: another after every merge."""
    seed, done = int(state["seed"]), len(_names(state))
    return torch_seed(seed, "spp", done) if done else seed
