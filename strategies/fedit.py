r"""FedIT: federated instruction tuning, FedAvg of LoRA factors with AdamW on the clients.

    A ← Σ_k p_k A_k        B ← Σ_k p_k B_k        p_k = n_k / Σ_j n_j

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv:2305.05644.
The server's rule is FedAvg's; the method differs by its clients, whose optimizer is AdamW with a
fresh state every round (``client=adamw``, the default of conf/config.yaml).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedlora import factor_average
from fedlora.server_optimizer import NoServerOptimizer, ServerOptimizer
from fedlora.state import State
from fedlora.types import Adapter, Client, Ranks, Setting, Update, one_of
from strategies.base import LoRAStrategy


@dataclass(frozen=True, eq=False, kw_only=True)
class FedIT(LoRAStrategy):
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
        return factor_average.initial_state(setting, self.heterogeneous, self.server_optimizer)

    def enlist(self, state: State, client: Client) -> Client:
        return factor_average.at_common_rank(state, client)

    def start_adapter(self, state: State, client: Client) -> Adapter:
        return factor_average.factors(state)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        return factor_average.next_state(state, updates, self.weights, self.server_optimizer)

    def adopt(self, state: State, delta: Mapping[str, Tensor]) -> State:
        return factor_average.continued(state, delta, self.server_optimizer)

    def global_adapter(self, state: State, ranks: Ranks | None = None) -> Adapter:
        return factor_average.at_ranks(state, ranks)
