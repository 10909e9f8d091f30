r"""SwitchLoRA under federated averaging: vectors are switched, and all clients hold the same base.

    round ρ     all clients switch the same k vectors of factor σ (A in even rounds, B in odd ones)
                clients train only σ, from  W + D + s B A,  s = alpha / r
                σ ← σ + Σ_k p_k (σ_k - σ)

All clients hold the same other factor, so ``Σ_k p_k s B A_k = s B Ā``: the server's model
is exactly the mean of its clients' models (`sync_alternate`). ``D`` (the sum of all compensations),
the candidate vectors and the vector in each slot follow from the seed and the averages, so none of
them is sent (`fedlora.techniques.switchlora.replica`).

    sync_product   both factors are trained; D also gains s Σ_k p_k (B_k - B̄)(A_k - Ā)
    dense          each client switches its own vectors and sends the change of its weights

Zhou, Wang, Xu, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information",
arXiv:2406.06564; the federated protocols are this project's. The average of the factors of
clients that switch different vectors has no meaning, so it is refused. Where the authors' code and
paper differ, see docs/fidelity.md.
"""

import logging
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
    scalar,
    under,
)
from fedlora.algebra.summand import Summands, dense
from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import Payload
from fedlora.core.technique import Technique
from fedlora.core.types import (
    Client,
    Factors,
    LocalPlan,
    Module,
    Ranks,
    Setting,
    TrainJob,
    Update,
)
from fedlora.server.method import Setup, StateAudit
from fedlora.server.missed import SEEN, next_seen, seen_by
from fedlora.techniques.lora.technique import LoRA
from fedlora.techniques.rebased.payload import Rebased
from fedlora.techniques.switchlora.audit import ReplicaAudit
from fedlora.techniques.switchlora.init import (
    SIDES,
    Side,
    check_rank,
)
from fedlora.techniques.switchlora.layer import SwitchLayer
from fedlora.techniques.switchlora.local import NO_START, start_layer
from fedlora.techniques.switchlora.replica import (
    ALTERNATE,
    DIGEST_BYTES,
    LAYER,
    PRODUCT,
    Replica,
    Timetable,
    extend_history,
    news,
)
from fedlora.techniques.switchlora.technique import SwitchTraining
from fedlora.wire.codec import WIRE_BYTES
from strategies.base import LoRAStrategy

log = logging.getLogger(__name__)

DENSE = "dense"
SHIFT = "shift/"


def mean_change(old: Tensor, sent: Sequence[Tensor], p: Sequence[float], side: Side) -> Tensor:
    """``σ + Σ_k p_k (σ_k - σ)``, where a client with fewer slots does not change the others.

    Args:
        old: ``[r, d_in]`` (A) or ``[d_out, r]`` (B).
        sent: per client its first ``r_k`` rows (A) or columns (B).
        p: per client, summing to 1.
        side: ``a`` or ``b``.
    """
    new = old.to(torch.promote_types(old.dtype, sent[0].dtype)).clone()
    rows, before = (new, old) if side == "a" else (new.t(), old.t())
    for weight, factor in zip(p, sent, strict=True):
        mine = factor if side == "a" else factor.t()
        rows[: mine.shape[0]] += weight * (mine - before[: mine.shape[0]])
    return new


def covariance(
    layer: SwitchLayer, factors: Sequence[Factors], p: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """``left [d_out, (K-1) r]`` and ``right [(K-1) r, d_in]`` whose product is what averaging
    loses.

    ``s Σ_k p_k (B_k - B̄)(A_k - Ā)``. The deviations sum to zero, so those of one client
    (the one with the largest weight ``p_c``) follow from the others:
    ``right_k = s p_k (A'_k + Σ_j p_j A'_j / p_c)``.
    """
    changes_a = [_pad(f.a - layer.a[: f.rank], layer.rank) for f in factors]
    changes_b = [_pad((f.b - layer.b[:, : f.rank]).t(), layer.rank).t() for f in factors]
    mean_a = sum((w * x for w, x in zip(p, changes_a, strict=True)), torch.zeros(()))
    mean_b = sum((w * x for w, x in zip(p, changes_b, strict=True)), torch.zeros(()))
    pivot = max(range(len(p)), key=lambda k: p[k])
    rest = [k for k in range(len(p)) if k != pivot]
    if not rest:
        return changes_b[0][:, :0], changes_a[0][:0]
    away = {k: changes_a[k] - mean_a for k in rest}
    common = sum((p[k] / p[pivot] * away[k] for k in rest), torch.zeros(()))
    left = torch.cat([changes_b[k] - mean_b for k in rest], dim=1)
    right = torch.cat([layer.scale * p[k] * (away[k] + common) for k in rest])
    return left, right


def _pad(rows: Tensor, count: int) -> Tensor:
    if rows.shape[0] == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], rows.shape[1])])


