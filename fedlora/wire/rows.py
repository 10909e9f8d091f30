"""Number formats of rows of scalars as NumPy arrays: activations and gradients across the cut of a
split, and rank directions of adapters (`fedlora.wire.tensors`).

A wire takes the rows ``x [tokens, d]`` of a detached tensor and returns arrays for a Flower
message. Decoding them gives float32 (float64 for ``fp64``). Both sides continue with the decoded
tensor; gradients do not pass through this module.

    fp32, fp64  the scalars as they are
    bf16        rounded to bfloat16; NumPy has none, so the bits travel as uint16
    fp16        rounded to float16 after each row is scaled by a power of two, whose exponent
                is sent too: float16 loses bits below 6e-5, where gradients of a large batch lie
    int8        q = round(x / s), s = max|x| / 127 over ``group`` neighbouring scalars of a row; the
                ``keep`` largest scalars of a row can be excluded and sent as float32, because a
                few channels of a transformer are far larger than all others
    int4        the same with s = max|x| / 7, two codes to a byte
    topk        the ``k`` largest scalars of a row, as fp16, with their positions; the rest is zero

All kinds except fp64 are applied to float32. Encoding a decoded tensor again changes nothing,
except that ``keep`` may choose the other one of two scalars of equal size. Both sides refuse a
scalar that is not finite or too large for the wire.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.checks import at_least, one_of

Parts: TypeAlias = dict[str, NDArray[Any]]
"""The arrays that are sent, by name."""

KINDS = ("fp32", "fp64", "fp16", "bf16", "int8", "int4", "topk")
LEVELS = {"int8": 127, "int4": 7}
"""Largest code of each kind that has codes: they are symmetric."""
_HALF_EXPONENT = 15  # a row is scaled below 2^15, within reach of float16 (65504)
_LOWEST, _HIGHEST = -126, 127  # exponents of powers of two that float32 holds exactly
_ROUNDED_UP = 1 + 2**-11  # as far as eleven bits may move a number: beyond float32 at its very end


@dataclass(frozen=True)
class Wire:
    """The wire format of one direction, as configuration."""

    kind: str = "fp32"
    """``fp32``, ``fp64``, ``fp16``, ``bf16``, ``int8``, ``int4`` or ``topk``."""
    group: int = 64
    """``int8``, ``int4`` only: scalars of a row that share a scale (float32); 0: the whole row."""
    keep: int = 0
    """``int8``, ``int4`` only: the number of largest scalars of each row that are sent as they
    are."""
    k: int = 64
    """``topk`` only: scalars of a row that are sent; a narrower row is sent whole."""
    stochastic: bool = False
    """``int8``, ``int4`` only: round up or down at random, without bias, instead of to the
    nearest."""

    def __post_init__(self) -> None:
        one_of("wire.kind", self.kind, KINDS)
        at_least("wire.group", self.group, 0)
        at_least("wire.keep", self.keep, 0)
        at_least("wire.k", self.k, 1)
        if self.stochastic and self.kind not in LEVELS:
            raise ValueError(
                f"wire.stochastic=True needs wire.kind=int8 or int4, not {self.kind!r}"
            )

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Parts:
        """Encode rows as arrays.

        Args:
            x: ``[tokens, d]``, floating, on any device; ``tokens`` may be zero, ``d`` may not.
            generator: of ``stochastic`` rounding, on the device of ``x``; unused otherwise.

        Raises:
            ValueError: if ``x`` has another shape or type, or holds scalars that the wire cannot
                represent (NaN, infinity, out of its range), or if rounding lacks its generator.
        """
        if x.ndim != 2 or x.shape[1] == 0 or not x.is_floating_point():
            raise ValueError(
                f"the wire takes rows [tokens, d >= 1] of floats, not {list(x.shape)} {x.dtype}"
            )
        if self.stochastic and generator is None:
            raise ValueError("wire.stochastic=True needs a seeded generator for every encoding")
        rows = x.detach().to(torch.float64 if self.kind == "fp64" else torch.float32)
        return self._format.encode(rows, generator if self.stochastic else None)

    def decode(
        self, parts: Mapping[str, NDArray[Any]], shape: tuple[int, int] | None = None
    ) -> Tensor:
        """The inverse of `encode`: ``[tokens, d]`` on the CPU, in fresh memory.

        Args:
            parts: what was received.
            shape: the ``(tokens, d)`` that is due; ``None``: whatever the arrays say.

        Raises:
            ValueError: naming the array that is missing, unknown, of another type or length, or not
                finite.
        """
        if shape is not None and self.kind in ("topk", "int4"):  # before memory is taken for it
            one_of("width", _narrow_width(parts), (shape[1],))
        x = self._format.decode(parts)
        if shape is not None:
            _fits("rows", x, shape)
        return x

    def bytes(self, tokens: int, d: int) -> int:
        """Bytes of the arrays of ``tokens`` rows of ``d`` scalars, without headers."""
        return self._format.bytes(tokens, d)

    def layout(self, tokens: int, d: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Name -> NumPy type and shape of the arrays of ``tokens`` rows of ``d`` scalars, for a
        receiver that knows these numbers: without ``width``, which would tell it."""
        parts = self.encode(torch.zeros(tokens, d), torch.Generator())
        return {n: (a.dtype, a.shape) for n, a in parts.items() if n != "width"}

    @property
    def _format(self) -> "_Format":
        if self.kind in LEVELS:
            return _Codes(self.kind, self.group, self.keep)
        if self.kind == "topk":
            return _TopK(self.k)
        return _Half() if self.kind == "fp16" else _PLAIN[self.kind]


