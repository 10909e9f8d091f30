r"""How far clients move apart: norms and cosines of their changes, from inner products alone.

With ``x_k`` the change of client ``k`` in the space of the weights, all modules together, and
``G_{kj} = <x_k, x_j>``, weights ``p`` that sum to 1 and the mean ``x̄ = Σ_j p_j x_j``:

    ||x_k||² = G_{kk}      <x_k, x̄> = (G p)_k      ||x̄||² = pᵀ G p

Changes of low-rank factors stay factored. All numbers are of products ``B A``, so they do not
depend on the gauge: ``(B G⁻¹, G A)`` gives the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.algebra.linalg import stack
from fedlora.algebra.summand import Product, Summand, Summands, dense, product_change
from fedlora.core.types import Adapter, Factors

BLOCK = 2**23
"""Elements of the clients' dense rows that are in memory at once."""


def as_product(f: Factors) -> Product:
    """``s B A``, in a dtype of at least float32."""
    b, a = stack([f], [1.0])
    return Product(b, a)


def factor_change(start: Adapter, end: Adapter) -> dict[str, Product]:
    """``s B A - s⁰ B⁰ A⁰`` of each module of ``end``, factored; ranks and scales may differ."""
    found = {}
    for path, f in end.items():
        before = start[path]
        if f.rank == before.rank and f.alpha == before.alpha:
            found[path] = product_change(path, before, f)
            continue
        found[path] = _minus(as_product(f), as_product(before))
    return found


def gram(changes: Sequence[Summands]) -> Tensor:
    """``[K, K]`` float64: inner products of all pairs of changes. What a client has no change of is
    zero.

    Args:
        changes: one per client; a name is of one shape in all of them.
    """
    found = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for name in dict.fromkeys(name for x in changes for name in x):
        there = [k for k, x in enumerate(changes) if name in x]
        at = torch.tensor(there)
        found[at[:, None], at] += _gram([changes[k][name] for k in there])
    return found


def _gram(terms: Sequence[Summand]) -> Tensor:
    """Inner products ``[K, K]`` of one module's changes, by whichever way is cheaper."""
    m, n = terms[0].shape
    products = [x for x in terms if isinstance(x, Product)]
    inner = sum(x.b.shape[1] for x in products)
    rows = len(terms) * m * n * (inner / len(terms) + len(terms))
    if len(products) == len(terms) and inner**2 * (m + n) < rows:
        return _gram_of_products(products)
    return _gram_of_rows(terms, m, n)


def _gram_of_products(terms: Sequence[Product]) -> Tensor:
    """``<B_k A_k, B_j A_j> = Σ (B_kᵀ B_j) * (A_k A_jᵀ)``: sums of blocks of two Gram matrices."""
    b = torch.cat([x.b.double() for x in terms], dim=1)  # [m, R]
    a = torch.cat([x.a.double() for x in terms])  # [R, n]
    both = (b.T @ b) * (a @ a.T)  # [R, R]
    sizes = torch.tensor([x.b.shape[1] for x in terms])
    owner = torch.repeat_interleave(torch.arange(len(terms)), sizes)  # [R]
    by_row = torch.zeros(len(terms), both.shape[1], dtype=both.dtype).index_add_(0, owner, both)
    return torch.zeros(len(terms), len(terms), dtype=both.dtype).index_add_(1, owner, by_row)


def _gram_of_rows(terms: Sequence[Summand], m: int, n: int) -> Tensor:
    """The same from a few rows ``[K, rows · n]`` of the dense changes at a time."""
    found = torch.zeros(len(terms), len(terms), dtype=torch.float64)
    step = max(1, BLOCK // (len(terms) * n))
    for first in range(0, m, step):
        rows = slice(first, min(first + step, m))
        flat = torch.stack(
            [(x.b[rows] @ x.a if isinstance(x, Product) else x[rows]).reshape(-1) for x in terms]
        )
        found += (flat @ flat.T).double()
    return found


@dataclass(frozen=True)
class Drift:
    """How far the clients of a round moved, and in which directions."""

    norms: Sequence[float]
    """``||x_k||_F``."""
    cosines: Sequence[float]
    """``<x_k, x̄> / (||x_k|| ||x̄||)``; NaN where either is zero."""
    pairs: float
    """The mean cosine of two different clients; NaN if no two have moved."""
    diversity: float
    """``Σ_k p_k ||x_k||² / ||x̄||²``, at least 1 (gradient diversity, Yin et al.,
    arXiv:1706.05699, with weights); NaN if the mean is zero."""


def drift(inner: Tensor, p: Sequence[float]) -> Drift:
    """Norms and cosines from inner products.

    Args:
        inner: of `gram`.
        p: weights of the clients, which sum to 1.
    """
    weights = torch.tensor(p, dtype=torch.float64)
    squares = inner.diagonal().clamp_min(0)
    norms, along = squares.sqrt(), inner @ weights
    mean = float(weights @ along)
    length = math.sqrt(mean) if mean > 1e-24 * float(squares.max()) else 0.0
    cosines = (along / (norms * length)).clamp(-1, 1)
    moved = norms > 0
    unit = norms[moved]
    own = (inner[moved][:, moved] / (unit[:, None] * unit)).clamp(-1, 1)
    n = int(moved.sum())
    apart = float(own.sum() - own.diagonal().sum()) / (n * (n - 1)) if n > 1 else math.nan
    return Drift(
        norms.tolist(),
        torch.where(moved & (length > 0), cosines, math.nan).tolist(),
        apart,
        float(weights @ squares) / mean if length > 0 else math.nan,
    )


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard deviation of the finite ones of some values; None: there are none."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None
    mean = math.fsum(finite) / len(finite)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in finite) / len(finite))


def difference(one: Summands, other: Summands) -> dict[str, Summand]:
    """``x - y`` under the names of ``x``; products stay factored.

    Args:
        one: ``x``.
        other: ``y``, which has the names of ``x``.
    """
    found: dict[str, Summand] = {}
    for name, x in one.items():
        y = other[name]
        if isinstance(x, Product) and isinstance(y, Product):
            found[name] = _minus(x, y)
        else:
            found[name] = dense(x).double() - dense(y).double()
    return found


def _minus(x: Product, y: Product) -> Product:
    wide = torch.promote_types(x.b.dtype, y.b.dtype)
    b = torch.cat([x.b.to(wide), -y.b.to(wide)], dim=1)
    return Product(b, torch.cat([x.a.to(wide), y.a.to(wide)]))
