r"""What one client adds to the server's model: a sum's terms, their norm and their weighted sum.

A method whose next state depends on its clients only through ``Σ_k w_k x_k`` says what ``x_k`` is
(`fedlora.server.method.Method.adds`) and how the sum is taken in (``absorb``). A term maps names
to tensors or to products that stay factored:

    x = B A             B [m, j],  A [j, n]
    ||B A||²            <BᵀB, A Aᵀ>: Gram matrices [j, j] instead of [m, n]
    Σ_k w_k B_k A_k     [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]

All terms are *changes* of what the client started from, and their shapes are equal for all clients,
whatever their ranks: only the inner dimension ``j`` of a product may differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedlora.algebra.linalg import product_norm, weighted_sum
from fedlora.core.types import Factors


@dataclass(frozen=True)
class Product:
    """A matrix ``B A`` kept as its factors."""

    b: Tensor
    """``[m, j]``"""
    a: Tensor
    """``[j, n]``"""

    def __post_init__(self) -> None:
        if self.b.shape[1] != self.a.shape[0]:
            raise ValueError(
                f"B {tuple(self.b.shape)} and A {tuple(self.a.shape)} do not share an inner "
                "dimension: B must be [m, j] and A [j, n]"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def dense(self) -> Tensor:
        """``B A``, ``[m, n]``."""
        return self.b @ self.a


Summand: TypeAlias = Tensor | Product
Summands: TypeAlias = Mapping[str, Summand]
"""Name -> what is added under it. Names are the method's own, often those of its state."""


def dense(x: Summand) -> Tensor:
    """A summand as a tensor. Large for a product: build one module at a time."""
    return x.dense() if isinstance(x, Product) else x


def norm(summands: Summands) -> float:
    """The Euclidean norm of all elements under all names together, computed in float64."""
    return math.hypot(*(_norm(x) for x in summands.values()))


def _norm(x: Summand) -> float:
    if isinstance(x, Product):
        return product_norm(x.b.double(), x.a.double())
    return float(x.double().norm())


def scaled(summands: Summands, factor: float) -> dict[str, Summand]:
    """``factor · x``; of a product the left factor is multiplied."""
    return {
        name: Product(factor * x.b, x.a) if isinstance(x, Product) else factor * x
        for name, x in summands.items()
    }


def total(summands: Sequence[Summands], weights: Sequence[float]) -> dict[str, Summand]:
    """``Σ_k w_k x_k``, name by name; products are concatenated and stay factored.

    Args:
        summands: one per client, all with the same names and shapes.
        weights: one per client.

    Raises:
        ValueError: if there is no summand, or names or shapes differ.
    """
    if not summands:
        raise ValueError("there is nothing to sum: no client added anything")
    names = list(summands[0])
    for other in summands[1:]:
        if set(other) != set(names):
            odd = sorted(set(other) ^ set(names))
            raise ValueError(f"summands must have the same names; {odd[0]} is not in all of them")
    return {name: _total(name, [s[name] for s in summands], weights) for name in names}


def _total(name: str, terms: Sequence[Summand], weights: Sequence[float]) -> Summand:
    shapes = {tuple(x.shape) for x in terms}
    if len(shapes) != 1:
        raise ValueError(f"{name}: summands have different shapes: {sorted(shapes)}")
    products = [x for x in terms if isinstance(x, Product)]
    if not products:
        return weighted_sum([x for x in terms if isinstance(x, Tensor)], weights)
    if len(products) != len(terms):
        raise ValueError(f"{name}: some summands are products and some are tensors")
    b = torch.cat([w * x.b for w, x in zip(weights, products, strict=True)], dim=1)
    return Product(b, torch.cat([x.a for x in products]))


def factor_changes(path: str, start: Factors, end: Factors) -> dict[str, Tensor]:
    """``<path>/a: A - A⁰`` and ``<path>/b: B - B⁰``, each factor by itself.

    Raises:
        ValueError: if the ranks differ.
    """
    if end.a.shape != start.a.shape:
        raise ValueError(f"{path}: a client sent rank {end.rank}, it started at {start.rank}")
    return {f"{path}/a": end.a - start.a, f"{path}/b": end.b - start.b}


def product_change(path: str, start: Factors, end: Factors) -> Product:
    """``s (B A - B⁰ A⁰) = s [B - B⁰, B⁰] [A; A - A⁰]`` with ``s = alpha / r``.

    In this form, whose differences are taken before any product, factors that did not move add
    exactly zero, and a small change is not lost in the rounding of two large products.

    Raises:
        ValueError: if the ranks differ.
    """
    moved = factor_changes(path, start, end)
    wide = torch.promote_types(moved[f"{path}/a"].dtype, torch.float32)
    da, db = moved[f"{path}/a"].to(wide), moved[f"{path}/b"].to(wide)
    b = torch.cat([db, start.b.to(wide)], dim=1)  # [m, 2r]
    a = torch.cat([end.a.to(wide), da])  # [2r, n]
    return Product(end.scale * b, a)