class _Format(Protocol):
    def encode(self, x: Tensor, generator: torch.Generator | None) -> Parts: ...
    def decode(self, parts: Mapping[str, NDArray[Any]]) -> Tensor: ...
    def bytes(self, tokens: int, d: int) -> int: ...


@dataclass(frozen=True)
class _Plain:
    """Each scalar by itself, in one type."""

    dtype: torch.dtype
    array: Any
    """The NumPy type that holds it."""

    def encode(self, x: Tensor, generator: torch.Generator | None) -> Parts:
        values = x.to(self.dtype)
        _require_finite(values, x)
        bits = values.view(torch.uint16) if self.dtype == torch.bfloat16 else values
        return {"values": _numpy(bits)}

    def decode(self, parts: Mapping[str, NDArray[Any]]) -> Tensor:
        (values,) = _take(parts, values=(self.array, 2))
        if self.dtype == torch.bfloat16:
            values = values.view(torch.bfloat16).to(torch.float32)
        return _finite("values", values)

    def bytes(self, tokens: int, d: int) -> int:
        return tokens * d * self.dtype.itemsize


_PLAIN: Mapping[str, _Plain] = {
    "fp32": _Plain(torch.float32, np.float32),
    "fp64": _Plain(torch.float64, np.float64),
    "bf16": _Plain(torch.bfloat16, np.uint16),
}


@dataclass(frozen=True)
class _Half:
    """float16, with a power of two for each row."""

    def encode(self, x: Tensor, generator: torch.Generator | None) -> Parts:
        _require_finite(x * _ROUNDED_UP, x)
        values, exponents = _halve(x)
        return {"values": _numpy(values), "exponents": _numpy(exponents)}

    def decode(self, parts: Mapping[str, NDArray[Any]]) -> Tensor:
        values, exponents = _take(parts, values=(np.float16, 2), exponents=(np.int8, 1))
        return _unhalve(values, exponents)

    def bytes(self, tokens: int, d: int) -> int:
        return tokens * (2 * d + 1)


