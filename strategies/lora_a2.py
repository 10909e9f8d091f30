r"""LoRA-A²: one factor at a time, and each client trains the rank indices that it needs most.

    B-round    B_i ← B_i + Σ_{k: i ∈ S_k} p_k (B_{k,i} - B_i)      A frozen, learning rate 5 η
    A-round    A_i ← A_i + Σ_{k: i ∈ S_k} p_k (A_{k,i} - A_i)      B frozen, learning rate η
    S_k        of the rank indices of all modules the Σ_modules r_k of the largest s ‖ΔB_i‖ ‖A_i‖
               (A-rounds: s ‖B_i‖ ‖ΔA_i‖) after one epoch of trial on all of them;  s = alpha / R

``B_i`` is a column of ``B``, ``A_i`` a row of ``A``; both have the rank of the server for all
clients, whose own rank ``r_k`` is a budget: what they train and send, a module on average. Rounds
alternate, B first, since ``A`` has no gradient at ``B = 0``. An index that a client has not chosen
counts as unchanged, so a product with one common factor moves by exactly the mean of what the
clients' products move by. Koo, Jang and Ok, "Towards Robust and Efficient Federated Low-Rank
Adaptation with Heterogeneous Clients", ACL 2025, arXiv:2410.22815. See docs/fidelity.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedlora.algebra.init import initial_factors
from fedlora.algebra.linalg import (
    client_weights,
    factors_of_rank,
    normalize,
    svd,
    weighted_sum,
)
from fedlora.algebra.state import Kept, State, order, pack, scalar, unpack
from fedlora.algebra.summand import Summands, dense
from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import Payload
from fedlora.core.types import (
    Adapter,
    Client,
    Factors,
    LocalPlan,
    Ranks,
    Setting,
    TrainJob,
    Update,
)
from fedlora.server.method import Setup
from fedlora.server.missed import (
    NOTHING,
    ROUND,
    SEEN,
    changed_bytes,
    first_seen,
    missed_sides,
    next_seen,
)
from fedlora.training.choice import LargestChange
from strategies.base import LoRAStrategy

GLOBAL, SCHEDULE = "global/", "ba"


@dataclass(frozen=True, eq=False, kw_only=True)
class LoRAA2(LoRAStrategy):
    chooses: ClassVar[bool] = True
    global_rank: int = 0
    """Rank of the server's factors, at most what a module can hold; 0: the largest rank of any
    client, module by module."""
    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    lr_ratio: float = 5.0
    """Learning rate of ``B`` over that of ``A``, which is ``client.lr``."""

    def __post_init__(self) -> None:
        at_least("strategy.global_rank", self.global_rank, 0)
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        at_least("strategy.lr_ratio", self.lr_ratio, 0, strict=True)

    def check(self, setup: Setup) -> None:
        super().check(setup)
        plan = setup.client
        if not (plan.train_a and plan.train_b):
            raise ValueError(
                f"client.train_a={plan.train_a}, client.train_b={plan.train_b}: LoRA-A² trains B "
                "and A by turns; leave both true, or use strategy=ffa, which trains B alone"
            )
        if plan.technique.shrinks:
            raise ValueError(
                "client.technique.self_prune: clients of LoRA-A² give up no rank of the common "
                "factors; choose client.technique.self_prune=null"
            )
        if setup.error_feedback:
            raise ValueError(
                "federation.error_feedback=true: what rounding withheld of a rank index would be "
                "sent in a round that has not chosen it; choose federation.error_feedback=false"
            )

    def init_state(self, setting: Setting) -> State:
        """The global pair at the server's ranks, and what clients know (`fedlora.server.missed`).

        Raises:
            ValueError: if a client's rank exceeds the server's.
        """
        ranks = largest = setting.max_ranks
        if self.global_rank:
            ranks = Ranks({m.path: min(self.global_rank, m.max_rank) for m in setting.modules})
        for path, r in ranks.items():
            if largest[path] > r:
                raise ValueError(
                    f"strategy.global_rank={self.global_rank} is below rank {largest[path]}, which "
                    f"a client holds of {path}: choose at least {max(largest.values())}, or 0"
                )
        return {
            "alpha": scalar(setting.alpha),
            f"{GLOBAL}order": order(ranks),
            **first_seen(len(setting.clients)),
            **pack(initial_factors(setting, ranks), GLOBAL),
        }

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        return _pair(state)

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        """The factor of the round, its learning rate, and the client's budget; a client whose
        budget holds all rank indices trains all, without a trial."""
        side, budget = _side(state), sum(client.ranks.values())
        choice = LargestChange(budget)
        if budget >= sum(f.rank for f in _pair(state).values()):
            return self._turn(base, side)
        return replace(self._turn(base, side), choice=choice)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p, side = normalize(self.reference_weights(updates)), _side(state)
        moved = {
            f"{path}/{side}": weighted_sum([change(f, u, path, side) for u in updates], p)
            for path, f in _pair(state).items()
        }
        return _moved(state, moved, updates)

    @property
    def needs_updates(self) -> str:
        return ""

    def adds(self, state: State, start: Payload, update: Update) -> Summands:
        """The change of the factor that the round trains, zero where nothing was chosen."""
        side = _side(state)
        return {f"{p}/{side}": change(f, update, p, side) for p, f in _pair(state).items()}

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """The state after a sum. A sum does not say which clients took part, so the bytes that a
        client is sent next are counted as if it had missed this round."""
        return _moved(state, {name: dense(x) / weight for name, x in total.items()}, ())

    def global_update(self, state: State, ranks: Ranks | None = None) -> Adapter:
        """The global pair: a client's ranks limit what it trains, not what it uses."""
        return _pair(state)

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """The bytes of the factors, at the server's ranks, that have been averaged since the client
        took part, which is taken to keep what it was sent. The first pair follows from the seed."""
        return changed_bytes(job.start, missed_sides(state, job.client.id, SCHEDULE), wire)

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """The state that begins at ``T_R`` of a dense update."""
        alpha = float(state["alpha"])
        start = {
            path: factors_of_rank(svd(delta[path]), f.rank, alpha, "b", f.a)
            for path, f in _pair(state).items()
        }
        first = first_seen(len(state[SEEN]), NOTHING)
        return {k: state[k] for k in ("alpha", f"{GLOBAL}order")} | first | pack(start, GLOBAL)

    def _turn(self, base: LocalPlan, side: str) -> LocalPlan:
        """A plan that trains one factor at its learning rate."""
        lr = base.lr * (self.lr_ratio if side == "b" else 1.0)
        return replace(base, lr=lr, train_a=side == "a", train_b=side == "b")


