r"""Exact averages over a base that moves: FLoRA, FedEx-LoRA, FLoRIST.

``g`` is the global update, dense. A client of rank ``r`` starts from the base ``W + g - P_r`` and
from factors whose product is ``P_r``, so that every client starts from the global model itself:

    g ← g + Σ_k p_k (s_k B_k A_k - P_{r_k})        p_k = n_k / Σ_j n_j,  s_k = alpha / r_k

which is the mean of the clients' models, whatever their ranks. What stays in the factors is

    hold=none    P = 0: a new A, and B = 0        FLoRA, arXiv:2409.05976
    hold=mean    P = s B̄ Ā                        FedEx-LoRA, arXiv:2410.09432
    hold=svd     P = T_r(Σ_k p_k s_k B_k A_k)     after FedMomentum, arXiv:2603.08014 (its abstract)

With ``energy < 1`` what enters the base, beyond the factors, is cut at this fraction of its squared
singular values: with ``hold=none`` FLoRIST, arXiv:2506.09199, with ``hold=mean`` FedEx-LoRA with a
truncated residual. The global model is ``W + g`` at every rank. Where papers, released code and
this file differ, see docs/fidelity.md.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.algebra.factor_average import covered_average, first_of
from fedlora.algebra.init import initial_factors, sample_a
from fedlora.algebra.linalg import (
    SVD,
    average,
    client_weights,
    complete,
    factors_of_rank,
    normalize,
    stack,
    svd,
    svd_of_product,
)
from fedlora.algebra.owners import at_ranks, common_ranks
from fedlora.algebra.server_optimizer import NoServerOptimizer, ServerOptimizer
from fedlora.algebra.state import (
    Kept,
    State,
    integers,
    order,
    pack,
    paths,
    prefixed,
    scalar,
    under,
    unpack,
)
from fedlora.algebra.summand import Product, Summand, Summands, dense
from fedlora.core.checks import one_of
from fedlora.core.payload import Payload
from fedlora.core.seeding import torch_seed
from fedlora.core.types import Client, Factors, Ranks, Setting, TrainJob, Update
from fedlora.server.base_changes import SENT, missed_scalars, nothing_sent, with_round
from fedlora.server.method import Setup
from fedlora.server.missed import NOTHING, ROUND, SEEN, first_seen, next_seen, seen_by
from fedlora.techniques.rebased.payload import Rebased
from fedlora.wire.codec import WIRE_BYTES
from strategies.base import LoRAStrategy

SHIFT, HOLD, SERVER = "shift/", "hold/", "server/"


@dataclass(frozen=True, eq=False, kw_only=True)
class Rebase(LoRAStrategy):
    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    hold: str = "none"
    """What stays in the factors: ``none``, their ``mean``, or the leading directions of the mean of
    products (``svd``)."""
    energy: float = 1.0
    """Fraction of the squared singular values that enters the base, in (0, 1]; 1: all of it."""
    own_a: bool = False
    """``hold=none`` only: each client draws an ``A`` of its own; if not, all clients of a round
    have the rows of one."""
    heterogeneous: str = "own"
    """Clients of unequal rank: all train their ``own``, all train the ``smallest``, or
    ``refuse``."""
    server_optimizer: ServerOptimizer = field(default_factory=NoServerOptimizer)
    """Acts on ``g``."""

    def __post_init__(self) -> None:
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        one_of("strategy.hold", self.hold, ("none", "mean", "svd"))
        one_of("strategy.heterogeneous", self.heterogeneous, ("own", "smallest", "refuse"))
        if not 0 < self.energy <= 1:
            raise ValueError(f"strategy.energy={self.energy!r} must lie in (0, 1]")
        if self.own_a and self.hold != "none":
            raise ValueError(
                f"strategy.own_a=true draws new factors, and strategy.hold={self.hold} goes on "
                "with those of the round before: choose strategy.hold=none or strategy.own_a=false"
            )
        if self.energy < 1 and self.hold != "none" and self.heterogeneous == "own":
            raise ValueError(
                f"strategy.energy={self.energy:g} with strategy.hold={self.hold}: at unequal ranks "
                "every rank has a base of its own, and there is no common residual to cut; choose "
                "strategy.energy=1, or strategy.heterogeneous=smallest or refuse"
            )
        if self.hold == "mean" and self._steps:
            raise ValueError(
                "strategy/server_optimizer with strategy.hold=mean: the residual is what the mean "
                "of the factors lacks of the clients' mean, not of a model that the server has "
                "moved further; choose strategy/server_optimizer=none, or strategy.hold=none or svd"
            )

    @property
    def _steps(self) -> bool:
        return not isinstance(self.server_optimizer, NoServerOptimizer)

    def check(self, setup: Setup) -> None:
        super().check(setup)
        if setup.quantization != "none":
            raise ValueError(
                f"model.quantization={setup.quantization} with strategy.hold={self.hold}: updates "
                "are merged into the weights, which quantised weights cannot hold; use "
                "model.quantization=none"
            )
        if setup.wire == "bfloat16":
            raise ValueError(
                f"federation.wire=bfloat16 with strategy.hold={self.hold}: every client adds what "
                "it is sent to a base of its own, and rounded changes would drive these apart; use "
                "federation.wire=float32"
            )

    # --- a round --------------------------------------------------------------------------------

    def init_state(self, setting: Setting) -> State:
        """``g = 0`` and, unless ``hold=none``, the common initialisation.

        Raises:
            ValueError: if clients hold unequal ranks and that was to be refused.
        """
        ranks = common_ranks(setting, self.heterogeneous, "own")
        zero = {m.path: torch.zeros(m.d_out, m.d_in) for m in setting.modules}
        state = {
            "alpha": scalar(setting.alpha),
            "seed": integers(setting.seed),
            **first_seen(len(setting.clients)),
            SENT: nothing_sent(setting),
            f"{SHIFT}order": order(zero),
            **{f"{SHIFT}{path}/d": d for path, d in zero.items()},
            **prefixed(self.server_optimizer.init(zero), SERVER),
        }
        if self.heterogeneous == "smallest":
            state["ranks"] = integers(ranks[m.path] for m in setting.modules)
        if self.hold == "none":
            return state
        return state | _packed(initial_factors(setting, ranks))

    def enlist(self, state: State, client: Client) -> Client:
        """The client at the rank that all clients train, or at its own."""
        if self.heterogeneous != "smallest":
            return client
        common = dict(zip(_shift(state), state["ranks"].tolist(), strict=True))
        ranks = Ranks({path: common[path] for path in client.ranks})
        return at_ranks(client, ranks)

    def variant(self, state: State, client: Client) -> Hashable:
        return client.id if self.own_a else client.ranks

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Payload:
        """``W + g - P_r`` under the factors of ``P_r``.

        The difference is taken in float64, so a client's start equals the global model up to one
        rounding.
        """
        shift = _shift(state)
        if self.hold == "none":
            return Rebased(shift, self._drawn(state, client))
        held = _held(state)
        factors = {path: first_of(held[path], r) for path, r in client.ranks.items()}
        base = {p: (g.double() - _product(factors[p])).to(g.dtype) for p, g in shift.items()}
        return Rebased(base, factors)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p = normalize(self.reference_weights(updates))
        shift, old = _shift(state), _held(state)
        changes: dict[str, Summand] = {}
        new: dict[str, Factors] = {}
        bounds, dtype = [], torch.float32
        for path in shift:
            sent = [u.adapter[path] for u in updates]
            dtype = sent[0].b.dtype
            changes[path] = _change(sent, p, old.get(path))
            if self.hold != "none":
                new[path] = self._hold(state, path, old[path], sent, p)
            bounds.append(self._rank([f.rank for f in sent], old.get(path)))
        after = self._next(state, changes, new, bounds, dtype)
        return after | next_seen(state, updates)

    @property
    def inexact(self) -> str:
        return f"it drops what is beyond {self.energy:g} of the energy" if self.energy < 1 else ""

    @property
    def needs_updates(self) -> str:
        if self.hold != "none":
            return (
                f"strategy.hold={self.hold}: what stays in the factors does not follow from a sum "
                "of changes of the weights; choose strategy.hold=none"
            )
        return ""

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """``s_k B_k A_k``, a product: what a client adds to ``g``, for its ``B`` began at zero."""
        if self.needs_updates:
            return None
        return {p: Product(f.scale * f.b, f.a) for p, f in update.adapter.items()}

    def adds_state(self, state: State) -> State:
        """Nothing: a client knows what it has trained."""
        return {}

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """``g + total / weight``. A sum does not say which clients took part, so the bytes that a
        client is sent next are counted as if it had missed this round."""
        changes: dict[str, Summand] = {}
        for path, x in total.items():
            changes[path] = Product(x.b / weight, x.a) if isinstance(x, Product) else x / weight
        bounds, dtype = [], torch.float32
        for path in _shift(state):
            x = changes[path]
            bounds.append(x.a.shape[0] if isinstance(x, Product) else min(x.shape))
            dtype = x.b.dtype if isinstance(x, Product) else x.dtype
        return self._next(state, changes, {}, bounds, dtype)

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """The bytes of what the client's base has missed, and of the factors that are held.

        A client keeps its base, draws a new ``A`` from the seed, and knows ``B = 0``; before
        anything has changed, all of it follows from the seed. What it missed of a weight is sent as
        factors of each round's change, or as the sum of them if that is smaller.
        """
        known, shift = seen_by(state, job.client.id), _shift(state)
        if not int(state[ROUND]) and known == 0:
            return 0
        shapes = [(int(g.shape[0]), int(g.shape[1])) for g in shift.values()]
        scalars = missed_scalars(state[SENT], known, shapes)
        # A factor that no client trains is what it was, unless an SVD has replaced it.
        new = self.hold == "svd" or known < 0
        with_a, with_b = new or job.plan.train_a, new or job.plan.train_b
        for path in _held(state):
            (m, n), r = shift[path].shape, job.client.ranks[path]
            scalars += r * (n * with_a + m * with_b)
        return scalars * WIRE_BYTES[wire]

    # --- the global model -----------------------------------------------------------------------

    def global_update(self, state: State, ranks: Ranks | None = None) -> Payload:
        """``g``, at every rank."""
        return Rebased(_shift(state))

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def report(self, state: State) -> Mapping[str, float | int | str]:
        """Norm of ``g``, the share of it that is not in the factors, and the mean over modules of
        the rank of the round's change of the base."""
        shift, held = _shift(state), _held(state)
        norms = [float(g.double().norm()) for g in shift.values()]
        rest = [
            float((g.double() - _product(held[p])).norm()) if p in held else norm
            for (p, g), norm in zip(shift.items(), norms, strict=True)
        ]
        whole, part = (float(torch.tensor(x, dtype=torch.float64).norm()) for x in (norms, rest))
        record: dict[str, float | int | str] = {
            "rebase/shift_norm": whole,
            "rebase/residual_relative": part / whole if whole else 0.0,
        }
        if len(state[SENT]):
            record["rebase/sent_rank"] = float(state[SENT][-1].double().mean())
        return record

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        """``g = delta``, exactly, of which clients know nothing. Factors that are held become its
        leading directions."""
        shift = {path: delta[path] for path in _shift(state)}
        kept = {key: t for key, t in state.items() if not key.startswith(SERVER)}
        held = {
            path: self._leading(state, path, svd(delta[path]), f)
            for path, f in _held(state).items()
        }
        return (
            kept
            | {f"{SHIFT}{path}/d": d.clone() for path, d in shift.items()}
            | first_seen(len(state[SEEN]), NOTHING)
            | {SENT: state[SENT][:0]}
            | _packed(held)
            | prefixed(self.server_optimizer.init(shift), SERVER)
        )

    # --- pieces ---------------------------------------------------------------------------------

    def _drawn(self, state: State, client: Client) -> dict[str, Factors]:
        """New factors of a round: ``A`` from the seed, nested in the rank, and ``B = 0``."""
        whose = (client.id,) if self.own_a else ()
        seed = torch_seed(int(state["seed"]), "flora", int(state[ROUND]), *whose)
        alpha, found = float(state["alpha"]), {}
        for path, g in _shift(state).items():
            (d_out, d_in), r = g.shape, client.ranks[path]
            found[path] = Factors(sample_a(seed, path, r, d_in), torch.zeros(d_out, r), alpha)
        return found

    def _hold(
        self, state: State, path: str, old: Factors, sent: Sequence[Factors], p: Sequence[float]
    ) -> Factors:
        """The pair of the largest rank whose first indices clients go on with."""
        if self.hold == "svd":
            return self._leading(state, path, svd_of_product(*stack(sent, p)), old)
        return covered_average(old, sent, p) if self.heterogeneous == "own" else average(sent, p)

    def _leading(self, state: State, path: str, w: SVD, old: Factors) -> Factors:
        """``T_r(w)`` in balanced factors of the rank of ``old``. Where ``w`` has fewer directions,
        ``A`` goes on with rows orthonormal to them and ``B`` with zeros."""
        if not w.rank:
            return Factors(old.a, torch.zeros_like(old.b), old.alpha)
        filler = sample_a(int(state["seed"]), path, old.rank, old.a.shape[1])
        return factors_of_rank(w, old.rank, old.alpha, "balanced", complete(w.v, filler))

    def _rank(self, ranks: Sequence[int], old: Factors | None) -> int:
        """A bound on the rank of a round's change of one weight under the factors.

        ``hold=mean``: deviations from a mean are one fewer than clients. ``hold=svd``: the leading
        ``r`` directions are in the factors. With a base for each rank, what a client has of ``P``
        says nothing of the rest of it, which is sent too.
        """
        if old is None:
            return sum(ranks)
        if self.heterogeneous == "own":
            return sum(ranks) + old.rank
        return sum(ranks) - old.rank

    def _next(
        self,
        state: State,
        changes: Mapping[str, Summand],
        held: Mapping[str, Factors],
        bounds: Sequence[int],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """The state after a round.

        Args:
            state: before it.
            changes: of ``g``, exact.
            held: the new pairs; empty: none are held.
            bounds: per module, the rank of the change under the factors.
            dtype: of what clients sent; ``g`` is not narrower.
        """
        old, moved, ranks = _held(state), {}, []
        shift, memory = _shift(state), under(state, SERVER)
        for (path, g), bound in zip(shift.items(), bounds, strict=True):
            step, rank = _dense(changes[path]), bound
            if self.energy < 1:
                step, rank = self._cut(changes[path], old.get(path), held.get(path))
            moved[path] = (g.double() + step).to(torch.promote_types(g.dtype, dtype))
            ranks.append(min(rank, *g.shape))
        if self._steps:
            moved, memory = self.server_optimizer.step(shift, moved, memory)
            ranks = [min(g.shape) for g in shift.values()]  # velocities are of any rank
        return (
            dict(state)
            | next_seen(state, ())
            | {SENT: with_round(state[SENT], ranks)}
            | {f"{SHIFT}{path}/d": g for path, g in moved.items()}
            | _packed(held)
            | prefixed(memory, SERVER)
        )

    def _cut(self, change: Summand, old: Factors | None, new: Factors | None) -> tuple[Tensor, int]:
        """A change of ``g`` whose part under the factors has lost its smallest directions,
        ``[d_out, d_in]`` float64, and how many are left of it."""
        held = torch.zeros((), dtype=torch.float64)
        if old is not None and new is not None:
            held = _product(new) - _product(old)
            change = _dense(change) - held
        w = svd_of_product(change.b, change.a) if isinstance(change, Product) else svd(change)
        squares = w.s.double().square()
        # The fewest directions with the energy that is asked for; none of nothing.
        count = int((squares.cumsum(0) < self.energy * squares.sum()).sum()) + 1 if w.rank else 0
        kept = SVD(w.u[:, :count], w.s[:count], w.v[:count])
        return kept.dense().double() + held, count


def _change(sent: Sequence[Factors], p: Sequence[float], held: Factors | None) -> Product:
    """``Σ_k p_k (s_k B_k A_k - P_{r_k})`` of one module.

    Args:
        sent: clients' factors.
        p: their weights, of sum 1.
        held: the pair whose first indices clients started from; None: they started from ``B = 0``.
    """
    if held is None:
        return Product(*stack(sent, p))
    # In float64: what clients started from must cancel where they have not moved.
    b, a = stack([_wide(f) for f in sent], p)
    weight: dict[int, float] = {}
    for f, w in zip(sent, p, strict=True):
        weight[f.rank] = weight.get(f.rank, 0.0) + w
    starts = [_wide(first_of(held, r)) for r in weight]
    less_b, less_a = stack(starts, list(weight.values()))
    return Product(torch.cat([b, -less_b], dim=1), torch.cat([a, less_a]))


def _wide(f: Factors) -> Factors:
    return Factors(f.a.double(), f.b.double(), f.alpha)


def _product(f: Factors) -> Tensor:
    """``s B A``, ``[d_out, d_in]`` float64."""
    return f.scale * (f.b.double() @ f.a.double())


def _dense(x: Summand) -> Tensor:
    """``[d_out, d_in]`` float64."""
    return dense(Product(x.b.double(), x.a.double()) if isinstance(x, Product) else x.double())


def _shift(state: State) -> dict[str, Tensor]:
    """Module path -> ``g [d_out, d_in]``, in module order."""
    return {path: state[f"{SHIFT}{path}/d"] for path in paths(state, "d", SHIFT)}


def _held(state: State) -> dict[str, Factors]:
    """Module path -> the held pair; empty: none is."""
    return unpack(state, float(state["alpha"]), HOLD)


def _packed(held: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The inverse of `_held`."""
    return pack(held, HOLD) | ({f"{HOLD}order": order(held)} if held else {})