def weighted_mean(tensors: Sequence[Tensor], p: Sequence[float]) -> Tensor:
    """``Σ_k p_k x_k``."""
    total = p[0] * tensors[0]
    for weight, t in zip(p[1:], tensors[1:], strict=True):
        total = total + weight * t
    return total


@dataclass(frozen=True, eq=False, kw_only=True)
class SwitchLoRA(LoRAStrategy):
    technique = SwitchTraining

    switching: Technique
    """``client.technique``."""
    steps: int
    """``client.steps``: optimizer steps of a client in a round."""
    horizon: int
    """Rounds over which switches become rarer, usually all rounds of the run."""
    mode: str = ALTERNATE
    """``sync_alternate``, ``sync_product`` or ``dense``."""
    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    replicas: bool = True
    """Whether clients keep the shared state between rounds, so that they are sent only what they
    missed; if not, they are sent all of it every time. It changes only the counted bytes."""
    hash_every: int = 10
    """Rounds between two comparisons of the shared state's hash (32 bytes per client); 0: never.
    The run compares one replica, which receives only what clients are sent."""

    def __post_init__(self) -> None:
        one_of("strategy.mode", self.mode, (ALTERNATE, PRODUCT, DENSE))
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        at_least("strategy.steps", self.steps, 0)
        at_least("strategy.horizon", self.horizon, 1)
        at_least("strategy.hash_every", self.hash_every, 0)

    def check(self, setup: Setup) -> None:
        super().check(setup)
        for refused, sentence in self._refusals(setup):
            if refused:
                raise ValueError(sentence)
        if setup.client.dropout:
            log.warning(
                "client.dropout=%g with strategy=switchlora: a switch moves a vector's part of "
                "the weight from the factors to the base, which has no dropout, so a layer "
                "computes the same only in expectation; client.dropout=0 keeps it exact",
                setup.client.dropout,
            )

    def _refusals(self, setup: Setup) -> tuple[tuple[bool, str], ...]:
        """What cannot be combined with this strategy: per row, whether it is asked for, and why it
        is refused. The first row that applies is reported."""
        plan, dense = setup.client, self.mode == DENSE
        return (
            (
                plan.technique != self.switching or plan.steps != self.steps,
                f"strategy.steps={self.steps}, strategy.switching={self.switching} are not the "
                f"clients' (client.steps={plan.steps}, client.technique={plan.technique}), whose "
                "steps the switching schedule counts; set client.steps and client.technique, "
                "which the strategy follows",
            ),
            (
                not plan.steps,
                "client.steps=0 with strategy=switchlora: the switching schedule counts steps, "
                "and clients of unequal size take different numbers of steps in an epoch; use "
                "client.steps=20 or so",
            ),
            (
                not (plan.train_a and plan.train_b),
                f"client.train_a={plan.train_a}, train_b={plan.train_b} with strategy=switchlora: "
                "the strategy decides which factor is trained in a round; leave both true",
            ),
            (
                dense and plan.optimizer != "adamw",
                f"client.optimizer={plan.optimizer!r} with strategy.mode=dense: only AdamW is "
                "reset vector by vector; use client.optimizer=adamw or "
                "strategy.mode=sync_alternate",
            ),
            (dense and plan.term is not None, NO_START),
            (
                not dense and setup.wire == "bfloat16",
                "federation.wire=bfloat16 with strategy=switchlora rounds a base that must be "
                "bitwise identical everywhere; use federation.wire=float32, or "
                "strategy.mode=dense",
            ),
            (
                setup.quantization != "none",
                f"model.quantization={setup.quantization} with strategy=switchlora: switches are "
                "compensated in the weights, which quantised weights cannot hold; use "
                "model.quantization=none",
            ),
        )

    def init_state(self, setting: Setting) -> State:
        state: dict[str, Tensor] = {"alpha": scalar(setting.alpha), "seed": integers(setting.seed)}
        if self.mode == DENSE:
            shapes = {m.path: (m.d_out, m.d_in) for m in setting.modules}
            for pattern in setting.rank_patterns:
                for path, r in pattern.items():
                    check_rank(path, *shapes[path], r)
            state |= {"round": integers(0), f"{SHIFT}order": order(shapes)}
            return state | {f"{SHIFT}{p}/d": torch.zeros(*s) for p, s in shapes.items()}
        shapes = {m.path: (m.d_out, m.d_in) for m in setting.modules}
        timetable = self._timetable(setting.seed)
        made = Replica.begin(shapes, setting.max_ranks, setting.alpha, timetable)
        return state | made.state() | {SEEN: integers([0] * len(setting.clients))}

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Rebased:
        return self._at(state, client.ranks)

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        done = int(state["round"])
        if self.mode == DENSE:
            first, total = done * self.steps, self.horizon * self.steps
            return replace(base, technique=replace(self._switching, first=first, total=total))
        # Vectors are switched between rounds; within a round clients train plain factors.
        trained = self._timetable(0).sides(done)
        return replace(base, technique=LoRA(), train_a="a" in trained, train_b="b" in trained)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p = normalize(self.reference_weights(updates))
        done = int(state["round"])
        if self.mode == DENSE:
            mean = {
                f"{SHIFT}{path}/d": weighted_mean([_dense(u).shift[path] for u in updates], p)
                for path in paths(state, "d", SHIFT)
            }
            return dict(state) | mean | {"round": integers(done + 1)}
        shared = self._replica(state)
        seen = next_seen(state, updates)[SEEN]
        return _install(state, shared, self._result(shared, updates, p), seen)

    @property
    def needs_updates(self) -> str:
        if self.mode == PRODUCT:
            return (
                "strategy.mode=sync_product needs the covariance of both factors; choose "
                "strategy.mode=sync_alternate"
            )
        return ""

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """The change of the factor that this round trains, padded to all slots.

        In mode ``dense`` it is the change of the weights. In mode ``sync_product``, which needs the
        covariance of both factors, it is ``None``.
        """
        assert isinstance(start, Rebased)
        if self.mode == PRODUCT:
            return None
        if self.mode == DENSE:
            sent = _dense(update).shift
            return {f"{p}/d": d - _whole(start, p) for p, d in sent.items()}
        (side,) = self._timetable(0).sides(int(state["round"]))
        found: dict[str, Tensor] = {}
        for path, f in update.adapter.items():
            slots = state[f"{LAYER}{path}/a"].shape[0]
            change = getattr(f, side) - getattr(start.factors[path], side)
            rows = change if side == "a" else change.t()  # [r_k, d]
            padded = _pad(rows, slots)
            found[f"{path}/{side}"] = padded if side == "a" else padded.t()
        return found

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """The state after a sum. A sum does not say which clients took part, so the bytes that a
        client is sent next are counted as if it had missed this round."""
        done = int(state["round"])
        if self.mode == DENSE:
            new = {
                f"{SHIFT}{k}": state[f"{SHIFT}{k}"] + dense(x) / weight for k, x in total.items()
            }
            return dict(state) | new | {"round": integers(done + 1)}
        shared = self._replica(state)
        result = {k: state[f"{LAYER}{k}"] + dense(x) / weight for k, x in total.items()}
        return _install(state, shared, result, state[SEEN].clone())

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def global_update(self, state: State, ranks: Ranks | None = None) -> Rebased:
        if ranks is not None:
            return self._at(state, ranks)
        if self.mode == DENSE:
            return Rebased({p: state[f"{SHIFT}{p}/d"] for p in paths(state, "d", SHIFT)})
        alpha, names = float(state["alpha"]), paths(state, "weight", LAYER)
        parts = {p: under(state, f"{LAYER}{p}/") for p in names}
        return Rebased(
            {p: found["weight"] for p, found in parts.items()},
            {p: Factors(found["a"], found["b"], alpha) for p, found in parts.items()},
        )

    def report(self, state: State) -> Mapping[str, float | int | str]:
        """How many vectors have been switched so far."""
        return {} if self.mode == DENSE else {"switch/exchanged": int(state["exchanged"])}

    def state_audit(self) -> StateAudit | None:
        if self.mode == DENSE or not self.hash_every:
            return None
        return ReplicaAudit(self._replica, self.hash_every)

    def rank_range(self, module: Module) -> tuple[int, int]:
        """See `check_rank`: one slot may be frozen, and at least one vector must be in no slot."""
        return 2, module.max_rank - 1

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """The bytes of what the client missed of the shared state, or of all of it if that is less.

        In the first round this is 0, because the state follows from the seed. In mode ``dense`` it
        is the mean update. A client without a replica is sent only its start: it does not switch
        vectors itself, so it needs no candidate vectors. A client whose update did not arrive or
        was rejected is assumed to have missed the round.
        """
        width, done = WIRE_BYTES[wire], int(state["round"])
        assert isinstance(job.start, Rebased)
        if self.mode == DENSE:
            return width * sum(t.numel() for t in job.start.shift.values()) if done else 0
        if not self.replicas:
            return super().bytes_down(state, job, wire)
        known = seen_by(state, job.client.id)
        digest = DIGEST_BYTES if self.hash_every and done and done % self.hash_every == 0 else 0
        return news(state, known).bytes(width) + digest

    # --- pieces ---------------------------------------------------------------------------------

    @property
    def _switching(self) -> SwitchTraining:
        if not isinstance(self.switching, SwitchTraining):
            raise ValueError(
                f"strategy=switchlora needs client/technique=switchlora, not {self.switching.key}; "
                "use client=switchlora"
            )
        return self.switching

    def _timetable(self, seed: int) -> Timetable:
        return Timetable(self.mode, self._switching, self.steps, self.horizon, seed)

    def _replica(self, state: State) -> Replica:
        return Replica.load(state, float(state["alpha"]), self._timetable(int(state["seed"])))

    def _at(self, state: State, ranks: Ranks) -> Rebased:
        """The start of clients of these ranks; slots beyond a client's rank are part of its base.

        The sum is taken in float64, so a client's start equals the server's model up to one
        rounding.
        """
        alpha, shift, factors = float(state["alpha"]), {}, {}
        seed, done = int(state["seed"]), int(state["round"])
        for path, r in ranks.items():
            if self.mode == DENSE:
                d = state[f"{SHIFT}{path}/d"]
                shape = (int(d.shape[0]), int(d.shape[1]))
                f = Factors(*start_layer(path, shape, r, alpha, seed, done), alpha)
                shift[path], factors[path] = d.double() - _delta(f), f
                continue
            weight, a, b = (state[f"{LAYER}{path}/{name}"] for name in ("weight", "a", "b"))
            slots = int(a.shape[0])
            own = min(r, slots)
            shift[path] = weight
            if own < slots:
                others = b[:, own:].double() @ a[own:].double()
                shift[path] = weight.double() + alpha / slots * others
            mine = a[:own].clone(), b[:, :own].clone()
            factors[path] = Factors(*mine, alpha * own / slots)
        return Rebased(shift, factors)

    def _result(
        self, shared: Replica, updates: Sequence[Update], p: Sequence[float]
    ) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        sides = shared.timetable.sides(shared.round)
        for path, layer in shared.layers.items():
            sent = [u.adapter[path] for u in updates]
            for side in sides:
                factors = [getattr(f, side) for f in sent]
                found[f"{path}/{side}"] = mean_change(getattr(layer, side), factors, p, side)
            if sides == SIDES:
                found |= _rest(path, *covariance(layer, sent, p))
        return found


