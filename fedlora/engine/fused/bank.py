"""Adapters of many clients as rows of one matrix, and each module's factors as views of it.

A row holds ``[A of every module | B^T of every module | head]`` of one client, exactly as large as
its ranks require: there is no padding, so no padded entry is trained. ``B`` is stored transposed,
which keeps the small rank on the fast side of the matrix products
(`fedlora.engine.fused.kernels`). The head is that of a classifier, if clients train one.

The examples in this module put two clients into one bank: adapters of rank 2 and rank 1 on a layer
``w`` with ``d_in = 3`` and ``d_out = 2``, beside a layer ``v`` that has no adapter.

>>> modules = [Module("v", "mlp", d_out=2, d_in=3), Module("w", "mlp", d_out=2, d_in=3)]
>>> def adapter(rank):
...     a = torch.arange(1.0, 1 + rank * 3).view(rank, 3)
...     b = 10 * torch.arange(1.0, 1 + rank * 2).view(2, rank)
...     return {"w": Factors(a, b, alpha=4.0)}
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedlora.core.choice import Indices
from fedlora.core.types import (
    Adapter,
    Factors,
    Module,
)


class Views(NamedTuple):
    """One module's factors and gradients in consecutive rows.

    ``[r, d]`` for one row, ``[rows, r, d]`` for several.
    """

    a: Tensor
    bt: Tensor
    grad_a: Tensor
    grad_bt: Tensor


@dataclass(frozen=True)
class Part:
    """Where one module's factors lie in a row, and their scale."""

    rank: int
    d_in: int
    d_out: int
    a: int
    """Offset of ``A [rank, d_in]``."""
    bt: int
    """Offset of ``B^T [rank, d_out]``."""
    alpha: float

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each module's factors lie in a row, for one pattern of ranks and scales. `Layouts`
    makes one layout per pattern, so that two clients' layouts can be compared by identity.

    >>> layout = Layout.of(adapter(2), modules)
    >>> layout.a_size, layout.size  # 2 * 3 scalars of A, then 2 * 2 of B^T
    (6, 10)
    >>> layout.parts
    (None, Part(rank=2, d_in=3, d_out=2, a=0, bt=6, alpha=4.0))
    >>> layout.pack(adapter(2), torch.float32, torch.device("cpu")).tolist()
    [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 30.0, 20.0, 40.0]
    """

    paths: tuple[str, ...]
    """Module paths of the model, in order."""
    parts: tuple[Part | None, ...]
    """The part of every module of the model, in order; None if the adapter has no factors there."""
    a_size: int
    """Scalars in all A: the row's first section."""
    size: int
    """Scalars in a row."""
    head: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> shape of the head's parameters, the row's last section; empty: there is none."""

    @staticmethod
    def of(
        adapter: Adapter, modules: Sequence[Module], head: Mapping[str, Tensor] | None = None
    ) -> "Layout":
        """The layout of an adapter that fits the modules (`models.modules.check_adapter`), and a
        head."""
        # The sections of A and of B^T are filled side by side, module after module.
        held = [(m, adapter.get(m.path)) for m in modules]
        a_size = sum(f.rank * m.d_in for m, f in held if f is not None)
        parts: list[Part | None] = []
        at_a, at_b = 0, a_size
        for m, f in held:
            if f is None:
                parts.append(None)
                continue
            parts.append(Part(f.rank, m.d_in, m.d_out, at_a, at_b, f.alpha))
            at_a += f.rank * m.d_in
            at_b += f.rank * m.d_out
        shapes = {name: tuple(t.shape) for name, t in (head or {}).items()}
        size = at_b + sum(map(math.prod, shapes.values()))
        return Layout(tuple(m.path for m in modules), tuple(parts), a_size, size, shapes)

    def trained(self, train_a: bool, train_b: bool) -> list[slice]:
        """The sections of a row that are trained, each as long as possible; the head always is.

        >>> Layout.of(adapter(2), modules, {"bias": torch.zeros(5)}).trained(True, False)
        [slice(0, 6, None), slice(10, 15, None)]
        """
        sections = [
            (0, self.a_size, train_a),
            (self.a_size, self.head_at, train_b),
            (self.head_at, self.size, True),
        ]
        found: list[slice] = []
        for start, stop, wanted in sections:
            if wanted and start < stop:
                if found and found[-1].stop == start:
                    start = found.pop().start
                found.append(slice(start, stop))
        return found

    def mask(self, indices: Indices, device: torch.device) -> Tensor:
        """``[size]`` bool: the scalars of a row that belong to these rank indices, and the head.

        >>> layout = Layout.of(adapter(2), modules)
        >>> layout.mask({"w": (1,)}, torch.device("cpu")).int().tolist()
        [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
        """
        found = torch.zeros(self.size, dtype=torch.bool, device=device)
        for path, pair in self.factors(found).items():
            at = torch.tensor(indices[path], dtype=torch.int64, device=device)
            for factor in pair:  # [r, d]
                factor.index_fill_(0, at, True)
        found[self.head_at :] = True
        return found

    @property
    def head_at(self) -> int:
        """Where the head begins in a row; its size, if there is none."""
        return self.size - sum(map(math.prod, self.head.values()))

    def factors(self, row: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Views ``(A [r, d_in], B^T [r, d_out])`` of a row ``[size]``, by module path."""
        return {
            path: (
                row[p.a : p.a + p.rank * p.d_in].view(p.rank, p.d_in),
                row[p.bt : p.bt + p.rank * p.d_out].view(p.rank, p.d_out),
            )
            for path, p in zip(self.paths, self.parts, strict=True)
            if p is not None
        }

    def heads(self, row: Tensor) -> dict[str, Tensor]:
        """Views of the head's parameters in a row ``[size]``, by name."""
        sizes = [math.prod(shape) for shape in self.head.values()]
        stops = list(itertools.accumulate(sizes, initial=self.head_at))
        pairs = zip(self.head.items(), itertools.pairwise(stops), strict=True)
        return {name: row[start:stop].view(shape) for (name, shape), (start, stop) in pairs}

    def pack(
        self,
        adapter: Adapter,
        dtype: torch.dtype,
        device: torch.device,
        head: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """An adapter and a head as a new row ``[size]``."""
        row = torch.empty(self.size, dtype=dtype, device=device)
        for path, (a, bt) in self.factors(row).items():
            a.copy_(adapter[path].a)
            bt.copy_(adapter[path].b.t())
        for name, value in self.heads(row).items():
            value.copy_((head or {})[name])
        return row

    def read(self, row: Tensor) -> dict[str, Factors]:
        """The adapter in a row ``[size]``; its factors are views of a copy of the row."""
        alphas = {
            path: p.alpha for path, p in zip(self.paths, self.parts, strict=True) if p is not None
        }
        return {
            path: Factors(a, bt.t(), alphas[path])
            for path, (a, bt) in self.factors(row.clone()).items()
        }


class Layouts:
    """The layouts of a model's adapters, one per pattern of ranks and scales."""

    def __init__(self, modules: Sequence[Module]) -> None:
        self._modules = modules
        self._known: dict[tuple[object, ...], Layout] = {}

    def __call__(self, adapter: Adapter, head: Mapping[str, Tensor] | None = None) -> Layout:
        """The layout of an adapter and a head that fit the model (`models.modules.check_adapter`,
        `check_head`)."""
        held = [adapter.get(m.path) for m in self._modules]
        ranks = tuple(None if f is None else (f.rank, f.alpha) for f in held)
        key = (ranks, tuple(head or ()))
        if key not in self._known:
            self._known[key] = Layout.of(adapter, self._modules, head)
        return self._known[key]


class AdapterBank:
    """Parameters and gradients ``[slots, width]`` of the clients in training.

    Args:
        slots: how many clients at once.
        width: of the largest row that will be loaded.
        dtype: of parameters and gradients.
        device: where they live.
        compute: the type that forward passes compute in; if another, they see a copy (`refresh`).

    >>> layout, other = Layout.of(adapter(2), modules), Layout.of(adapter(1), modules)
    >>> bank = AdapterBank(2, layout.size, torch.float32, torch.device("cpu"))
    >>> for slot, (l, rank) in enumerate([(layout, 2), (other, 1)]):
    ...     _ = bank.load(slot, l.pack(adapter(rank), torch.float32, torch.device("cpu")))
    >>> bank.params.int().tolist()
    [[1, 2, 3, 4, 5, 6, 10, 30, 20, 40], [1, 2, 3, 10, 20, 0, 0, 0, 0, 0]]
    >>> [None if v is None else v.a.tolist() for v in bank.views(1, 1, other)]
    [None, [[1.0, 2.0, 3.0]]]
    """

    _KEPT = 1024  # lists of views, of which a round on s slots needs a few s

    def __init__(
        self,
        slots: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        compute: torch.dtype | None = None,
    ) -> None:
        self.params = torch.zeros(slots, width, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.params)
        self._seen = self.params if compute in (None, dtype) else self.params.to(compute)
        self._views: dict[tuple[int, int, Layout], list[Views | None]] = {}

    def refresh(self) -> None:
        """Copy the present parameters to what forward passes read, if that is another type."""
        if self._seen is not self.params:
            self._seen.copy_(self.params)

    def load(self, slot: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """Copy a packed adapter into a slot and clear its gradient.

        Returns:
            The row of parameters and the row of gradients, shaped like ``start``, as views.

        Raises:
            ValueError: if the adapter is larger than the bank's rows, or the slot does not exist.
        """
        slots, width = self.params.shape
        if not 0 <= slot < slots:
            raise ValueError(f"slot {slot} is not in 0..{slots - 1}")
        if len(start) > width:
            raise ValueError(
                f"an adapter of {len(start):,} scalars does not fit a bank whose rows hold "
                f"{width:,}: its ranks are larger than those the bank was made for"
            )
        row, grad = self.params[slot, : len(start)], self.grads[slot, : len(start)]
        row.copy_(start)
        grad.zero_()
        return row, grad

    def head(self, slot: int, layout: Layout) -> dict[str, Tensor]:
        """The head in a slot, by name: parameters whose gradients are those of the bank."""
        values, grads = (layout.heads(m[slot, : layout.size]) for m in (self.params, self.grads))
        found: dict[str, Tensor] = {}
        for (name, value), grad in zip(values.items(), grads.values(), strict=True):
            found[name] = parameter = nn.Parameter(value)
            parameter.grad = grad
        return found

    def views(self, slot: int, rows: int, layout: Layout) -> list[Views | None]:
        """Every module's factors in ``rows`` consecutive slots of one layout, in module order; None
        where the layout has none."""
        key = (slot, rows, layout)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= self._KEPT:
                self._views.clear()
            found = [None if p is None else self._part(slot, rows, p) for p in layout.parts]
            self._views[key] = found
        return found

    def _part(self, slot: int, rows: int, part: Part) -> Views:
        width = self.params.shape[1]

        def view(source: Tensor, offset: int, d: int) -> Tensor:
            # From one client's factor to the next it is a whole row of the bank, width scalars.
            shape, stride = [rows, part.rank, d], [width, d, 1]
            first = 1 if rows == 1 else 0
            return source.as_strided(shape[first:], stride[first:], slot * width + offset)

        return Views(
            view(self._seen, part.a, part.d_in),
            view(self._seen, part.bt, part.d_out),
            view(self.grads, part.a, part.d_in),
            view(self.grads, part.bt, part.d_out),
        )
