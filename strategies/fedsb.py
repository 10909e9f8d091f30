r"""Fed-SB and RAVAN: clients train small cores between fixed factors, whose average is exact.

    model      ΔW = s_R U R V         U [m, R] and V [R, n] fixed and common, R block-diagonal
    server     R ← R + Σ_k p_k pad(s_k / s_R (C_k - C_k⁰))                    s_r = alpha / r
    client     starts from  C_k⁰ = s_R / s_k R[:r_k, :r_k]  between U[:, :r_k] and V[:r_k]

Fed-SB has one block, ``r²`` scalars a module each way: Singhal et al., "Fed-SB: A Silver Bullet for
Extreme Communication Efficiency and Performance in (Private) Federated LoRA Fine-Tuning",
arXiv:2502.15436. RAVAN has several, its heads, each with a gain that trains beside it,
``ΔW = s Σ_i g_i U_i H_i V_i``. Clients begin with ``g = 1`` and send ``g_i H_i``, since averages of
``g`` and ``H`` apart are not exact: Raje et al., "Ravan: Multi-Head Low-Rank Adaptation for
Federated Fine-Tuning", arXiv:2506.05568.

U and V are orthonormal and follow from the run's seed, so they are never sent; ``R = 0``, which has
a gradient, ``s Uᵀ G Vᵀ``. Fed-SB's code takes U, R and V from the SVD of a gradient's signs
instead, which it computes from the pooled data of all clients: a run here has no such data, and an
exchange of dense gradients costs as much as many rounds of cores. Its federated form is a first
stage of SLoRA with ``density=1.0``, after which ``bases=svd`` begins at the leading directions of
what the clients have learnt together (the first step of AdamW is a gradient's signs); U and V are
then sent to each client once.

The papers have one rank for all. Here a client of rank ``r`` has the leading block of the core:
whole heads, and a part of one where its rank ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora.algebra.linalg import client_weights, normalize
from fedlora.algebra.owners import REFUSE, SMALLEST, WEIGHTINGS, at_ranks, common_ranks
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
from fedlora.algebra.summand import Summands, dense
from fedlora.core.checks import at_least, one_of
from fedlora.core.payload import Payload
from fedlora.core.types import (
    Adapter,
    Client,
    LocalPlan,
    Ranks,
    Setting,
    TrainJob,
    Update,
)
from fedlora.server.method import Setup
from fedlora.server.missed import NOTHING, SEEN, first_seen, next_seen, seen_by
from fedlora.techniques.cores.payload import Core, CorePayload, blocks_in, fixed, named
from fedlora.techniques.lora.technique import LoRA
from fedlora.wire.codec import payload_bytes, update_bytes
from strategies.base import LoRAStrategy

GLOBAL, SERVER, NEST, SIZE = "global/", "server/", "nest", "size"
SEED, SVD = "seed", "svd"


@dataclass(frozen=True, eq=False, kw_only=True)
class FedSB(LoRAStrategy):
    heads: int = 1
    """Blocks of the global core of each module: 1 (Fed-SB), or the heads of RAVAN."""
    gains: bool = False
    """Whether clients train a gain beside each block (RAVAN)."""
    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    heterogeneous: str = NEST
    """Clients of unequal rank: each trains its leading block of the core (``nest``), all train the
    ``smallest`` rank, or ``refuse``."""
    weighting: str = "all"
    """The clients over which ``nest`` averages an entry of the core: ``all``, which is exact, or
    those ``covered`` by their rank."""
    bases: str = SEED
    """U and V of a run that goes on from an update (SLoRA; `adopt`): those of the ``seed``, or the
    update's leading singular vectors (``svd``), as those of Fed-SB's code are a gradient's."""
    server_optimizer: ServerOptimizer = field(default_factory=NoServerOptimizer)
    """Acts on the core."""

    def __post_init__(self) -> None:
        at_least("strategy.heads", self.heads, 1)
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        one_of("strategy.heterogeneous", self.heterogeneous, (NEST, SMALLEST, REFUSE))
        one_of("strategy.weighting", self.weighting, WEIGHTINGS)
        one_of("strategy.bases", self.bases, (SEED, SVD))

    def check(self, setup: Setup) -> None:
        super().check(setup)
        plan = setup.client
        if not (plan.train_a and plan.train_b):
            raise ValueError(
                f"client.train_a={plan.train_a}, client.train_b={plan.train_b}: clients of "
                f"{self.label} train cores between fixed factors; leave both true"
            )
        if plan.term is not None and plan.term.needs_factors:
            raise ValueError(
                f"client.term={type(plan.term).__name__} compares pairs of factors, and clients of "
                f"{self.label} train cores: use client.term.metric=factor, the distance of cores"
            )
        if isinstance(plan.technique, LoRA) and plan.technique.self_prune is not None:
            raise ValueError(
                f"client.technique.self_prune gives up ranks of factors, and clients of "
                f"{self.label} train cores: use client.technique.self_prune=null, or "
                "strategy=heterolora"
            )

    def init_state(self, setting: Setting) -> State:
        """The global core at the largest ranks, or at the smallest if all train those, zero; what
        the fixed factors follow from; what the server optimizer remembers, under ``server/``.

        Raises:
            ValueError: if clients hold unequal ranks and that was to be refused.
        """
        ranks = common_ranks(setting, self.heterogeneous, NEST)
        cores = {
            m.path: Core(m.d_out, m.d_in, zeros(ranks[m.path], self.heads)) for m in setting.modules
        }
        sizes = {f"{p}/{SIZE}": integers([c.d_out, c.d_in]) for p, c in cores.items()}
        clients = len(setting.clients)
        return {
            **(first_seen(clients, NOTHING) if self.bases == SVD else {}),
            "alpha": scalar(setting.alpha),
            "seed": integers(setting.seed),
            f"{GLOBAL}order": order(cores),
            **prefixed(sizes, GLOBAL),
            **self._begun(cores),
        }

    def enlist(self, state: State, client: Client) -> Client:
        """The client at its own ranks, or at those that all clients train."""
        if self.heterogeneous == NEST:
            return client
        return at_ranks(client, Ranks({p: c.rank for p, c in _cores(state).items()}))

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> CorePayload:
        return self._payload(state, client.ranks)

    def plan(self, state: State, client: Client, base: LocalPlan) -> LocalPlan:
        """``B = U R`` trains, within the span of U, and A stays."""
        return replace(base, train_a=False)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p, moved = normalize(self.reference_weights(updates)), {}
        for path, core in _cores(state).items():
            changes = [change(core, _sent(u).cores[path]) for u in updates]
            for i, (name, block) in enumerate(named(path, core.blocks).items()):
                owners = [(w, c[i]) for w, c in zip(p, changes, strict=True) if i < len(c)]
                moved[name] = mean_block(owners, len(block), self.weighting)
        return self._moved(state, moved, updates)

    @property
    def needs_updates(self) -> str:
        if self.weighting == "all":
            return ""
        return (
            "strategy.weighting=covered divides by the weights of the clients that have an entry "
            "of the core; choose strategy.weighting=all"
        )

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """The change of the core, padded to the global one, if ``weighting=all``."""
        if self.needs_updates:
            return None
        found: dict[str, Tensor] = {}
        for path, core in _cores(state).items():
            moved = change(core, _sent(update).cores[path])
            for i, (name, block) in enumerate(named(path, core.blocks).items()):
                own = moved[i] if i < len(moved) else moved[0].new_zeros(0, 0)
                found[name] = _padded(own, len(block))
        return found

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """The state after a sum. A sum does not say which clients took part, so fixed factors that
        do not follow from the seed count as not sent to them."""
        return self._moved(state, {name: dense(x) / weight for name, x in total.items()}, ())

    def global_update(self, state: State, ranks: Ranks | None = None) -> Adapter:
        """``A = V`` and ``B = U R``, or what clients of these ranks hold of them."""
        own = ranks or Ranks({path: core.rank for path, core in _cores(state).items()})
        return self._payload(state, own).low_rank()

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """The bytes of the core; of none, as long as it is the one that all begin with. Fixed
        factors that do not follow from the seed are sent once."""
        start = job.start
        assert isinstance(start, CorePayload)
        if not any(bool(t.any()) for _, t in start.tensors()):
            return 0
        if start.bases is None or seen_by(state, job.client.id) == NOTHING:
            return payload_bytes(start, wire)
        return update_bytes(start, job.plan, wire)

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """The state that begins at a dense update's projection on what the core can express: the
        spans of U and V, head by head. With ``bases=svd`` these are the update's own leading
        directions, R is diagonal, and the start is the best approximation of its rank."""
        alpha, begun, bases = float(state["alpha"]), dict[str, Core](), dict[str, Tensor]()
        for path, core in _cores(state).items():
            d = delta[path]
            if self.bases == SVD:
                left, _, right = torch.linalg.svd(d, full_matrices=False)
                u, v = left[:, : core.rank].contiguous(), right[: core.rank].contiguous()
                bases |= {f"{GLOBAL}{path}/u": u, f"{GLOBAL}{path}/v": v}
            else:
                u, v = fixed(int(state["seed"]), path, core, d.dtype, d.device)
            whole = u.T @ d @ v.T * (core.rank / alpha)  # [R, R]
            blocks, at = [], 0
            for n in core.sizes:
                blocks.append(whole[at : at + n, at : at + n].clone())
                at += n
            begun[path] = replace(core, blocks=tuple(blocks))
        seen = first_seen(len(state[SEEN]), NOTHING) if self.bases == SVD else {}
        return dict(state) | seen | bases | self._begun(begun)

    # --- pieces ---------------------------------------------------------------------------------

    def _payload(self, state: State, ranks: Ranks) -> CorePayload:
        cores = _cores(state)
        own = {path: leading(cores[path], r) for path, r in ranks.items()}
        bases = None
        if all(f"{GLOBAL}{path}/u" in state for path in own):
            both = {path: [state[f"{GLOBAL}{path}/{n}"] for n in "uv"] for path in own}
            bases = {p: (u[:, : ranks[p]], v[: ranks[p]]) for p, (u, v) in both.items()}
        return CorePayload(own, float(state["alpha"]), int(state["seed"]), self.gains, bases)

    def _begun(self, cores: Mapping[str, Core]) -> dict[str, Tensor]:
        """The part of a state that begins at a global core."""
        packed: dict[str, Tensor] = {}
        for path, core in cores.items():
            packed |= named(path, core.blocks)
        memory = self.server_optimizer.init(packed)
        return prefixed(packed, GLOBAL) | prefixed(memory, SERVER)

    def _moved(
        self, state: State, changes: Mapping[str, Tensor], updates: Sequence[Update]
    ) -> State:
        """The state after a round in which blocks move by these changes.

        Args:
            state: from which the round began.
            changes: by the names of blocks.
            updates: of the clients that took part, if they are known.
        """
        old = {name: state[f"{GLOBAL}{name}"] for name in changes}
        mean = {name: t + changes[name] for name, t in old.items()}
        new, memory = self.server_optimizer.step(old, mean, under(state, SERVER))
        seen = next_seen(state, updates) if SEEN in state else {}
        return dict(state) | seen | prefixed(new, GLOBAL) | prefixed(memory, SERVER)


