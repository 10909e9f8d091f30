r"""Inner products and distances of summands, without a dense matrix where they are products.

    <B_i A_i, B_j A_j> = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ)        [r_i, r_j] instead of [m, n]

For K clients of rank r that takes ``K² r² (m + n)`` multiplications instead of ``K² m n``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.algebra.summand import Product, Summand, Summands, dense

BLOCK_BYTES = 64 * 2**20
"""Bytes of a block of dense elements of all clients together."""


def gram(terms: Sequence[Summands]) -> Tensor:
    """``<x_i, x_j>`` over all names together, ``[K, K]`` float64."""
    found = torch.zeros(len(terms), len(terms), dtype=torch.float64)
    for name in terms[0]:
        found += _gram([t[name] for t in terms])
    return found


def squared_distances(inner: Tensor) -> Tensor:
    """``||x_i - x_j||²`` from `gram`, ``[K, K]``."""
    lengths = inner.diagonal()
    return (lengths[:, None] + lengths[None, :] - 2 * inner).clamp(min=0)


def _gram(xs: Sequence[Summand]) -> Tensor:
    products = [x for x in xs if isinstance(x, Product)]
    if len(products) == len(xs):
        return _gram_of_products(products)
    flat = [dense(x).reshape(-1) for x in xs]
    found = torch.zeros(len(xs), len(xs), dtype=torch.float64)
    for columns in blocks(flat[0].numel(), len(xs)):
        part = torch.stack([x[columns].double() for x in flat])  # [K, columns]
        found += part @ part.T
    return found


def _gram_of_products(xs: Sequence[Product]) -> Tensor:
    sizes = [x.b.shape[1] for x in xs]
    bs = torch.cat([x.b.double() for x in xs], dim=1)  # [m, Σ j]
    rows = torch.cat([x.a.double() for x in xs])  # [Σ j, n]
    found = torch.zeros(len(xs), len(xs), dtype=torch.float64)
    for i, x in enumerate(xs):
        both = (x.b.double().T @ bs) * (x.a.double() @ rows.T)  # [j_i, Σ j]
        found[i] = torch.stack([part.sum() for part in both.split(sizes, dim=1)])
    return (found + found.T) / 2  # symmetric to the last bit


def blocks(columns: int, clients: int, width: int = 1) -> list[slice]:
    """Slices of ``columns`` rows or elements, so that a float64 block of all clients stays within
    `BLOCK_BYTES`.

    Args:
        columns: how many there are.
        clients: held at once.
        width: elements of each.
    """
    step = max(1, BLOCK_BYTES // (8 * clients * width))
    return [slice(at, min(at + step, columns)) for at in range(0, columns, step)]