@dataclass(frozen=True)
class _Codes:
    """Codes of eight or four bits, a scale for each group, and the largest scalars as they are."""

    kind: str
    group: int
    keep: int

    def encode(self, x: Tensor, generator: torch.Generator | None) -> Parts:
        _require_finite(x, x)
        parts: Parts = {}
        # The largest scalars of each row with their positions, [tokens, kept], then zero there.
        kept = min(self.keep, x.shape[1])
        if kept:
            where = x.abs().topk(kept, dim=1).indices.sort(dim=1).values
            parts["kept"] = _numpy(x.gather(1, where))
            parts["kept_at"] = _numpy(where).astype(_position(x.shape[1]))
            x = x.scatter(1, where, 0.0)

        # Scales [tokens, groups], repeated for every scalar, [tokens, d]; codes in -127..127.
        scales = self._scales(x)
        spread = self._spread(scales, x.shape[1])
        steps = torch.where(spread > 0, x / spread, 0.0)
        codes = steps.round() if generator is None else _round_at_random(steps, generator)
        parts["codes"] = _numpy(codes.clamp(-self._levels, self._levels).to(torch.int8))
        if self._half:
            parts["codes"] = _nibbles(parts["codes"])
            parts["width"] = np.array([x.shape[1]], np.uint32)
        return parts | {"scales": _numpy(scales)}

    def decode(self, parts: Mapping[str, NDArray[Any]]) -> Tensor:
        if self._half:
            d = _narrow_width(parts)
            parts = {n: a for n, a in parts.items() if n != "width"}
        else:
            d = _width(parts, "codes")
        kept = min(self.keep, d)
        extra = {"kept": (np.float32, 2), "kept_at": (_position(d), 2)} if kept else {}
        code = np.uint8 if self._half else np.int8
        taken = _take(parts, codes=(code, 2), scales=(np.float32, 2), **extra)
        codes, scales = taken[0], _finite("scales", taken[1])
        if self._half:
            _fits("codes", codes, (len(codes), -(-d // 2)))
            codes = _whole_codes(codes, d)
        _fits("scales", scales, (len(codes), self._groups(d)))
        x = codes.to(torch.float32) * self._spread(scales, d)
        if kept:
            _fits("kept", taken[2], (len(codes), kept))
            x.scatter_(1, _positions("kept_at", taken[3], taken[2], d), taken[2])
        return _finite("codes times scales", x)

    def bytes(self, tokens: int, d: int) -> int:
        kept = min(self.keep, d) * (4 + _position_bytes(d))
        codes = -(-d // 2) if self._half else d
        return tokens * (codes + 4 * self._groups(d) + kept) + (4 if self._half else 0)

    @property
    def _half(self) -> bool:
        """Whether two codes share a byte."""
        return self.kind == "int4"

    @property
    def _levels(self) -> int:
        return LEVELS[self.kind]

    def _groups(self, d: int) -> int:
        return -(-d // self._size(d))

    def _size(self, d: int) -> int:
        return min(self.group, d) if self.group else d

    def _spread(self, scales: Tensor, d: int) -> Tensor:
        """The scale of every scalar, ``[tokens, d]``."""
        wide = scales.unsqueeze(2).expand(*scales.shape, self._size(d))  # faster than repeating
        return wide.flatten(1)[:, :d]

    def _scales(self, x: Tensor) -> Tensor:
        """``max|x| / 127`` (or 7) of each group, ``[tokens, groups]``, cut to 17 significant bits.

        Then ``127 s`` is exact in float32 and not larger than ``max|x|``: encoding a decoded scalar
        gives the same code, and no decoded scalar is larger than those that were kept. Neither
        holds below the normal numbers of float32: such a group is sent as zeros.
        """
        tokens, d = x.shape
        size, groups = self._size(d), self._groups(d)
        padded = torch.nn.functional.pad(x.abs(), (0, groups * size - d))
        largest = padded.view(tokens, groups, size).amax(dim=2)
        scales = ((largest / self._levels).view(torch.int32) & ~0x7F).view(torch.float32)
        return torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)


@dataclass(frozen=True)
class _TopK:
    """The largest scalars of each row and their positions."""

    k: int

    def encode(self, x: Tensor, generator: torch.Generator | None) -> Parts:
        _require_finite(x * _ROUNDED_UP, x)
        where = x.abs().topk(min(self.k, x.shape[1]), dim=1).indices.sort(dim=1).values
        values, exponents = _halve(x.gather(1, where))
        return {
            "values": _numpy(values),
            "exponents": _numpy(exponents),
            "positions": _numpy(where).astype(_position(x.shape[1])),
            "width": np.array([x.shape[1]], np.uint32),
        }

    def decode(self, parts: Mapping[str, NDArray[Any]]) -> Tensor:
        d = _narrow_width(parts)
        values, exponents, positions, _ = _take(
            parts,
            values=(np.float16, 2),
            exponents=(np.int8, 1),
            positions=(_position(d), 2),
            width=(np.uint32, 1),
        )
        _fits("values", values, (len(values), min(self.k, d)))
        x = torch.zeros(len(values), d)
        return x.scatter_(
            1, _positions("positions", positions, values, d), _unhalve(values, exponents)
        )

    def bytes(self, tokens: int, d: int) -> int:
        entry = 2 + _position_bytes(d)
        return tokens * (min(self.k, d) * entry + 1) + 4


# ------------------------------------------------------------------------------------------ numbers


def _halve(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float16 rows and their exponents ``e`` (int8): ``x ≈ values * 2^e``.

    The exponent depends on the largest scalar of a row after rounding to the eleven bits of
    float16, so a decoded row gets the same exponent again.
    """
    largest = x.abs().amax(dim=1)
    significand, exponent = torch.frexp(largest)
    exponent = exponent + (significand.to(torch.float16) >= 1).to(exponent.dtype)
    exponent = (exponent - _HALF_EXPONENT).clamp(_LOWEST, _HIGHEST)
    exponent = torch.where(largest > 0, exponent, 0)
    scaled = x * _power_of_two(-exponent).unsqueeze(1)
    return scaled.to(torch.float16), exponent.to(torch.int8)


def _unhalve(values: Tensor, exponents: Tensor) -> Tensor:
    """The inverse of `_halve`, checked: float32."""
    _fits("exponents", exponents, (len(values),))
    if len(exponents) and int(exponents.min()) < _LOWEST:
        raise ValueError(f"exponents: {int(exponents.min())} is below {_LOWEST}")
    wide = values.to(torch.float32) * _power_of_two(exponents).unsqueeze(1)
    return _finite("values", wide)


def _power_of_two(exponent: Tensor) -> Tensor:
    """``2^e`` exactly, from the bits of float32, for ``e`` in -126..127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Up with a probability of the fraction, else down: whole numbers stay, the mean is ``x``."""
    below = x.floor()
    drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return below + (drawn < x - below).to(x.dtype)


def _nibbles(codes: NDArray[Any]) -> NDArray[Any]:
    """Codes in -8..7, ``[tokens, d]`` int8, two to a byte: the first in its lower half."""
    odd = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).view(np.uint8) & 0xF
    packed: NDArray[Any] = odd[:, ::2] | (odd[:, 1::2] << 4)
    return packed


def _whole_codes(packed: Tensor, d: int) -> Tensor:
    """The inverse of `_nibbles`: ``[tokens, d]`` int8."""
    both = torch.stack([packed & 0xF, packed >> 4], dim=2).flatten(1)[:, :d].to(torch.int8)
    return torch.where(both > 7, both - 16, both)


# ------------------------------------------------------------------------------------- what is sent


def _numpy(x: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = x.contiguous().cpu().numpy()
    return array


def _position(d: int) -> Any:
    """The NumPy type that holds a position in a row of ``d`` scalars."""
    return np.uint16 if d <= 2**16 else np.uint32


def _position_bytes(d: int) -> int:
    return 2 if d <= 2**16 else 4


def _require_finite(sent: Tensor, x: Tensor) -> None:
    """Raise a ValueError that names the first scalar that the wire cannot represent."""
    bad = ~torch.isfinite(sent)
    if bool(bad.any()):
        token, channel = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{int(bad.sum())} of {x.numel()} numbers cannot be sent as {sent.dtype}: the first is "
            f"{float(x[token, channel])} in row {token}, channel {channel}; the wire carries "
            "finite numbers of its range alone"
        )


# -------------------------------------------------------------------------------- what was received


def _take(parts: Mapping[str, NDArray[Any]], **expected: tuple[Any, int]) -> list[Tensor]:
    """The named arrays as tensors in fresh memory, each of its type and number of dimensions."""
    if parts.keys() != expected.keys():
        raise ValueError(f"the wire holds {sorted(parts)}, and {sorted(expected)} are due")
    return [_array(name, parts[name], *kind) for name, kind in expected.items()]


def _array(name: str, array: NDArray[Any], dtype: Any, ndim: int) -> Tensor:
    if array.dtype != dtype or array.ndim != ndim:
        raise ValueError(
            f"{name}: {array.dtype} {list(array.shape)}, where {np.dtype(dtype)} of {ndim} "
            "dimensions is due"
        )
    return torch.from_numpy(np.array(array))  # messages may own their memory, and forbid writing


def _width(parts: Mapping[str, NDArray[Any]], name: str) -> int:
    """The row length that one array shows."""
    if name not in parts or parts[name].ndim != 2 or parts[name].shape[1] == 0:
        raise ValueError(f"the wire holds {sorted(parts)}, and {name} [tokens, d >= 1] is due")
    return int(parts[name].shape[1])


def _narrow_width(parts: Mapping[str, NDArray[Any]]) -> int:
    """The row length that ``topk`` states."""
    width = parts.get("width")
    if width is None or width.shape != (1,) or width.dtype != np.uint32 or not width[0]:
        raise ValueError(f"the wire holds {sorted(parts)}, and width [1] uint32 >= 1 is due")
    return int(width[0])


def _fits(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: {list(x.shape)}, where {list(shape)} is due")


def _positions(name: str, positions: Tensor, values: Tensor, d: int) -> Tensor:
    """Positions of values in rows of ``d``, checked, as an index."""
    _fits(name, positions, tuple(values.shape))
    positions = positions.to(torch.int64)
    if positions.numel() and int(positions.max()) >= d:
        raise ValueError(f"{name}: position {int(positions.max())} in a row of {d}")
    return positions


def _finite(name: str, x: Tensor) -> Tensor:
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {x.numel()} numbers are not finite")
    return x
