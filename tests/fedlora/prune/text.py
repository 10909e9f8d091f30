"""Random text for random models."""

import torch
from torch import Tensor

from tests.fedlora.models.networks import VOCABULARY


def batches(count: int = 4, rows: int = 2, length: int = 11, seed: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (rows, length), generator=g) for _ in range(count)]
