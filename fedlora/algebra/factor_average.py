"""Averaging each LoRA factor by itself, at one rank for all clients: the core of FedAvg and FedIT.

    A ← Σ_k p_k A_k        B ← Σ_k p_k B_k

Factors can only be averaged if their shapes agree, so in a population of unequal ranks every client
trains the smallest one (the "bucket effect"). State: ``alpha``, the factors under ``global/`` and,
under ``server/``, what the server optimizer remembers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedlora.algebra.init import initial_factors
from fedlora.algebra.linalg import (
    at_rank,
    average,
    client_weights,
    factors_of_rank,
    normalized_weights,
    svd,
)
from fedlora.algebra.server_optimizer import NoServerOptimizer, ServerOptimizer
from fedlora.algebra.state import (
    Kept,
    State,
    order,
    pack,
    prefixed,
    scalar,
    under,
    unpack,
)
from fedlora.algebra.summand import Summands, dense, factor_changes
from fedlora.core.checks import one_of
from fedlora.core.payload import Payload
from fedlora.core.types import Adapter, Client, Factors, Ranks, Setting, Update

GLOBAL, SERVER = "global/", "server/"


@dataclass(frozen=True, eq=False, kw_only=True)
class FactorAverage:
    """The hooks of a strategy (`strategies.base.LoRAStrategy`) that averages factors."""

    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    heterogeneous: str = "smallest"
    """Clients of unequal rank: all train the ``smallest``, or ``refuse``."""
    server_optimizer: ServerOptimizer = field(default_factory=NoServerOptimizer)
    """Acts on ``A`` and ``B``."""

    def __post_init__(self) -> None:
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        one_of("strategy.heterogeneous", self.heterogeneous, ("smallest", "refuse"))

    def init_state(self, setting: Setting) -> State:
        return initial_state(setting, self.heterogeneous, self.server_optimizer)

    def enlist(self, state: State, client: Client) -> Client:
        return at_common_rank(state, client)

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        return factors(state)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        return next_state(state, updates, self.weights, self.server_optimizer)

    @property
    def needs_updates(self) -> str:
        return ""

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """The changes of ``A`` and ``B`` at the common rank."""
        assert isinstance(start, Mapping)
        found: dict[str, Tensor] = {}
        for path, f in update.adapter.items():
            found |= factor_changes(path, start[path], f)
        return found

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        return moved(state, total, weight, self.server_optimizer)

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        return continued(state, delta, self.server_optimizer)

    def global_update(self, state: State, ranks: Ranks | None = None) -> Adapter:
        return at_ranks(state, ranks)


def initial_state(setting: Setting, heterogeneous: str, optimizer: ServerOptimizer) -> State:
    """The common initialisation at the population's smallest rank per module.

    Args:
        setting: the population and the modules.
        heterogeneous: ``smallest``, or ``refuse`` to raise where clients differ.
        optimizer: whose state is kept beside the factors.

    Raises:
        ValueError: if clients hold unequal ranks and that was to be refused.
    """
    one_of("heterogeneous", heterogeneous, ("smallest", "refuse"))
    patterns = setting.rank_patterns
    if heterogeneous == "refuse" and len(patterns) > 1:
        held = "; ".join(p.text for p in patterns)
        raise ValueError(
            f"averaging factors needs one rank for all clients, these hold {held}: "
            "choose ranks=homogeneous, strategy.heterogeneous=smallest, or a method for unequal "
            "ranks"
        )
    start = initial_factors(setting, setting.min_ranks)
    return _state(start, setting.alpha, optimizer)


def factors(state: State) -> dict[str, Factors]:
    """The global factors."""
    return unpack(state, float(state["alpha"]), GLOBAL)


def at_common_rank(state: State, client: Client) -> Client:
    """The client at the rank that all clients train."""
    ranks = Ranks({path: state[f"{GLOBAL}{path}/a"].shape[0] for path in client.ranks})
    return client if ranks == client.ranks else replace(client, ranks=ranks)


def next_state(
    state: State, updates: Sequence[Update], weights: str, optimizer: ServerOptimizer
) -> State:
    """The weighted average of the updates' factors, passed through the server optimizer."""
    p = normalized_weights(updates, weights)
    old = factors(state)
    mean = {path: average([u.adapter[path] for u in updates], p) for path in old}
    for path, f in mean.items():
        if f.a.shape != old[path].a.shape:
            raise ValueError(
                f"{path}: clients sent rank {f.rank}, the global rank is {old[path].rank}"
            )
    return _stepped(state, pack(mean), optimizer)


def moved(state: State, total: Summands, weight: float, optimizer: ServerOptimizer) -> State:
    """The factors plus ``total / weight``, passed through the server optimizer."""
    old = pack(factors(state))
    return _stepped(state, {k: t + dense(total[k]) / weight for k, t in old.items()}, optimizer)


def _stepped(state: State, mean: Mapping[str, Tensor], optimizer: ServerOptimizer) -> State:
    old = pack(factors(state))
    new, memory = optimizer.step(old, mean, under(state, SERVER))
    kept = {key: state[key] for key in ("alpha", f"{GLOBAL}order")}
    return kept | prefixed(new, GLOBAL) | prefixed(memory, SERVER)


def continued(state: State, delta: Mapping[str, Tensor], optimizer: ServerOptimizer) -> State:
    """The state whose update is ``T_r`` of the given dense update, at the common rank.

    Directions beyond the rank of ``delta`` keep the rows of ``A`` that they have.
    """
    alpha = float(state["alpha"])
    start = {
        path: factors_of_rank(svd(delta[path]), f.rank, alpha, "b", f.a)
        for path, f in factors(state).items()
    }
    return _state(start, alpha, optimizer)


def at_ranks(state: State, ranks: Ranks | None) -> Adapter:
    """The global factors as they are, or the same update at other ranks."""
    found = factors(state)
    if ranks is None:
        return found
    return {path: at_rank(found[path], r) for path, r in ranks.items()}


def _state(start: Adapter, alpha: float, optimizer: ServerOptimizer) -> State:
    packed = pack(start)
    return (
        {"alpha": scalar(alpha), f"{GLOBAL}order": order(start)}
        | prefixed(packed, GLOBAL)
        | prefixed(optimizer.init(packed), SERVER)
    )
