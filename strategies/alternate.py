r"""FFA-LoRA and RoLoRA: train and average one factor at a time, the other is the same for all.

    B-round    B ← B + Σ_k p_k pad(s_k / s_R (B_k - B_k⁰))        A_k = A[:r_k], frozen
    A-round    A ← A + Σ_k p_k pad(A_k - A[:r_k])                 B_k = B_k⁰, frozen
    client     starts from  A[:r_k]  and  B_k⁰ = s_R / s_k B[:, :r_k],      s_r = alpha / r

``schedule=b`` is FFA-LoRA, whose rounds all are B-rounds and whose ``A`` stays the first one: Sun
et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv:2403.12313.
``schedule=ba`` is RoLoRA, which alternates, B first since ``A`` has no gradient at ``B = 0``: Chen
et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
arXiv:2502.01755 (2409.02346).

A product with one common factor is linear in the other, so the model moves by exactly the mean of
what the clients' products move by. The papers have one rank for all; here a client of rank ``r``
holds the first ``r`` of the ``R`` rank indices of the global pair, and changes are averaged, so
that an index of few clients does not fade. ``weighting=covered`` averages it over those that have
it, which is not exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora.algebra.init import INITS, initial_factors
from fedlora.algebra.linalg import (
    at_rank,
    client_weights,
    factors_of_rank,
    normalize,
    svd,
)
from fedlora.algebra.owners import (
    REFUSE,
    SMALLEST,
    WEIGHTINGS,
    at_ranks,
    common_ranks,
    mean_change,
)
from fedlora.algebra.server_optimizer import NoServerOptimizer, ServerOptimizer
from fedlora.algebra.state import Kept, State, order, pack, prefixed, scalar, under, unpack
from fedlora.algebra.summand import Summands, dense
from fedlora.core.checks import one_of
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
from strategies.base import LoRAStrategy

GLOBAL, SERVER, NEST = "global/", "server/", "nest"


@dataclass(frozen=True, eq=False, kw_only=True)
class Alternate(LoRAStrategy):
    schedule: str = "b"
    """The factors that successive rounds train, again and again: ``b`` (FFA-LoRA) or ``ba``
    (RoLoRA)."""
    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    heterogeneous: str = NEST
    """Clients of unequal rank: each trains its first rank indices of the global pair (``nest``),
    all train the ``smallest`` rank, or ``refuse``."""
    weighting: str = "all"
    """The clients over which ``nest`` averages a rank index: ``all``, which is exact, or those
    ``covered`` by their rank."""
    init_a: str = "kaiming"
    """The first ``A``: ``kaiming``, or ``orthonormal`` rows that span the same."""
    server_optimizer: ServerOptimizer = field(default_factory=NoServerOptimizer)
    """Acts on the factor that the round has trained. What it remembers of the other one waits."""

    def __post_init__(self) -> None:
        one_of("strategy.schedule", self.schedule, ("b", "ba"))
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        one_of("strategy.heterogeneous", self.heterogeneous, (NEST, SMALLEST, REFUSE))
        one_of("strategy.weighting", self.weighting, WEIGHTINGS)
        one_of("strategy.init_a", self.init_a, INITS)

    def check(self, setup: Setup) -> None:
        super().check(setup)
        if not (setup.client.train_a and setup.client.train_b):
            raise ValueError(
                f"client.train_a={setup.client.train_a}, client.train_b={setup.client.train_b}: "
                f"strategy.schedule={self.schedule} says which factor is trained in a round; leave "
                "both true"
            )

    def init_state(self, setting: Setting) -> State:
        """The global pair at the largest ranks, or at the smallest if all train those; what clients
        know (`fedlora.server.missed`); what the server optimizer remembers, under ``server/``.

        Raises:
            ValueError: if clients hold unequal ranks and that was to be refused.
        """
        ranks = common_ranks(setting, self.heterogeneous, NEST)
        start = initial_factors(setting, ranks, self.init_a)
        return {
            "alpha": scalar(setting.alpha),
            f"{GLOBAL}order": order(start),
            **first_seen(len(setting.clients)),
            **self._pair(start),
        }

    def enlist(self, state: State, client: Client) -> Client:
        """The client at its own ranks, or at those that all clients train."""
        if self.heterogeneous == NEST:
            return client
        ranks = Ranks({path: state[f"{GLOBAL}{path}/a"].shape[0] for path in client.ranks})
        return at_ranks(client, ranks)

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        pair = _pair(state)
        return {path: first_of(pair[path], r) for path, r in client.ranks.items()}

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        side = self._side(int(state[ROUND]))
        return replace(base, train_a=side == "a", train_b=side == "b")

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p, side = normalize(self.reference_weights(updates)), self._side(int(state[ROUND]))
        moved = {}
        for path, pair in _pair(state).items():
            changes = [change(pair, u.adapter[path], side) for u in updates]
            mean = mean_change(changes, p, pair.rank, self.weighting)  # [R, d]
            moved[f"{path}/{side}"] = mean if side == "a" else mean.T.contiguous()
        return self._moved(state, moved, updates)

    @property
    def needs_updates(self) -> str:
        if self.weighting == "all":
            return ""
        return (
            "strategy.weighting=covered divides by the weights of the clients that have a rank "
            "index; choose strategy.weighting=all"
        )

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """The change of the factor that the round trains, padded to all rank indices, if
        ``weighting=all``."""
        if self.needs_updates:
            return None
        side, found = self._side(int(state[ROUND])), {}
        for path, pair in _pair(state).items():
            rows = change(pair, update.adapter[path], side)  # [r_k, d]
            rows = pad(rows, (0, 0, 0, pair.rank - len(rows)))
            found[f"{path}/{side}"] = rows if side == "a" else rows.T.contiguous()
        return found

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """The state after a sum. A sum does not say which clients took part, so the bytes that a
        client is sent next are counted as if it had missed this round."""
        return self._moved(state, {k: dense(x) / weight for k, x in total.items()}, ())

    def global_update(self, state: State, ranks: Ranks | None = None) -> Adapter:
        """The global pair, or what clients of these ranks hold of it."""
        pair = _pair(state)
        if ranks is None:
            return pair
        cut = first_of if self.heterogeneous == NEST else at_rank
        return {path: cut(pair[path], r) for path, r in ranks.items()}

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """The bytes of the factors that have been averaged since the client took part, which is
        taken to keep what it was sent. The first pair follows from the seed, so it is not sent."""
        return changed_bytes(job.start, missed_sides(state, job.client.id, self.schedule), wire)

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """The state that begins at ``T_R`` of a dense update; with ``schedule=b``, whose ``A``
        stays, at its projection onto the rows of ``A``."""
        alpha, start = float(state["alpha"]), {}
        for path, f in _pair(state).items():
            d = delta[path]
            if self.schedule == "b":
                b = torch.linalg.lstsq(f.a.to(d.dtype).T, d.T).solution.T / f.scale  # [m, R]
                start[path] = Factors(f.a.to(d.dtype), b.contiguous(), alpha)
            else:
                start[path] = factors_of_rank(svd(d), f.rank, alpha, "b", f.a)
        first = first_seen(len(state[SEEN]), NOTHING)
        return {k: state[k] for k in ("alpha", f"{GLOBAL}order")} | first | self._pair(start)

    # --- pieces ---------------------------------------------------------------------------------

    def _side(self, round: int) -> str:
        """The factor that a round trains, counted from 0."""
        return self.schedule[round % len(self.schedule)]

    def _pair(self, start: Adapter) -> dict[str, Tensor]:
        """The part of a state that begins at a global pair."""
        packed = pack(start)
        trained = {name: t for name, t in packed.items() if name[-1] in self.schedule}
        memory = self.server_optimizer.init(trained)
        return prefixed(packed, GLOBAL) | prefixed(memory, SERVER)

    def _moved(
        self, state: State, changes: Mapping[str, Tensor], updates: Sequence[Update]
    ) -> State:
        """The state after a round.

        Args:
            state: from which the round began.
            changes: by name, such as ``<path>/b``: what the trained factor moves by.
            updates: of the clients that took part, if they are known.
        """
        old = {name: state[f"{GLOBAL}{name}"] for name in changes}
        mean = {name: t + changes[name] for name, t in old.items()}
        new, memory = self.server_optimizer.step(old, mean, under(state, SERVER))
        after = dict(state) | prefixed(new, GLOBAL) | prefixed(memory, SERVER)
        for name, t in new.items():  # both factors of one dtype
            other = f"{GLOBAL}{name[:-1]}{'a' if name[-1] == 'b' else 'b'}"
            after[other] = state[other].to(t.dtype)
        return after | next_seen(state, updates)


def _pair(state: State) -> dict[str, Factors]:
    """The global pair."""
    return unpack(state, float(state["alpha"]), GLOBAL)


def first_of(pair: Factors, rank: int) -> Factors:
    """The first ``r`` of ``R`` rank indices: ``A[:r]`` and ``B[:, :r]`` times ``r / R``, so that
    their products stay what they are at the scale of rank ``r``.

    Raises:
        ValueError: if there are fewer.
    """
    if rank > pair.rank:
        raise ValueError(f"rank {rank} exceeds the global rank {pair.rank}")
    if rank == pair.rank:
        return pair
    return Factors(pair.a[:rank], (rank / pair.rank) * pair.b[:, :rank], pair.alpha)


def change(pair: Factors, sent: Factors, side: str) -> Tensor:
    """What a client's trained factor has moved by, ``[r, d]``, at the scale of the global pair; the
    other one is not looked at.

    Args:
        pair: the global one; the client started from its `first_of`.
        sent: by the client.
        side: ``a`` or ``b``.
    """
    start = first_of(pair, sent.rank)
    if side == "a":
        return sent.a - start.a
    return (pair.rank / sent.rank) * (sent.b - start.b).T
