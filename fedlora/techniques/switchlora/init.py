r"""How SwitchLoRA's vectors are drawn, and which ranks can switch.

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
    """``(σ_A, σ_B)``: standard deviations of the entries of both factors and their candidates."""
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
            f"{path}: rank {rank} cannot switch: a vector is frozen when its partner is switched, "
            f"and with one slot nothing would be left to train; choose a rank in 2..{pool - 1}"
        )
    if rank >= pool:
        raise ValueError(
            f"{path}: rank {rank} cannot switch: there are min(d_out={d_out}, d_in={d_in}) = "
            f"{pool} candidate vectors, and all are in slots; choose a rank in 2..{pool - 1}"
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
    """Draw ``C_A [c, d_in]`` and ``C_B [c, d_out]``, float32 on the CPU, ``c = min(d_out, d_in)``.

    One sum and one product per entry: the draws are bitwise identical on every machine.

    Args:
        seed: of the run.
        path: of the layer.
        d_out: its outputs.
        d_in: its inputs.
        rank: its slots.
        alpha: the scale is ``alpha / rank``.
        turn: another turn draws other candidates, for clients that draw new ones each round.
        folder: keep the candidates in files there, mapped into memory; None: in memory.
    """
    pool = min(d_out, d_in)
    g = generator(seed, "switch-pool", zlib.crc32(path.encode()), turn)
    found = []
    for side, width, deviation in zip(
        "ab", (d_in, d_out), deviations(d_out, d_in, rank, alpha), strict=True
    ):
        vectors = _room(pool, width, folder and folder / f"{path}.{side}.pool")
        # Uniform in [0, 1), shifted to [-1/2, 1/2) and scaled to ±√3 σ; in place, since [c, width]
        # may be a file.
        drawn = vectors.numpy()
        g.random(dtype=np.float32, out=drawn)
        drawn -= np.float32(0.5)
        drawn *= np.float32(2 * math.sqrt(3) * deviation)
        found.append(vectors)
    return found[0], found[1]


def _room(rows: int, width: int, file: Path | None) -> Tensor:
    """Uninitialised ``[rows, width]`` float32, in memory or in a file that is mapped into it."""
    if file is None:
        return torch.empty(rows, width)
    file.parent.mkdir(parents=True, exist_ok=True)
    return torch.from_file(str(file), shared=True, size=rows * width, dtype=torch.float32).view(
        rows, width
    )


def first_ids(pool: int, rank: int) -> tuple[list[int], list[int]]:
    """The candidate vectors that are in the slots of A and of B at first: the last ``rank``.

    The pointer of B starts half a turn after that of A, so the ids of B are rotated by as much: the
    slot before a pointer then holds the last candidate on both sides, and the first one is next.
    With 5 candidates and rank 4 the pointers are at slots 0 and 2:

    >>> first_ids(5, 4)
    ([1, 2, 3, 4], [3, 4, 1, 2])
    """
    # Slot i of B holds the id of slot i - rank // 2 of A; negative indices go round the ring.
    last = list(range(pool - rank, pool))
    return last, [last[i - rank // 2] for i in range(rank)]


@dataclass(frozen=True)
class Start:
    """The vectors of a layer at its start."""

    candidates: dict[Side, Tensor]
    """Candidate vectors, ``[c, d_in]`` and ``[c, d_out]``."""
    ids: dict[Side, list[int]]
    """The candidate in each slot."""
    pointers: dict[Side, int]
    """The slot that is switched first."""

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
    """Draw candidate vectors and fill the slots; arguments as of `draw_candidates`.

    Args:
        dtype: the type of the layer and of its candidates; in files they are float32.

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
