r"""Robust means element by element: the median, and the mean without the extremes.

    median    of the values that clients have for an element
    trimmed   their mean without the f smallest and the f largest

Yin et al., ICML 2018, arXiv:1803.01498. Clients of a small rank have no value at all for the rank
indices that only others own: with their padding counted, the median of an index that less than half
of the clients own would be zero, whatever these send. So each element is taken over its owners
alone, and needs ``2 f + 1`` of them; with fewer it is the mean of all clients after norm bounding
(`fedlora.robust.bound`), in which the others count as zero.

Both depend on the coordinates. Of products the elements of ``B A`` are taken, which do not change
with ``(B G, G⁻¹ A)``: row block by row block, so that no dense matrix of all clients is in memory.
Of factors they are those of ``A`` and ``B``, which do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.algebra.summand import Product, Summand
from fedlora.robust.bound import bounding
from fedlora.robust.geometry import blocks
from fedlora.robust.rule import Centre, Term, Withstands


@dataclass(frozen=True)
class _Elementwise(Withstands):
    def window(self, owners: Tensor, f: int) -> tuple[Tensor, Tensor]:
        """The sorted values that are averaged, from the first to before the second.

        Args:
            owners: how many values there are, ``[d]``; at least ``2 f + 1``.
            f: of them that may be attackers'.
        """
        raise NotImplementedError

    def centre(self, terms: Sequence[Term]) -> Centre:
        k, f = len(terms), self.f(len(terms))
        bounded = torch.tensor(bounding(terms), dtype=torch.float64) / k
        value, influence = dict[str, Summand](), torch.zeros(k, dtype=torch.float64)
        elements = 0
        for name, x in terms[0].summands.items():
            parts = []
            for values, owned in _blocks(name, terms):
                part, used = self._block(values, owned, f, bounded.to(values.dtype))
                parts.append(part)
                influence += used
                elements += part.numel()
            value[name] = torch.cat(parts).reshape(x.shape) if parts else _empty(x)
        return Centre(value, (influence / max(1, elements)).tolist())

    def _block(
        self, values: Tensor, owned: Tensor | None, f: int, bounded: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A block of elements ``[d]``, and how much of it is each client's, ``[K]``.

        Args:
            values: ``[K, d]``.
            owned: which of them clients have, ``[K, d]``; None: all.
            f: see `window`.
            bounded: coefficients of the mean that takes the place of what has too few owners.
        """
        k, d = values.shape
        if owned is None:
            owners = torch.full((d,), k)
        else:
            owners = owned.sum(dim=0)
            values = values.masked_fill(~owned, torch.inf)  # sorted behind all that are owned
        ordered, whose = values.sort(dim=0, stable=True)
        first, end = self.window(owners, f)
        at = torch.arange(k)[:, None]
        weight = ((at >= first) & (at < end)).to(values.dtype)
        weight = weight / weight.sum(dim=0).clamp(min=1)
        part = torch.where(weight > 0, ordered * weight, 0).sum(dim=0)
        few = owners < 2 * f + 1
        if bool(few.any()):
            weight[:, few] = 0
            mean = bounded @ torch.where(torch.isinf(values[:, few]), 0, values[:, few])
            part[few] = mean.to(part.dtype)
        used = torch.zeros(k, dtype=torch.float64)
        used.index_add_(0, whose.reshape(-1), weight.double().reshape(-1))
        return part, used + int(few.sum()) * (bounded / bounded.sum()).double()


@dataclass(frozen=True)
class Median(_Elementwise):
    """The median of each element; of an even number of owners the mean of the middle two."""

    def window(self, owners: Tensor, f: int) -> tuple[Tensor, Tensor]:
        return (owners - 1) // 2, owners // 2 + 1


@dataclass(frozen=True)
class Trimmed(_Elementwise):
    """The mean of each element without the ``f`` smallest and the ``f`` largest values."""

    def window(self, owners: Tensor, f: int) -> tuple[Tensor, Tensor]:
        return torch.full_like(owners, f), owners - f


def _blocks(name: str, terms: Sequence[Term]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The elements of one name as ``[K, d]``, and which of them are owned, block by block."""
    xs = [t.summands[name] for t in terms]
    products = [x for x in xs if isinstance(x, Product)]
    if len(products) == len(xs):
        m, n = products[0].shape
        for rows in blocks(m, len(xs), n):
            yield torch.stack([_wide(x.b[rows] @ x.a).reshape(-1) for x in products]), None
        return
    if products:
        raise ValueError(f"{name}: some summands are products and some are tensors")
    flat = [x.reshape(-1) for x in xs if isinstance(x, Tensor)]
    masks = [t.owned.get(name) for t in terms]
    for columns in blocks(flat[0].numel(), len(xs)):
        values = torch.stack([_wide(x[columns]) for x in flat])
        if all(mask is None for mask in masks):
            yield values, None
            continue
        whole = torch.ones(values.shape[1], dtype=torch.bool)
        yield values, torch.stack([whole if o is None else o.reshape(-1)[columns] for o in masks])


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _empty(x: Summand) -> Tensor:
    return torch.zeros(x.shape)
