r"""Sums of products of low rank by linear sketches, whose size does not depend on clients' ranks.

``W = Σ_k w_k B_k A_k`` with ``B_k [m, j_k]``, ``A_k [j_k, n]`` has ``mn`` numbers, its sketches
``l (m + n)`` or so. They are linear in each product, so their sums can be masked:

    one    Y = Σ w_k B_k (A_k Ω)  [m, l],  Z = Σ w_k (Ψ B_k) A_k  [l', n];   Ŵ = Q (ΨQ)⁺ Z
    two    Y alone; the server sends Q = qr(Y);  X = Σ w_k (Qᵀ B_k) A_k  [l, n];   Ŵ = Q X

``Ω [n, l]`` has orthonormal columns and ``Ψ [l', m]``, ``l' = min(m, 2l + 1)``, orthonormal rows,
from a public seed, so no sketch is longer than its product. ``Ŵ = W`` if ``rank(W) <= l``. One
pass: Tropp et al., "Practical Sketching Algorithms for Low-Rank Matrix Approximation",
arXiv:1609.00048; two passes as in FedASK, arXiv:2507.09990. The change alone is sketched: the
server's ``W`` is public.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.algebra.summand import Product, Summand, Summands, dense
from fedlora.core.seeding import torch_generator
from fedlora.secagg.config import NONE, ONE, TWO, SecAgg

Y, Z, X = "|y", "|z", "|x"
"""Ends of the names under which a product's sketches are summed."""


@dataclass(frozen=True)
class Sketch:
    """The sketches of one round's products.

    Tensors that are no products are summed as they are, in the last exchange.
    """

    kind: str
    """``none``, ``one`` or ``two``."""
    seed: int
    """The run's; public."""
    round: int
    """Counted from 1."""
    widths: Mapping[str, int]
    """Name of a product -> ``l``."""

    @property
    def exchanges(self) -> int:
        """Secure sums of the round."""
        return 2 if self.kind == TWO and self.widths else 1

    def tensors(
        self, summands: Summands, exchange: int = 0, bases: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What a client adds in an exchange.

        Args:
            summands: its change.
            exchange: 0, or 1 for the second of two.
            bases: of the second exchange (`bases`).
        """
        return self._first(summands) if exchange == 0 else self._second(summands, bases or {})

    def _first(self, summands: Summands) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, x in summands.items():
            if self.kind == NONE or not isinstance(x, Product):
                if self.exchanges == 1:
                    found[name] = dense(x)
                continue
            b, a = x.b.double(), x.a.double()
            found[f"{name}{Y}"] = b @ (a @ self._omega(name, x.shape[1]))
            if self.kind == ONE:
                found[f"{name}{Z}"] = (self._psi(name, x.shape[0]) @ b) @ a
        return found

    def bases(self, total: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``Q [m, l]`` by name, between the two exchanges.

        Args:
            total: of the first exchange.
        """
        named = {n.removesuffix(Y): t for n, t in total.items() if n.endswith(Y)}
        return {name: torch.linalg.qr(t.double()).Q for name, t in named.items()}

    def _second(self, summands: Summands, bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, x in summands.items():
            if isinstance(x, Product):
                found[f"{name}{X}"] = (bases[name].T @ x.b.double()) @ x.a.double()
            else:
                found[name] = x
        return found

    def summed(self, total: Mapping[str, Tensor], template: Summands) -> dict[str, Summand]:
        """The sum of summands from the sums of their sketches.

        Args:
            total: of all exchanges; with two, the bases are those of its ``Y``.
            template: a summand of the round, for names and types.
        """
        found: dict[str, Summand] = {}
        bases = self.bases(total)
        for name, x in template.items():
            if name not in bases:
                dtype = x.a.dtype if isinstance(x, Product) else x.dtype
                found[name] = total[name].to(dtype)
                continue
            assert isinstance(x, Product)
            q = bases[name]
            if self.kind == TWO:
                a = total[f"{name}{X}"].double()
            else:
                psi = self._psi(name, x.shape[0])
                a = torch.linalg.lstsq(psi @ q, total[f"{name}{Z}"].double()).solution
            found[name] = Product(q.to(x.b.dtype), a.to(x.a.dtype))
        return found

    def _omega(self, name: str, n: int) -> Tensor:
        return self._orthonormal(name, "omega", n, self.widths[name])

    def _psi(self, name: str, m: int) -> Tensor:
        return self._orthonormal(name, "psi", m, min(m, 2 * self.widths[name] + 1)).T

    def _orthonormal(self, name: str, which: str, rows: int, columns: int) -> Tensor:
        """``[rows, columns]``, float64, ``columns <= rows``."""
        keys = (self.round, zlib.crc32(name.encode()))
        g = torch_generator(self.seed, f"secagg {which}", *keys)
        q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64)).Q
        return q


def sketch_of(
    config: SecAgg, template: Summands, ranks: Mapping[str, int], seed: int, round: int
) -> Sketch:
    """The sketches of a round.

    Args:
        config: kind and width.
        template: a summand of the round.
        ranks: largest rank of any client, by module path; a product of another name has the
            largest of them.
        seed: of the run.
        round: counted from 1.
    """
    most = max(ranks.values(), default=1)
    widths = {
        name: min(math.ceil(config.width * ranks.get(name, most)), *x.shape)
        for name, x in template.items()
        if isinstance(x, Product)
    }
    return Sketch(config.sketch, seed, round, widths)