def _cores(state: State) -> dict[str, Core]:
    """The global cores, in the order of the model's modules."""
    found = {}
    for path in paths(state, SIZE, GLOBAL):
        d_out, d_in = state[f"{GLOBAL}{path}/{SIZE}"].tolist()
        found[path] = Core(d_out, d_in, blocks_in(state, f"{GLOBAL}{path}"))
    return found


def _sent(update: Update) -> CorePayload:
    payload = update.payload
    if not isinstance(payload, CorePayload):
        kind = type(payload).__name__
        raise TypeError(f"client {update.client.id} sent a {kind} where cores are required")
    return payload


def zeros(rank: int, heads: int) -> tuple[Tensor, ...]:
    """Blocks of zeros along a core of some rank, as equal in size as they can be: a core of rank 15
    has four heads of 4, 4, 4 and 3."""
    size, more = divmod(rank, heads)
    sizes = [size + (i < more) for i in range(min(heads, rank))]
    return tuple(torch.zeros(n, n) for n in sizes)


def leading(core: Core, rank: int) -> Core:
    """The leading block ``R[:r, :r]`` times ``r / R``, so that its product stays what it is at the
    scale of rank ``r``: whole heads, and the leading part of one where the rank ends.

    Raises:
        ValueError: if the core has a smaller rank.
    """
    if rank > core.rank:
        raise ValueError(f"rank {rank} exceeds the global rank {core.rank}")
    if rank == core.rank:
        return core
    blocks, left = [], rank
    for block in core.blocks:
        n = min(left, len(block))
        if n:
            blocks.append((rank / core.rank) * block[:n, :n])
        left -= n
    return replace(core, blocks=tuple(blocks))


