r"""SCAFFOLD and FedDyn: FedIT whose clients correct their gradient for where the others would go.

    SCAFFOLD  client  gradient += c - c_k                  c_k ← c_k - c + (x - y_k) / Σ_j η_j
              server  x ← Σ_k p_k y_k                      c ← c + Σ_k q_k (new c_k - old c_k)
    FedDyn    client  gradient += a (θ - x) - g_k          g_k ← g_k - a (y_k - x)
              server  h ← h - a Σ_k q_k (y_k - x)          x ← Σ_k p_k y_k - h / a

``θ = (A, B)``; client ``k`` of the round starts from ``x`` and ends at ``y_k`` after steps of
learning rates ``η_j``. ``p_k`` are its share of the round, ``q_k`` of all clients that train, so
``c`` is the mean of all ``c_k`` and ``h`` of all ``g_k``, zero for a client that never took part.
With ``weights=examples`` both are shares of the examples and the weighted objective is solved, with
``uniform`` those of the clients and the papers' uniform one.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv:1910.06378, option II; the papers' ``K η`` is ``Σ_j η_j`` under a schedule. Acar et al.,
"Federated Learning Based on Dynamic Regularization", ICLR 2021, arXiv:2111.04263. Both are of plain
models; here they act on factors at one common rank. Clients use SGD: see docs/fidelity.md.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.algebra.factor_average import GLOBAL, FactorAverage
from fedlora.algebra.linalg import weighted_sum
from fedlora.algebra.server_optimizer import NoServerOptimizer
from fedlora.algebra.state import Kept, State, pack, prefixed, scalar, under, unpack
from fedlora.algebra.summand import Summands, factor_changes
from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import Payload
from fedlora.core.rates import LR_SUM
from fedlora.core.types import Client, Factors, LocalPlan, Setting, TrainJob, Update
from fedlora.server.method import Setup
from fedlora.server.missed import changed_bytes
from fedlora.techniques.lora.corrected import CorrectedPayload
from fedlora.training.terms import Correction
from strategies.base import LoRAStrategy

MEAN, TOTAL = "mean/", "total"
"""In the state: the mean over all clients of what each keeps, and the sum of their weights."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DriftCorrected(FactorAverage, LoRAStrategy):
    """What both have in common. Whatever a client keeps has the names and shapes of the global
    factors: ``<path>/a`` and ``<path>/b``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("strategy.heterogeneous", self.heterogeneous, ("smallest", "refuse"))
        one_of("strategy.align", self.align, ("none",))
        one_of("strategy.correct", self.correct, ("none",))

    @abstractmethod
    def _gradient(self, state: State, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is added to a client's gradient, by name.

        Args:
            state: at the start of the round.
            own: what the client keeps, or zeros.
        """

    @abstractmethod
    def _term(self) -> Correction:
        """The local term of a client's plan."""

    @abstractmethod
    def _moved(self, state: State, start: Mapping[str, Factors], update: Update) -> Kept:
        """By what an update changes what its client keeps, by name."""

    def check(self, setup: Setup) -> None:
        super().check(setup)
        plan = setup.client
        if plan.optimizer != "sgd":
            raise ValueError(
                f"client.optimizer={plan.optimizer}: {self.label} reads gradients from the "
                "distance that a client has gone, and a step of AdamW is no multiple of one; "
                "choose client=sgd, or strategy=fedit"
            )
        if plan.term is not None:
            raise ValueError(
                f"client.term={type(plan.term).__name__}: {self.label} has a local term of its "
                "own; choose client/term=none, or strategy=fedit"
            )
        if plan.lr == 0:
            raise ValueError(
                f"client.lr=0: {self.label} reads gradients from the distance that a client has "
                "gone; choose a rate > 0"
            )
        if plan.technique.shrinks:
            raise ValueError(
                f"client.technique={type(plan.technique).__name__} prunes ranks, and {self.label} "
                "corrects factors of one rank; choose client.technique.self_prune=null"
            )

    def init_state(self, setting: Setting) -> State:
        state = super().init_state(setting)
        zeros = {name: torch.zeros_like(t) for name, t in _scalars(state).items()}
        clients = setting.trained
        count = float(len(clients))
        total = count if self.weights == "uniform" else float(sum(c.num_examples for c in clients))
        return {**state, TOTAL: scalar(total), **prefixed(zeros, MEAN)}

    def client_start(
        self, state: State, client: Client, kept: Kept | None = None
    ) -> CorrectedPayload:
        start = self.global_update(state)
        own = kept or {name: torch.zeros_like(t) for name, t in _scalars(state).items()}
        correction = unpack(self._gradient(state, own), float(state["alpha"]))
        return CorrectedPayload(start, {path: correction[path] for path in start})

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        return replace(base, term=self._term())

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        """The average of the factors, and the means over all clients as they are now."""
        start, mean = self.global_update(state), under(state, MEAN)
        changes = [self._moved(state, start, u) for u in updates]
        w = self.reference_weights(updates)  # in the unit of the total over all clients
        q = [x / float(state[TOTAL]) for x in w]
        found = {
            name: (t + weighted_sum([c[name] for c in changes], q)).to(t.dtype)
            for name, t in mean.items()
        }
        after = super().aggregate(state, updates)
        return {**after, TOTAL: state[TOTAL], **prefixed(found, MEAN)}

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """As FedIT; the means stay."""
        means = prefixed(under(state, MEAN), MEAN)
        return {**super().adopt(state, delta), TOTAL: state[TOTAL], **means}

    def kept(
        self, state: State, client: Client, before: Kept | None, start: Payload, update: Update
    ) -> Kept:
        """``c_k`` or ``g_k``, of the size of the factors."""
        factors = start.low_rank()
        assert factors is not None
        change = self._moved(state, factors, update)
        return change if before is None else {n: t + change[n] for n, t in before.items()}

    @property
    def needs_updates(self) -> str:
        return (
            f"strategy {self.label} also averages what clients keep, which moves even if a client "
            "does not; choose postprocess=none and robust=none, or strategy=fedit"
        )

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class SCAFFOLD(DriftCorrected):
    def check(self, setup: Setup) -> None:
        super().check(setup)
        plan = setup.client
        for name, value in (("momentum", plan.momentum), ("max_grad_norm", plan.max_grad_norm)):
            if value:
                raise ValueError(
                    f"client.{name}={value:g}: SCAFFOLD takes the distance that a client has gone "
                    "for a mean of its gradients, which it then is not; choose "
                    f"client.{name}=0, or strategy=fedit"
                )

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """Those of the factors and of ``c``, which is zero before the first round."""
        moved = any(bool(t.any()) for t in under(state, MEAN).values())
        return changed_bytes(job.start, "ab", wire) * (2 if moved else 1)

    def _gradient(self, state: State, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: c - own[name] for name, c in under(state, MEAN).items()}

    def _term(self) -> Correction:
        return Correction()

    def _moved(self, state: State, start: Mapping[str, Factors], update: Update) -> Kept:
        rates, found = _rates(update), {}
        for path, f in update.adapter.items():
            for name, moved in factor_changes(path, start[path], f).items():
                found[name] = -moved / rates - state[f"{MEAN}{name}"]
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class FedDyn(DriftCorrected):
    strength: float = 0.1
    """``a > 0``: weight of the squared distance from the start of a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("strategy.strength", self.strength, 0, strict=True)
        if not isinstance(self.server_optimizer, NoServerOptimizer):
            raise ValueError(
                f"strategy/server_optimizer={type(self.server_optimizer).__name__}: the step of "
                "FedDyn's server is part of the method; choose strategy/server_optimizer=none, or "
                "strategy=scaffold"
            )

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        """The average of the factors minus ``h / a``."""
        after = dict(super().aggregate(state, updates))
        for name, h in under(after, MEAN).items():
            after[f"{GLOBAL}{name}"] = after[f"{GLOBAL}{name}"] - h / self.strength
        return after

    @property
    def beyond_average(self) -> str:
        return "its server subtracts h / a from the average"

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """Those of the factors: the client has ``g_k``."""
        return changed_bytes(job.start, "ab", wire)

    def report(self, state: State) -> Mapping[str, float | int | str]:
        """``feddyn/shift``, ``‖h‖ / a``: how far the server's factors lie from their average."""
        squares = (float(h.double().square().sum()) for h in under(state, MEAN).values())
        return {"feddyn/shift": math.sqrt(math.fsum(squares)) / self.strength}

    def _gradient(self, state: State, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: -own[name] for name in _scalars(state)}

    def _term(self) -> Correction:
        return Correction(self.strength)

    def _moved(self, state: State, start: Mapping[str, Factors], update: Update) -> Kept:
        found: dict[str, Tensor] = {}
        for path, f in update.adapter.items():
            found |= factor_changes(path, start[path], f)
        return {name: -self.strength * moved for name, moved in found.items()}


def _scalars(state: State) -> dict[str, Tensor]:
    """The global factors by name."""
    return pack(unpack(state, float(state["alpha"]), GLOBAL))


def _rates(update: Update) -> float:
    """The sum of the learning rates of an update's steps, as the server has checked it.

    Raises:
        ValueError: if the update does not say.
    """
    rates = update.metrics.get(LR_SUM, 0.0)
    if not rates > 0:
        raise ValueError(
            f"client {update.client.id} states {rates:g} as the {LR_SUM} of its steps, which "
            "SCAFFOLD divides by: it must be > 0"
        )
    return rates
