r"""How SwitchLoRA's vectors are drawn, and which ranks can switch at all.

    σ_A = (√d_out · r / d_in^{3/2})^{1/4} · √g       σ_B = (r / √(d_out d_in))^{1/4} · √g

with ``g = 1/√3``, uniform between ``±√3 σ``. The entries of ``(1/r) B A`` then have the deviation
``g / √d_in`` of PyTorch's own linear layers, and ``σ_A / σ_B = (d_out / d_in)^{1/4}``. For another
``alpha`` than the paper's 1 both are divided by ``√alpha``, which keeps that deviation.
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedlora.core.seeding import generator

GAIN = 1 / math.sqrt(3)

Side: TypeAlias = Literal["a", "b"]
SIDES: tuple[Side, Side] = ("a", "b")


def deviations(d_out: int, d_in: int, rank: int, alpha: float = 1.0) -> tuple[float, float]:
    """``(σ_A, σ_B)`` of the entries of both factors and of their pools."""
    a = (math.sqrt(d_out) * rank / d_in**1.5) ** 0.25
    b = (rank / math.sqrt(d_out * d_in)) ** 0.25
    return math.sqrt(GAIN / alpha) * a, math.sqrt(GAIN / alpha) * b


def check_rank(path: str, d_out: int, d_in: int, rank: int) -> None:
    """Refuse a rank that would never switch.

    Raises:
        ValueError: naming the layer, the rank and what is allowed.
    """
    pool = min(d_out, d_in)
    if rank < 2:
        raise ValueError(
            f"{path}: rank {rank} cannot switch: a vector is frozen when its partner is exchanged, "
            f"and with one slot nothing would be left to train; choose a rank in 2..{pool - 1}"
        )
    if rank >= pool:
        raise ValueError(
            f"{path}: rank {rank} cannot switch: the pool has min(d_out={d_out}, d_in={d_in}) = "
            f"{pool} vectors, and all of them are in slots; choose a rank in 2..{pool - 1}"
        )


def draw_candidates(
    seed: int,
    path: str,
    d_out: int,
    d_in: int,
    rank: int,
    *,
    alpha: float = 1.0,
    turn: int = 0,
    folder: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """``C_A [c, d_in]`` and ``C_B [c, d_out]``, float32 on the CPU, with ``c = min(d_out, d_in)``.

    One sum and one product per number: every machine draws the same bits.

    Args:
        seed: of the run.
        path: of the layer.
        d_out: its outputs.
        d_in: its inputs.
        rank: its slots.
        alpha: the scale is ``alpha / rank``.
        turn: another number, other pools: for who draws them anew each round.
        folder: where to keep the pools in files, mapped into memory; else in memory.
    """
    pool = min(d_out, d_in)
    g = generator(seed, "switch-pool", zlib.crc32(path.encode()), turn)
    found = []
    for side, width, deviation in zip(
        "ab", (d_in, d_out), deviations(d_out, d_in, rank, alpha), strict=True
    ):
        vectors = _room(pool, width, folder and folder / f"{path}.{side}.pool")
        drawn = vectors.numpy()
        g.random(dtype=np.float32, out=drawn)
        drawn -= np.float32(0.5)
        drawn *= np.float32(2 * math.sqrt(3) * deviation)
        found.append(vectors)
    return found[0], found[1]


def _room(rows: int, width: int, file: Path | None) -> Tensor:
    if file is None:
        return torch.empty(rows, width)
    file.parent.mkdir(parents=True, exist_ok=True)
    return torch.from_file(str(file), shared=True, size=rows * width, dtype=torch.float32).view(
        rows, width
    )


def first_ids(pool: int, rank: int) -> tuple[list[int], list[int]]:
    """Which pool vectors are in the slots of A and of B at first: the last ``rank`` of each.

    B's begin half a turn further on, as its pointer does: the vector after the one before the
    pointer is then the next in the pool on both sides.
    """
    last = list(range(pool - rank, pool))
    return last, [last[i - rank // 2] for i in range(rank)]


@dataclass(frozen=True)
class Start:
    """The vectors of a layer as it begins."""

    candidates: dict[Side, Tensor]
    """``[c, d_in]`` and ``[c, d_out]``."""
    ids: dict[Side, list[int]]
    pointers: dict[Side, int]

    @property
    def a(self) -> Tensor:
        """``[r, d_in]``"""
        return self.candidates["a"][self.ids["a"]]

    @property
    def b(self) -> Tensor:
        """``[d_out, r]``"""
        return self.candidates["b"][self.ids["b"]].t().contiguous()


def draw_start(
    seed: int,
    path: str,
    d_out: int,
    d_in: int,
    rank: int,
    *,
    alpha: float,
    turn: int = 0,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Start:
    """Pools and who of them is in which slot at first; arguments as of `draw_candidates`.

    Args:
        dtype: of the layer, which its pools are kept in; in files they are float32.

    Raises:
        ValueError: for a rank that cannot switch.
    """
    check_rank(path, d_out, d_in, rank)
    pools = draw_candidates(seed, path, d_out, d_in, rank, alpha=alpha, turn=turn, folder=folder)
    ids = first_ids(min(d_out, d_in), rank)
    kept = pools if folder is not None else (pools[0].to(dtype), pools[1].to(dtype))
    return Start(
        dict(zip(SIDES, kept, strict=True)),
        dict(zip(SIDES, ids, strict=True)),
        {"a": 0, "b": rank // 2},
    )