def _side(state: State) -> str:
    """The factor that the round trains which begins from a state."""
    return SCHEDULE[int(state[ROUND]) % len(SCHEDULE)]


def _pair(state: State) -> dict[str, Factors]:
    """The global pair."""
    return unpack(state, float(state["alpha"]), GLOBAL)


def change(pair: Factors, update: Update, path: str, side: str) -> Tensor:
    """What a client has moved a factor by, of the factor's shape; zero where it has not chosen,
    whatever stands there.

    Args:
        pair: of the module, from which it started.
        update: with the client's choice; without one, all has trained.
        path: of the module.
        side: ``a`` or ``b``.
    """
    moved: Tensor = getattr(update.adapter[path], side) - getattr(pair, side)
    indices = update.payload.indices
    if indices is None:
        return moved
    found, at = moved.new_zeros(moved.shape), list(indices[path])
    if side == "a":
        found[at] = moved[at]
    else:
        found[:, at] = moved[:, at]
    return found


def _moved(state: State, changes: Mapping[str, Tensor], updates: Sequence[Update]) -> State:
    """The state after a round.

    Args:
        state: from which the round began.
        changes: by name, such as ``<path>/b``.
        updates: of the clients that took part, if they are known.
    """
    after = dict(state)
    for name, x in changes.items():  # both factors of one dtype
        path, _, side = name.rpartition("/")
        new = state[f"{GLOBAL}{name}"] + x
        other = f"{GLOBAL}{path}/{'a' if side == 'b' else 'b'}"
        after |= {f"{GLOBAL}{name}": new, other: state[other].to(new.dtype)}
    return after | next_seen(state, updates)
