r"""FLoRA: stack the clients' factors, merge the product into every client's base, start anew.

    g ← g + [B_1 … B_K] [p_1 s_1 A_1; …; p_K s_K A_K]        p_k = n_k / Σ_j n_j,  s_k = alpha / r_k
    a client starts from the base  W + g,  a new A  and  B = 0

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv:2409.05976. The average is exact for unequal ranks, and the global
model is the same at every rank. Each round's ``A`` is one draw for all clients, nested in the rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.algebra.init import sample_a
from fedlora.algebra.linalg import client_weights, normalized_weights, stack
from fedlora.algebra.state import Kept, State, integers, order, paths, scalar
from fedlora.algebra.summand import Product, Summands, dense
from fedlora.core.checks import one_of
from fedlora.core.payload import Payload
from fedlora.core.seeding import torch_seed
from fedlora.core.types import Client, Factors, Ranks, Setting, TrainJob, Update
from fedlora.techniques.rebased.payload import Rebased
from fedlora.wire.codec import WIRE_BYTES
from strategies.base import LoRAStrategy

SHIFT = "shift/"


@dataclass(frozen=True, eq=False, kw_only=True)
class FLoRA(LoRAStrategy):
    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""

    def __post_init__(self) -> None:
        one_of("strategy.weights", self.weights, ("examples", "uniform"))

    def init_state(self, setting: Setting) -> State:
        zeros = {f"{SHIFT}{m.path}/d": torch.zeros(m.d_out, m.d_in) for m in setting.modules}
        return {
            "alpha": scalar(setting.alpha),
            "seed": integers(setting.seed),
            "round": integers(0),
            f"{SHIFT}order": order(m.path for m in setting.modules),
            **zeros,
        }

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Payload:
        seed = torch_seed(int(state["seed"]), "flora", int(state["round"]))
        shift, alpha = _shift(state), float(state["alpha"])
        factors = {}
        for path, g in shift.items():
            d_out, d_in = g.shape
            rank = client.ranks[path]
            factors[path] = Factors(
                sample_a(seed, path, rank, d_in), torch.zeros(d_out, rank), alpha
            )
        return Rebased(shift, factors)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p = normalized_weights(updates, self.weights)
        new = dict(state) | {"round": state["round"] + 1}
        for path, g in _shift(state).items():
            b, a = stack([u.adapter[path] for u in updates], p)
            new[f"{SHIFT}{path}/d"] = (g.double() + b.double() @ a.double()).to(g.dtype)
        return new

    needs_updates = ""

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """``s_k B_k A_k``, a product: what a client adds to ``g``, for its ``B`` began at zero."""
        return {p: Product(f.scale * f.b, f.a) for p, f in update.adapter.items()}

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        """``g + total / weight``."""
        new = dict(state) | {"round": state["round"] + 1}
        for path, g in _shift(state).items():
            new[f"{SHIFT}{path}/d"] = (g + dense(total[path]) / weight).to(g.dtype)
        return new

    def global_update(self, state: State, ranks: Ranks | None = None) -> Payload:
        return Rebased(_shift(state))

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """The bytes of ``g``: a client draws the round's ``A`` from the seed, and ``B`` is zero. In
        the first round ``g`` is zero too."""
        scalars = sum(g.numel() for g in _shift(state).values()) if int(state["round"]) else 0
        return scalars * WIRE_BYTES[wire]

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        return dict(state) | {f"{SHIFT}{path}/d": d for path, d in delta.items()}


def _shift(state: State) -> dict[str, Tensor]:
    """Module path -> ``g [d_out, d_in]``."""
    return {path: state[f"{SHIFT}{path}/d"] for path in paths(state, "d", SHIFT)}
