"""Shapes of adapted layers by which server benchmarks make updates without a model."""

from dataclasses import dataclass

import torch

from fedlora.core.seeding import torch_generator
from fedlora.core.types import Factors


@dataclass(frozen=True)
class Shapes:
    """The adapted layers of a model: ``(d_out, d_in, how many)``."""

    layers: tuple[tuple[int, int, int], ...]

    def factors(self, client: int, rank: int, alpha: float = 16.0) -> dict[str, Factors]:
        """Factors of one client, float32: a common part and noise of its own."""
        found = {}
        for kind, (m, n, count) in enumerate(self.layers):
            for i in range(count):
                common = torch_generator(0, "bench", kind, i)
                own = torch_generator(1, "bench", kind, i, client)
                a = torch.randn(rank, n, generator=common) + torch.randn(rank, n, generator=own)
                b = torch.randn(m, rank, generator=common) + torch.randn(m, rank, generator=own)
                found[f"{kind}.{i}"] = Factors(a / n**0.5, 1e-3 * b, alpha)
        return found


SHAPES = {
    "tiny": Shapes(((128, 128, 16), (352, 128, 8), (128, 352, 4))),
    "smollm2": Shapes(
        ((576, 576, 60), (192, 576, 60), (1536, 576, 60), (576, 1536, 30)),
    ),
}
"""Tiny: the project's own model of four blocks; SmolLM2-135M: 30 blocks."""
