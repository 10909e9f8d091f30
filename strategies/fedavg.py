r"""FedAvg on LoRA factors: average A and average B, at one rank for all clients.

    A ← Σ_k p_k A_k        B ← Σ_k p_k B_k        p_k = n_k / Σ_j n_j

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv:1602.05629; the baseline of FlexLoRA, arXiv:2402.11505, with plain SGD on the clients (its
YAML chooses ``client=sgd``). The product of the averages is not the average of the products.
"""

from dataclasses import dataclass

from fedlora.algebra.factor_average import FactorAverage
from strategies.base import LoRAStrategy


@dataclass(frozen=True, eq=False, kw_only=True)
class FedAvg(FactorAverage, LoRAStrategy):
    pass