def _install(
    state: State, shared: Replica, result: Mapping[str, Tensor], seen: Tensor
) -> dict[str, Tensor]:
    """The state after a round whose averages are ``result``.

    Args:
        state: the state before the round.
        shared: the replica of that state; it is changed in place.
        result: the averages, as `Replica.install` takes them.
        seen: per client, the number of rounds whose results it knows.
    """
    done = int(state["round"])
    shared.install(result)
    kept = {"alpha": state["alpha"], "seed": state["seed"], SEEN: seen}
    history = {k: t for k, t in state.items() if k.startswith("history/")}
    after = kept | shared.state()
    return after | extend_history(after | history, done, result)


def _whole(start: Rebased, path: str) -> Tensor:
    """What a start adds to a module's weight, ``[d_out, d_in]`` float64."""
    shift = start.shift[path].double()
    return shift + _delta(start.factors[path]) if path in start.factors else shift


def _delta(f: Factors) -> Tensor:
    return f.scale * (f.b.double() @ f.a.double())


def _rest(path: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The residual as part of a result: its two factors, or their product if smaller."""
    if left.shape[0] * right.shape[1] < left.numel() + right.numel():
        return {f"{path}/rest": left @ right}
    return {f"{path}/left": left, f"{path}/right": right}


def _dense(update: Update) -> Rebased:
    if not isinstance(update.payload, Rebased):
        raise TypeError(f"client {update.client.id} sent factors where a dense update is required")
    return update.payload