def change(core: Core, sent: Core) -> list[Tensor]:
    """What a client has moved its blocks by, ``[b_i, b_i]`` each, at the scale of the global core.

    Args:
        core: the global one; the client started from its `leading` part.
        sent: by the client.
    """
    start, scale = leading(core, sent.rank), core.rank / sent.rank
    return [scale * (b - a) for a, b in zip(start.blocks, sent.blocks, strict=True)]


def mean_block(owners: Sequence[tuple[float, Tensor]], size: int, weighting: str) -> Tensor:
    """The mean change of one global block, ``[size, size]``, in a dtype of at least float32.

    Args:
        owners: weight and change of each client that has some of it; those of all clients sum
            to 1.
        size: of the block.
        weighting: ``all``: the others did not move it; ``covered``: over its owners, entry by
            entry.
    """
    mean, owned = torch.zeros(size, size), torch.zeros(size, size, dtype=torch.float64)
    for w, x in owners:
        mean = mean + w * _padded(x.to(torch.promote_types(x.dtype, torch.float32)), size)
        owned[: len(x), : len(x)] += w
    if weighting == "covered":
        mean = torch.where(owned > 0, mean / owned.to(mean.dtype), mean)
    return mean


def _padded(block: Tensor, size: int) -> Tensor:
    """A leading block with zeros around, ``[size, size]``."""
    more = size - len(block)
    return pad(block, (0, more, 0, more))
