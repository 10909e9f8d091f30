r"""Local training alone: every client trains its own adapter and shares nothing.

    a client's first round starts from the common initialisation, each later one from what it
    trained before; the global model is the base as it is

The lower bound of federated methods: what a client reaches with its own data in as many rounds, as
Smith et al., "Federated Multi-Task Learning", arXiv:1705.10467, compare with ("local"). Evaluate it
with ``evaluate.adapters=[own]``: a client that never took part uses the base model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.algebra.init import initial_factors
from fedlora.algebra.state import Kept, State, order, pack, scalar, unpack
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
from strategies.base import LoRAStrategy

INITIAL = "initial/"


@dataclass(frozen=True, eq=False, kw_only=True)
class Local(LoRAStrategy):
    private: ClassVar[str] = "ab"

    def init_state(self, setting: Setting) -> State:
        """The common initialisation at the largest ranks; no round changes it."""
        return {
            "alpha": scalar(setting.alpha),
            f"{INITIAL}order": order(m.path for m in setting.modules),
            **pack(initial_factors(setting, setting.max_ranks), INITIAL),
        }

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        return self.global_update(state, client.ranks) if kept is None else _own(state, kept)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        return dict(state)

    @property
    def needs_updates(self) -> str:
        return (
            "strategy local sends no update that a postprocessor could change; choose "
            "postprocess=none and robust=none"
        )

    def kept(
        self, state: State, client: Client, before: Kept | None, start: Payload, update: Update
    ) -> Kept:
        """The client's factors as it has trained them."""
        return pack(update.adapter)

    def global_update(self, state: State, ranks: Ranks | None = None) -> Adapter:
        """The initial factors, whose product is zero."""
        initial = unpack(state, float(state["alpha"]), INITIAL)
        if ranks is None:
            return initial
        return {
            path: Factors(f.a[: ranks[path]], f.b[:, : ranks[path]], f.alpha)
            for path, f in initial.items()
        }

    def personal_update(self, state: State, client: Client, kept: Kept | None = None) -> Adapter:
        return self.client_start(state, self.enlist(state, client), kept)

    def bytes_down(self, state: State, job: TrainJob, wire: str) -> int:
        """Zero: the initialisation follows from the run's seed."""
        return 0

    def bytes_up(self, state: State, update: Update, plan: LocalPlan, wire: str) -> int:
        """Zero."""
        return 0


def _own(state: State, kept: Kept) -> Adapter:
    """What a client keeps, in the order of the model's modules."""
    own = unpack(kept, float(state["alpha"]))
    return {path: own[path] for path in unpack(state, 1.0, INITIAL)}
