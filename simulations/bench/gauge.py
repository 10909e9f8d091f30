"""What one client does to averages by rescaling its factors, with and without turning them back.

    python -m simulations.bench.gauge

20 clients of rank 8 train one module and one of them sends ``(c B, A / c)``. The error of
``mean(B) mean(A)`` against ``mean(B A)`` is a fraction of the length of the latter, for the factors
as they are, for the balanced factors of their product's SVD, and for `fedlora.server.gauge`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedlora.algebra.linalg import factors_of_rank, svd_of_product
from fedlora.core.seeding import torch_generator
from fedlora.core.types import Factors
from fedlora.server.gauge import nearest

M, N, R, CLIENTS, ALPHA = 64, 48, 8, 20, 8.0
STRENGTHS = (1.0, 3.0, 10.0, 30.0)


def cohort(first: float, seed: int = 0) -> tuple[Factors, list[Factors]]:
    """The start and what clients trained to: a common change and noise of the same size.

    Args:
        first: standard deviation of the ``B`` that they start from; 0: the first round.
        seed: of everything.
    """
    g = torch_generator(seed, "bench-gauge")

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    a = (2 * torch.rand(R, N, generator=g, dtype=torch.float64) - 1) / N**0.5
    start = Factors(a, first * drawn(M, R), ALPHA)
    common = 0.02 * drawn(R, N), 0.05 * drawn(M, R)
    ends = [
        Factors(
            start.a + common[0] + 0.02 * drawn(R, N),
            start.b + common[1] + 0.05 * drawn(M, R),
            ALPHA,
        )
        for _ in range(CLIENTS)
    ]
    return start, ends


def balanced(f: Factors, start: Factors) -> Factors:
    """The factors of the SVD of the product, half of the singular values in each."""
    return factors_of_rank(svd_of_product(f.scale * f.b, f.a), R, ALPHA, "balanced", f.a)


RULES: dict[str, Callable[[Factors, Factors], Factors]] = {
    "as sent": lambda f, start: f,
    "balanced SVD": balanced,
    "turned back": nearest,
}


def error(start: Factors, ends: list[Factors], c: float, rule: str) -> float:
    """The error of the average of factors, one client of which rescales by ``c``."""
    exact = torch.stack([f.delta() for f in ends]).mean(dim=0)
    attacked = [Factors(ends[0].a / c, ends[0].b * c, ALPHA), *ends[1:]]
    turned = [RULES[rule](f, start) for f in attacked]
    b = torch.stack([f.b for f in turned]).mean(dim=0)
    a = torch.stack([f.a for f in turned]).mean(dim=0)
    return float((start.scale * (b @ a) - exact).norm() / exact.norm())


def main() -> None:
    """Print the table."""
    print(f"{'round':>8} {'c':>5}" + "".join(f"{rule:>15}" for rule in RULES))
    for name, first in (("first", 0.0), ("later", 0.3)):
        start, ends = cohort(first)
        for c in STRENGTHS:
            found = "".join(f"{error(start, ends, c, rule):15.3f}" for rule in RULES)
            print(f"{name:>8} {c:5.0f}{found}")


if __name__ == "__main__":
    main()
