r"""Changes of adapters in few bytes: what a client sends, or is sent, as one array of bytes.

    fp32     as they are
    fp16     float16, one power of two a row
    bf16     bfloat16
    int8     codes of a byte, a scale for every ``group`` of a row
    int4     codes of half a byte, the same
    sparse   the largest ``density`` of each tensor as float16, with positions

Rows are rank directions: those of ``A [r, n]`` and of ``Bᵀ [r, m]``, so that a scale belongs to one
direction. A tensor all of whose elements are zero, as a factor that is frozen, takes one bit. The
length of the array is what is counted as traffic: nothing travels beside it but names and shapes,
which both ends have.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedlora.core.checks import at_least, one_of
from fedlora.wire import sparse
from fedlora.wire.change import Named
from fedlora.wire.rows import Wire
from fedlora.wire.sparse import Bytes, Cursor

NONE, SPARSE = "none", "sparse"
KINDS = (NONE, "fp32", "fp16", "bf16", "int8", "int4", SPARSE)
Shapes: TypeAlias = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Format:
    """The format of changes in one direction."""

    kind: str = NONE
    """``none``: values in `Rounds.wire`, as ever; ``fp32``, ``fp16``, ``bf16``, ``int8``, ``int4``
    or ``sparse``."""
    group: int = 64
    """``int8`` and ``int4``: neighbouring elements of a row that share a scale (float32); 0: the
    whole row."""
    stochastic: bool = True
    """``int8`` and ``int4``: round up or down at random, without bias; false: to the nearest."""
    density: float = 0.1
    """``sparse``: the fraction of each tensor's elements that is sent, the largest."""

    def __post_init__(self) -> None:
        one_of("compression.kind", self.kind, KINDS)
        at_least("compression.group", self.group, 0)
        if not 0 < self.density <= 1:
            raise ValueError(f"compression.density={self.density} must lie in (0, 1]")

    @property
    def acts(self) -> bool:
        """Whether changes travel in place of values."""
        return self.kind != NONE

    def encode(self, tensors: Named, generator: torch.Generator) -> Bytes:
        """Tensors as bytes.

        Args:
            tensors: floats, on the CPU; computed in float32.
            generator: of random rounding.

        Raises:
            ValueError: for elements that the format cannot represent, such as NaN.
        """
        there = [bool(t.any()) for t in tensors.values()]  # NaN is true
        parts: list[Bytes] = [np.packbits(np.array(there, dtype=np.uint8))]
        for t, moved in zip(tensors.values(), there, strict=True):
            if moved:
                parts += self._encode(t.detach().to(torch.float32), generator)
        return np.concatenate(parts)

    def decode(self, data: Bytes, shapes: Shapes) -> dict[str, Tensor]:
        """The inverse of `encode`: fresh float32 tensors.

        Args:
            data: as received.
            shapes: by name, in the order in which they were encoded.

        Raises:
            ValueError: if it is no array of bytes, or not of the due length, or its elements are
                none that the format has.
        """
        if data.dtype != np.uint8 or data.ndim != 1:
            raise ValueError(f"it is an array of {data.dtype} {list(data.shape)}, bytes are due")
        flags, cursor = Cursor(data).take((len(shapes) + 7) // 8)
        there = np.unpackbits(flags)[: len(shapes)]
        found = {}
        for (name, shape), moved in zip(shapes.items(), there, strict=True):
            found[name] = torch.zeros(tuple(shape))
            if moved:
                found[name], cursor = self._decode(cursor, tuple(shape))
        if cursor.at != len(data):
            raise ValueError(f"it has {len(data)} bytes, {cursor.at} are due")
        return found

    def _encode(self, t: Tensor, generator: torch.Generator) -> list[Bytes]:
        if self.kind == SPARSE:
            flat = t.reshape(-1)
            return sparse.encode(flat, sparse.kept(flat.numel(), self.density))
        rows = _rows(t)
        parts = self._wire.encode(rows, generator)
        names = _layout(self._wire, *rows.shape)
        return [np.ascontiguousarray(parts[n]).view(np.uint8).reshape(-1) for n in names]

    def _decode(self, cursor: Cursor, shape: tuple[int, ...]) -> tuple[Tensor, Cursor]:
        if self.kind == SPARSE:
            size = math.prod(shape)
            flat, cursor = sparse.decode(cursor, size, sparse.kept(size, self.density))
            return flat.reshape(shape), cursor
        rows, turned = _row_shape(shape)
        parts = {}
        for name, (dtype, sizes) in _layout(self._wire, *rows).items():
            data, cursor = cursor.take(np.dtype(dtype).itemsize * math.prod(sizes))
            parts[name] = data.copy().view(dtype).reshape(sizes)
        if self.kind == "int4":
            parts["width"] = np.array([rows[1]], np.uint32)
        x = self._wire.decode(parts, rows)
        return (x.T.contiguous() if turned else x).reshape(shape), cursor

    @property
    def _wire(self) -> Wire:
        codes = self.kind in ("int8", "int4")
        return Wire(self.kind, group=self.group, stochastic=codes and self.stochastic)


@dataclass(frozen=True)
class Compression:
    """What travels in few bytes, in either direction."""

    up: Format = Format()
    """Format of clients' replies: their changes of what they were sent."""
    down: Format = Format()
    """Format of what clients are sent: its change of what they were sent last, or itself where they
    hold nothing of that shape."""
    error_feedback: bool = False
    """Whether what rounding withholds of a client's reply is stored, and added to its next one."""

    def __post_init__(self) -> None:
        if self.error_feedback and not self.up.acts:
            raise ValueError(
                "compression.error_feedback=true with compression.up.kind=none: nothing is "
                "rounded off that could be kept; use another kind, or error_feedback=false"
            )
        if self.down.acts and not self.up.acts:
            raise ValueError(
                f"compression.down.kind={self.down.kind} with compression.up.kind=none: values "
                "that clients send would hold the rounding of what they were sent; use "
                "compression.up.kind=fp32, or another one"
            )

    @property
    def acts(self) -> bool:
        """Whether changes travel in place of values, in either direction."""
        return self.up.acts or self.down.acts


NO_FORMAT = Format()
NO_COMPRESSION = Compression()


@lru_cache(maxsize=256)
def _layout(wire: Wire, rows: int, size: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """`Wire.layout`, remembered: an adapter has a few shapes."""
    return wire.layout(rows, size)


def _row_shape(shape: tuple[int, ...]) -> tuple[tuple[int, int], bool]:
    """Rows and their length, and whether the tensor is turned for it: along its longer side."""
    if len(shape) != 2:
        return (1, math.prod(shape)), False
    turned = shape[0] > shape[1]
    return ((shape[1], shape[0]) if turned else (shape[0], shape[1])), turned


def _rows(t: Tensor) -> Tensor:
    shape, turned = _row_shape(tuple(t.shape))
    return t.T.contiguous() if turned else t.reshape(shape)
