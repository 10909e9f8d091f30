r"""FedSA-LoRA: clients average A, and each keeps its B.

    client k   trains A and B, from A[:r_k] and its own B_k (zero before its first round)
    server     A_i ← A_i + Σ_{k: r_k > i} p_k (A_{k,i} - A_i) / h_i        h_i = Σ_{k: r_k > i} p_k

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
arXiv:2410.01463. Rows of ``A`` are averaged over the clients that have them; ``A`` has no scale,
which belongs to ``B``. There is no global model: evaluate with ``evaluate.adapters=[own]``, where a
client that never took part uses the base model. See docs/fidelity.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from fedlora.algebra.init import initial_factors
from fedlora.algebra.linalg import client_weights, normalize
from fedlora.algebra.owners import WEIGHTINGS, mean_change
from fedlora.algebra.state import Kept, State, integers, order, pack, scalar, unpack
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
from fedlora.wire.codec import WIRE_BYTES, update_bytes
from strategies.base import LoRAStrategy

GLOBAL = "global/"


@dataclass(frozen=True, eq=False, kw_only=True)
class FedSA(LoRAStrategy):
    private: ClassVar[str] = "b"

    weights: str = "examples"
    """``examples`` (``n_k``) or ``uniform``."""
    weighting: str = "covered"
    """A row's change is averaged over the clients that have the row (``covered``), or over ``all``
    (``h_i = 1``), for which a sum of changes is enough."""

    def __post_init__(self) -> None:
        one_of("strategy.weights", self.weights, ("examples", "uniform"))
        one_of("strategy.weighting", self.weighting, WEIGHTINGS)

    def check(self, setup: Setup) -> None:
        super().check(setup)
        if not (setup.client.train_a and setup.client.train_b):
            raise ValueError(
                f"client.train_a={setup.client.train_a} and client.train_b="
                f"{setup.client.train_b}: FedSA averages A, which has no gradient before B has "
                "moved; train both, or use strategy=fedit, which can freeze either"
            )

    def init_state(self, setting: Setting) -> State:
        """``A`` at the largest ranks, and the ``B = 0`` of a client that has not trained."""
        return {
            "alpha": scalar(setting.alpha),
            "round": integers(0),
            f"{GLOBAL}order": order(m.path for m in setting.modules),
            **pack(initial_factors(setting, setting.max_ranks), GLOBAL),
        }

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        start = self.global_update(state, client.ranks)
        if kept is None:
            return start
        return {path: replace(f, b=kept[f"{path}/b"]) for path, f in start.items()}

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        p = normalize(self.reference_weights(updates))
        moved = {}
        for path, old in self.global_update(state).items():
            changes = [u.adapter[path].a - old.a[: u.adapter[path].rank] for u in updates]
            moved[path] = mean_change(changes, p, len(old.a), self.weighting)
        return _moved(state, moved)

    @property
    def needs_updates(self) -> str:
        if self.weighting == "all":
            return ""
        return (
            "strategy.weighting=covered divides by the weights of the clients that have a row; "
            "choose strategy.weighting=all"
        )

    def adds(self, state: State, start: Payload, update: Update) -> Summands | None:
        """The changes of ``A``, padded to the largest rank, if ``weighting=all``."""
        if self.weighting != "all":
            return None
        assert isinstance(start, Mapping)
        found = {}
        for path, old in self.global_update(state).items():
            missing = old.rank - start[path].rank
            found[path] = pad(update.adapter[path].a - start[path].a, (0, 0, 0, missing))
        return found

    def absorb(self, state: State, total: Summands, weight: float) -> State:
        return _moved(state, {path: dense(x) / weight for path, x in total.items()})

    def kept(
        self, state: State, client: Client, before: Kept | None, start: Payload, update: Update
    ) -> Kept:
        """The client's ``B`` as it has trained it, ``[d_out, r_k]`` per module."""
        return {f"{path}/b": f.b for path, f in update.adapter.items()}

    def global_update(self, state: State, ranks: Ranks | None = None) -> dict[str, Factors]:
        """``A``, with the ``B = 0`` of a client that has not trained: the base model."""
        found = unpack(state, float(state["alpha"]), GLOBAL)
        if ranks is None:
            return found
        return {
            path: Factors(f.a[: ranks[path]], f.b[:, : ranks[path]], f.alpha)
            for path, f in found.items()
        }

    def personal_update(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        return self.client_start(state, self.enlist(state, client), kept)

    def reference_weights(self, updates: Sequence[Update]) -> list[float]:
        return client_weights(updates, self.weights)

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """Those of ``A``; in the first round it follows from the run's seed."""
        assert isinstance(job.start, Mapping)
        scalars = sum(f.a.numel() for f in job.start.values()) if int(state["round"]) else 0
        return scalars * WIRE_BYTES[wire]

    def bytes_up(self, state: State, update: Update, plan: LocalPlan, wire: str) -> int:
        """Those of ``A``."""
        return update_bytes(update.payload, replace(plan, train_b=False), wire)


def _moved(state: State, changes: Mapping[str, Tensor]) -> State:
    """The next round's state, with ``A`` changed by these ``[R, d_in]``."""
    new = dict(state) | {"round": state["round"] + 1}
    for path, change in changes.items():
        a, zero = (state[f"{GLOBAL}{path}/{name}"] for name in ("a", "b"))
        new[f"{GLOBAL}{path}/a"] = a + change
        new[f"{GLOBAL}{path}/b"] = zero.to(change.dtype)  # both of one dtype
    return new
