r"""FedIT: federated instruction tuning, FedAvg of LoRA factors with AdamW on the clients.

    A ← Σ_k p_k A_k        B ← Σ_k p_k B_k        p_k = n_k / Σ_j n_j

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv:2305.05644.
The server's rule is FedAvg's; the method differs by its clients, whose optimizer is AdamW with a
fresh state every round (``client=adamw``, the default of conf/config.yaml).
"""

from dataclasses import dataclass

from fedlora.algebra.factor_average import FactorAverage
from strategies.base import LoRAStrategy


@dataclass(frozen=True, eq=False, kw_only=True)
class FedIT(FactorAverage, LoRAStrategy):
    pass
