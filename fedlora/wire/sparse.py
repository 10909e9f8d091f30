r"""The largest elements of a tensor, and their positions in the fewest bytes.

    positions   u16 or u32 each     2 or 4 bytes a position
                bitmap              D / 8 bytes
                Golomb-Rice         gaps to the next position: quotient by 2^p in unary, p bits

Whichever is shortest is sent; the first byte says which. Values are float16 under one power of two.
FLASC (arXiv:2406.05233) sends the same elements; Rice, JPL technical report 79-22 (1979).
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.wire.rows import Wire

Bytes: TypeAlias = NDArray[np.uint8]
HALF = Wire("fp16")
U16, U32, BITMAP, RICE = 0, 1, 2, 3


@dataclass(frozen=True)
class Cursor:
    """What is left of received bytes."""

    data: Bytes
    at: int = 0

    def take(self, count: int) -> tuple[Bytes, "Cursor"]:
        """The next bytes, and what is left then.

        Raises:
            ValueError: if there are not so many.
        """
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, at least {end} are due")
        return self.data[self.at : end], Cursor(self.data, end)


def kept(size: int, density: float) -> int:
    """How many elements of a tensor are sent: ``⌊δ D⌋``, at least one."""
    return max(1, min(size, math.floor(density * size + 1e-9)))


def encode(x: Tensor, count: int) -> list[Bytes]:
    """The ``count`` largest of the elements ``x [D]`` (float32) and their positions."""
    at = x.abs().topk(count).indices.sort().values
    half = HALF.encode(x[at].reshape(1, -1))
    values = [
        half["exponents"].view(np.uint8).reshape(-1),
        half["values"].view(np.uint8).reshape(-1),
    ]
    return [*_positions(at.numpy(), x.numel()), *values]


def decode(cursor: Cursor, size: int, count: int) -> tuple[Tensor, Cursor]:
    """The inverse of `encode`: ``[size]`` float32, zero elsewhere, and what is left.

    Raises:
        ValueError: if the bytes are too few, positions are out of range or repeated, or a value is
            not finite.
    """
    at, cursor = _read_positions(cursor, size, count)
    exponent, cursor = cursor.take(1)
    values, cursor = cursor.take(2 * count)
    found = HALF.decode(
        {
            "exponents": exponent.view(np.int8),
            "values": values.copy().view(np.float16).reshape(1, -1),
        }
    )
    x = torch.zeros(size)
    x[torch.from_numpy(at)] = found[0]
    return x, cursor


def _positions(at: NDArray[np.int64], size: int) -> list[Bytes]:
    """Ascending positions in the fewest bytes, behind one that says how."""
    plain, code = (np.uint16, U16) if size <= 2**16 else (np.uint32, U32)
    gaps = np.diff(at, prepend=-1) - 1
    p = _parameter(gaps)
    rice = (int((gaps >> p).sum()) + len(gaps) + 7) // 8 + (p * len(gaps) + 7) // 8 + 1
    costs = {code: len(at) * np.dtype(plain).itemsize, BITMAP: (size + 7) // 8, RICE: rice}
    best = min(costs, key=lambda kind: (costs[kind], kind))
    first = np.array([best], np.uint8)
    if best == BITMAP:
        bits = np.zeros(size, np.uint8)
        bits[at] = 1
        return [first, np.packbits(bits)]
    if best == RICE:
        return [first, np.array([p], np.uint8), *_rice(gaps, p)]
    return [first, at.astype(plain).view(np.uint8)]


def _read_positions(cursor: Cursor, size: int, count: int) -> tuple[NDArray[np.int64], Cursor]:
    first, cursor = cursor.take(1)
    kind = int(first[0])
    if kind in (U16, U32):
        plain: Any = np.uint16 if kind == U16 else np.uint32
        data, cursor = cursor.take(count * np.dtype(plain).itemsize)
        at = data.copy().view(plain).astype(np.int64)
    elif kind == BITMAP:
        data, cursor = cursor.take((size + 7) // 8)
        at = np.flatnonzero(np.unpackbits(data)).astype(np.int64)
    elif kind == RICE:
        at, cursor = _read_rice(cursor, count)
    else:
        raise ValueError(f"positions are coded as {kind}, which is no code")
    if len(at) != count or (np.diff(at) <= 0).any() or at[-1] >= size:
        raise ValueError(f"its positions are not {count} ascending ones below {size}")
    return at, cursor


def _parameter(gaps: NDArray[np.int64]) -> int:
    """``p`` with the fewest bits, near ``log2`` of the mean gap."""
    near = int(math.log2(max(1.0, float(gaps.mean()))))
    return min(
        range(max(0, near - 1), near + 2), key=lambda p: int((gaps >> p).sum()) + p * len(gaps)
    )


def _rice(gaps: NDArray[np.int64], p: int) -> list[Bytes]:
    """All quotients in unary, then all remainders, each part to a whole byte."""
    quotients = gaps >> p
    ends = np.cumsum(quotients + 1) - 1
    unary = np.ones(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 0
    bits = (gaps[:, None] >> np.arange(p - 1, -1, -1)) & 1  # [count, p]
    return [np.packbits(unary), np.packbits(bits.astype(np.uint8).reshape(-1))]


def _read_rice(cursor: Cursor, count: int) -> tuple[NDArray[np.int64], Cursor]:
    first, cursor = cursor.take(1)
    p = int(first[0])
    if p > 31:
        raise ValueError(f"gaps have {p} bits, at most 31 are possible")
    rest, _ = cursor.take(len(cursor.data) - cursor.at)
    ends = np.flatnonzero(np.unpackbits(rest) == 0)[:count]
    if len(ends) < count:
        raise ValueError(f"it has {len(ends)} positions, {count} are due")
    _, cursor = cursor.take((int(ends[-1]) + 8) // 8)
    data, cursor = cursor.take((p * count + 7) // 8)
    bits = np.unpackbits(data)[: p * count].reshape(count, p).astype(np.int64)
    low = bits @ (1 << np.arange(p - 1, -1, -1, dtype=np.int64))
    gaps = ((np.diff(ends, prepend=-1) - 1) << p) + low
    return np.cumsum(gaps + 1) - 1, cursor
